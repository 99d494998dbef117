"""The closed forms against numbers got another way: quadrature, autograd, other samples, a solution known by hand."""

import inspect
import math
import re
from dataclasses import replace

import pytest
import torch
import unrolled
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from unrolled.core.errors import BadInput
from unrolled.core.loop import denoise
from unrolled.core.mixture import GaussianMixture
from unrolled.core.noise import DiffusersNoise
from unrolled.core.prediction import Kind
from unrolled.core.schedule import Schedule
from unrolled.schedulers import Euler

LINE = GaussianMixture(torch.tensor([[-1.0], [0.5], [3.0]]), torch.tensor([0.2, 0.6, 0.4]), torch.tensor([1.0, 2.0, 1.0]))
PLANE = GaussianMixture(torch.tensor([[-1.0, 0.0], [1.0, 0.5]]), torch.tensor([0.1, 0.3]), torch.tensor([0.4, 0.6]))


def pictures(k: int = 3, *, one_each: bool = False) -> GaussianMixture:
    """A mixture of latents of 4x2x3."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(k, 4, 2, 3, generator=generator)
    stds = torch.rand(means.shape if one_each else (k,), generator=generator) + 0.1
    return GaussianMixture(means, stds, torch.ones(k))


def by_quadrature(mixture: GaussianMixture, x: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    """log p(x) and E[x0 | x] of a mixture in one dimension, from the integral over x0."""
    x0 = torch.linspace(-12, 12, 40_001, dtype=torch.float64)
    prior = mixture.log_density(x0[:, None]).exp()
    joint = prior * torch.exp(-0.5 * ((x - x0) / sigma) ** 2) / (sigma * math.sqrt(2 * math.pi))
    total = torch.trapezoid(joint, x0)
    return total.log(), torch.trapezoid(joint * x0, x0) / total


def test_its_density_is_the_mixtures() -> None:
    x = torch.tensor([[0.3]], dtype=torch.float64)
    by_hand = sum(
        w / 4 * math.exp(-0.5 * ((0.3 - m) / s) ** 2) / (s * math.sqrt(2 * math.pi))
        for w, m, s in [(1, -1.0, 0.2), (2, 0.5, 0.6), (1, 3.0, 0.4)]
    )
    assert LINE.log_density(x).item() == pytest.approx(math.log(by_hand), abs=1e-6)  # means and stds are float32
    grid = torch.linspace(-40, 40, 20_001, dtype=torch.float64)
    for sigma in (0.0, 0.5, 3.0):
        assert torch.trapezoid(LINE.log_density(grid[:, None], sigma).exp(), grid).item() == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("sigma", [0.05, 0.7, 4.0])
def test_the_denoiser_is_the_mean_over_all_pictures(sigma: float) -> None:
    x = torch.tensor([[-2.0], [0.1], [1.9], [5.0]], dtype=torch.float64)
    log_density, mean = by_quadrature(LINE, x, sigma)
    assert torch.allclose(LINE.log_density(x, sigma), log_density, rtol=0, atol=1e-8)
    assert torch.allclose(LINE(x, sigma).x0.flatten(), mean, rtol=0, atol=1e-8)


@pytest.mark.parametrize("one_each", [False, True])
@pytest.mark.parametrize("sigma", [0.0, 0.3, 10.0])
def test_the_score_is_the_gradient_of_the_log_density(sigma: float, one_each: bool) -> None:
    mixture = pictures(one_each=one_each)
    x = torch.randn(5, 4, 2, 3, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(mixture.log_density(x, sigma).sum(), x)
    assert torch.allclose(mixture.score(x, sigma), gradient, rtol=1e-10)
    assert torch.allclose(mixture(x, sigma).x0, x + sigma**2 * gradient, rtol=0, atol=1e-11)  # Tweedie's formula


@pytest.mark.parametrize("sigma", [1e-4, 0.5, 80.0, 1e6])
@pytest.mark.parametrize("kind", ["epsilon", "v", "x0"])
def test_every_parametrisation_says_the_same(kind: Kind, sigma: float) -> None:
    x = PLANE.sample(range(9), sigma)
    said, meant = replace(PLANE, kind=kind)(x, sigma), PLANE(x, sigma)
    assert said.kind == kind
    assert torch.allclose(said.x0, meant.x0, rtol=0, atol=1e-13 * (1 + sigma))
    assert torch.allclose(said.eps, -sigma * PLANE.score(x, sigma), rtol=0, atol=1e-13 * (1 + 1 / sigma))
    v = (-sigma * PLANE.score(x, sigma) - sigma * meant.x0) / math.sqrt(1 + sigma**2)
    assert kind != "v" or torch.allclose(said.out, v, rtol=0, atol=1e-12)


def test_nothing_overflows_far_away() -> None:
    """A million standard deviations off every component's density is 0 in float64, its logarithm is not."""
    x = torch.tensor([[1e6], [-1e6]], dtype=torch.float64)
    near = LINE(x, 1e-3).x0.flatten() / x.flatten()
    assert torch.isfinite(LINE.log_density(x, 1e-3)).all()
    assert torch.allclose(near, torch.tensor(1.0, dtype=torch.float64), atol=1e-4)


def test_dtype_and_shape_are_those_of_x() -> None:
    mixture, flat = pictures(), torch.randn(2, 24)
    same = flat.view(2, 4, 2, 3)
    assert mixture(same, 1.0).out.dtype == torch.float32
    assert torch.equal(mixture(same, 1.0).out.flatten(1), mixture(flat, 1.0).out)
    assert mixture.solve(same, 1.0, 0.5).shape == mixture.score(same, 1.0).shape == same.shape


def test_a_single_picture_is_known_at_once() -> None:
    picture = torch.randn(1, 4, 2, 3)
    mixture = GaussianMixture(picture, torch.zeros(1), torch.ones(1))
    x = torch.randn(3, 4, 2, 3, dtype=torch.float64)
    assert torch.equal(mixture(x, 5.0).x0, picture.double().expand(3, -1, -1, -1))
    straight = picture.double() + (x - picture.double()) * (0.5 / 5.0)
    assert torch.allclose(mixture.solve(x, 5.0, 0.5), straight, rtol=0, atol=1e-10)
    with pytest.raises(BadInput, match="std of 0 has no density at sigma 0: ask above 0"):
        mixture.solve(x, 5.0, 0.0)
    with pytest.raises(BadInput, match="std of 0 has no density"):
        mixture.log_density(x)


@pytest.mark.parametrize(("sigma", "sigma_next"), [(10.0, 0.1), (10.0, 0.0), (0.0, 10.0), (80.0, 0.002)])
def test_one_component_is_solved_in_closed_form(sigma: float, sigma_next: float) -> None:
    """Each coordinate keeps its distance from the mean in standard deviations."""
    mixture = pictures(1, one_each=True)
    x = mixture.sample(range(4), sigma)
    mean, variance = mixture.means.double(), mixture.stds.double() ** 2
    known = mean + (x - mean) * ((variance + sigma_next**2) / (variance + sigma**2)).sqrt()
    assert torch.allclose(mixture.solve(x, sigma, sigma_next), known, rtol=1e-11, atol=1e-11)


def test_the_solution_in_one_dimension_keeps_quantiles() -> None:
    """The flow on a line cannot cross itself, so that the share of pictures to the left of a path stays."""

    def share_left_of(x: Tensor, sigma: float) -> Tensor:
        spread = (LINE.stds.double() ** 2 + sigma**2).sqrt()
        below: Tensor = torch.special.ndtr((x - LINE.means.double().T) / spread)
        return below @ (LINE.weights.double() / 4)

    x = torch.tensor([[-12.0], [-3.0], [0.0], [0.5], [15.0]], dtype=torch.float64)
    end = LINE.solve(x, 10.0, 0.0)
    assert torch.allclose(share_left_of(end, 0.0), share_left_of(x, 10.0), rtol=0, atol=1e-10)
    assert torch.allclose(LINE.solve(end, 0.0, 10.0), x, rtol=0, atol=1e-8)  # and back


def test_samples_are_the_mixtures_and_each_is_its_seeds_own() -> None:
    many = PLANE.sample(range(20_000), 0.5, DiffusersNoise.seeded(0))
    share = PLANE.weights.double()[:, None]
    mean = (share * PLANE.means).sum(0)
    variance = (share * (PLANE.means.double() ** 2 + PLANE.stds[:, None] ** 2)).sum(0) - mean**2 + 0.5**2
    assert torch.allclose(many.mean(0), mean, atol=0.03)
    assert torch.allclose(many.var(0), variance, rtol=0.03)
    assert PLANE.distance(many, 0.5) < 0.02
    assert torch.equal(PLANE.sample([7, 3])[1], PLANE.sample([3])[0])


def test_samples_at_two_levels_share_their_picture() -> None:
    clean, noisy = PLANE.sample(range(50)), PLANE.sample(range(50), 1e-3)
    assert 1e-4 < (noisy - clean).std() < 2e-3


def test_distance_is_wassersteins() -> None:
    """On a line: the mean distance between sorted samples and quantiles; a shift is as far as it shifts."""
    one = GaussianMixture(torch.tensor([[2.0]]), torch.tensor([0.5]), torch.tensor([1.0]))
    quantiles = 2.0 + 0.5 * torch.special.ndtri((torch.arange(4000, dtype=torch.float64)[:, None] + 0.5) / 4000)
    assert one.distance(quantiles) < 1e-3
    assert one.distance(quantiles + 0.3) == pytest.approx(0.3, abs=1e-3)
    assert one.distance(2.0 + (quantiles - 2.0) * 2) == pytest.approx(0.5 * math.sqrt(2 / math.pi), rel=1e-2)
    assert one.distance(torch.full((10, 1), 2.0)) == pytest.approx(0.5 * math.sqrt(2 / math.pi), rel=1e-2)


def test_distance_in_many_dimensions_falls_with_samples_and_sees_a_lost_component() -> None:
    mixture = pictures()
    few, many = (mixture.distance(mixture.sample(range(n), 0.0, DiffusersNoise.seeded(1))) for n in (200, 20_000))
    assert many < few / 5
    lost = replace(mixture, weights=torch.tensor([1.0, 1.0, 1e-9]))
    assert mixture.distance(lost.sample(range(20_000), 0.0, DiffusersNoise.seeded(1))) > 10 * many


@given(st.permutations(range(6)), st.floats(1e-3, 1e3))
def test_order_in_the_batch_does_not_matter(order: list[int], sigma: float) -> None:
    x = PLANE.sample(range(6), sigma)
    assert torch.equal(PLANE(x[order], sigma).x0, PLANE(x, sigma).x0[order])


def test_weights_need_not_add_up() -> None:
    x = PLANE.sample(range(5), 1.0)
    assert torch.allclose(replace(PLANE, weights=7 * PLANE.weights)(x, 1.0).x0, PLANE(x, 1.0).x0)


def test_it_stands_where_a_network_would() -> None:
    mixture, schedule = pictures(), Schedule.at([10.0, 3.0, 1.0, 0.3, 0.1, 0.0])
    start = mixture.latents([5, 6], schedule)
    assert start.x.shape == (2, 4, 2, 3)
    assert (start.sigma, start.seeds) == (10.0, (5, 6))
    end = denoise(mixture, start, schedule, Euler())
    assert end.is_clean
    assert end.space == mixture.space != pictures(2).space
    assert PLANE.latents([0], schedule).x.shape == (1, 2, 1, 1)


def test_the_example_of_the_docstring_runs() -> None:
    (example,) = re.findall(r"::\n\n((?: {4}.*\n)+)", inspect.cleandoc(GaussianMixture.__doc__ or ""))
    names = {**vars(unrolled), "torch": torch}
    exec(inspect.cleandoc(example), names)
    assert 0.1 < names["error"] < 2.0  # six steps are few
    assert names["distance"] < 0.1


def test_repr() -> None:
    assert repr(pictures()) == "GaussianMixture(3 components of 4x2x3, kind x0)"


def test_faults_are_named() -> None:
    means, ones = torch.zeros(2, 3), torch.ones(2)
    with pytest.raises(BadInput, match=r"means \(k, …\), stds .* but was given \(2, 3\), \(2,\) and \(3,\)"):
        GaussianMixture(means, ones, torch.ones(3))
    with pytest.raises(BadInput, match=r"but was given \(2,\), \(2,\) and \(2,\)"):
        GaussianMixture(ones, ones, ones)
    with pytest.raises(BadInput, match="stds of a mixture must be 0 or more and its weights above 0"):
        GaussianMixture(means, -ones, ones)
    with pytest.raises(BadInput, match="weights above 0"):
        GaussianMixture(means, ones, 0 * ones)
    with pytest.raises(BadInput, match=r"takes pictures \(n, …\) of 3 numbers each, but was given \(4, 2\)"):
        GaussianMixture(means, ones, ones)(torch.zeros(4, 2), 1.0)
    with pytest.raises(BadInput, match=r"means of \(k, d\) or \(k, channels, height, width\), but these are \(2, 3, 1\)"):
        GaussianMixture(means[..., None], ones, ones).latents([0], Schedule.at([1.0, 0.0]))
