import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from torch import Tensor
from unrolled.core.conditioning import Conditioning
from unrolled.core.denoiser import UNetDenoiser, conditioned
from unrolled.core.errors import BadInput
from unrolled.core.guidance import classifier_free, per_step, rescaled, within
from unrolled.core.loading import Model
from unrolled.core.prediction import Prediction
from unrolled.core.schedule import Schedule

SCHEDULE = Schedule((8.0, 4.0, 2.0, 1.0, 0.0), (900.0, 600.0, 300.0, 100.0))
X = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))


class Toy:
    """A network whose output depends on its conditioning; remembers its batch sizes."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, x: Tensor, sigma: float, timestep: float, conditioning: Conditioning, /) -> Prediction:
        self.batches.append(len(x))
        context = conditioning.expand(len(x)).context
        assert context is not None
        push = context.mean((1, 2)).view(-1, 1, 1, 1)
        return Prediction(torch.tanh(x * push) + push, x, sigma)


def text(value: float, batch: int = 1, tokens: int = 3) -> Conditioning:
    return Conditioning(context=torch.full((batch, tokens, 2), value))


COND, UNCOND = text(0.8), text(-0.3)


def test_the_formula() -> None:
    toy = Toy()
    guided = classifier_free(toy, COND, UNCOND, 7.5)(X, 2.0, 300.0)
    with_, without = toy(X, 2.0, 300.0, COND).out, toy(X, 2.0, 300.0, UNCOND).out
    torch.testing.assert_close(guided.out, without + 7.5 * (with_ - without))
    assert guided.cond is not None
    assert guided.uncond is not None
    torch.testing.assert_close(guided.cond, with_)
    torch.testing.assert_close(guided.uncond, without)
    assert guided.x is X
    torch.testing.assert_close(guided.x0, X - 2.0 * guided.out)


@pytest.mark.parametrize("scale", [1.0, 0.5, 0.0, -2.0])
def test_at_one_or_below_there_is_no_unconditional_pass(scale: float) -> None:
    toy = Toy()
    guided = classifier_free(toy, COND, UNCOND, scale)(X, 2.0, 300.0)
    assert toy.batches == [2]
    assert guided.uncond is None
    assert torch.equal(guided.out, conditioned(Toy(), COND)(X, 2.0, 300.0).out)


@pytest.mark.parametrize(("batched", "calls"), [(True, [4]), (False, [2, 2])])
def test_calls_per_evaluation(batched: bool, calls: list[int]) -> None:
    toy = Toy()
    classifier_free(toy, COND, UNCOND, 3.0, batched=batched)(X, 2.0, 300.0)
    assert toy.batches == calls


@pytest.mark.parametrize("cond", [text(0.8), text(0.8, batch=2)])
@pytest.mark.parametrize("uncond", [text(-0.3), text(-0.3, batch=2)])
def test_batched_equals_one_after_another(cond: Conditioning, uncond: Conditioning) -> None:
    one, two = (classifier_free(Toy(), cond, uncond, 3.0, batched=b)(X, 2.0, 300.0) for b in (True, False))
    torch.testing.assert_close(one.out, two.out)
    torch.testing.assert_close(one.x0, two.x0)


@pytest.mark.parametrize("batched", [True, False])
def test_prompts_of_different_lengths(tiny: Model, batched: bool) -> None:
    """Contexts of 154 and 77 tokens cannot be one batch; they go one after another."""
    network = UNetDenoiser(tiny.unet)
    context = torch.randn(1, 154, 32, generator=torch.Generator().manual_seed(1))
    long, short = Conditioning(context=context), Conditioning(context=context[:, :77])
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        guided = classifier_free(network, long, short, 4.0, batched=batched)(x, 3.0, 400.0)
        with_, without = network(x, 3.0, 400.0, long).out, network(x, 3.0, 400.0, short).out
    assert not torch.allclose(with_, without)
    torch.testing.assert_close(guided.out, without + 4.0 * (with_ - without))


def test_batched_equals_one_after_another_with_a_real_unet(tiny: Model) -> None:
    context = torch.randn(2, 77, 32, generator=torch.Generator().manual_seed(1))
    cond, uncond = Conditioning(context=context[:1]), Conditioning(context=context[1:])
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        one, two = (classifier_free(tiny.denoiser, cond, uncond, 7.5, batched=b)(x, 3.0, 400.0) for b in (True, False))
    torch.testing.assert_close(one.out, two.out, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("amount", [0.3, 0.7, 1.0])
def test_rescale_is_that_of_diffusers(amount: float) -> None:
    toy = Toy()
    plain, changed = (classifier_free(toy, COND, UNCOND, 7.5, rescale=r)(X, 2.0, 300.0) for r in (0.0, amount))
    assert plain.cond is not None
    theirs = rescale_noise_cfg(plain.out, plain.cond, guidance_rescale=amount)
    torch.testing.assert_close(changed.out, theirs)
    assert not torch.allclose(changed.out, plain.out)


def test_full_rescale_gives_the_conditional_deviation() -> None:
    torch.testing.assert_close(rescaled(X * 9, X, 1.0).std((1, 2, 3)), X.std((1, 2, 3)))


@pytest.mark.parametrize("amount", [-0.1, 1.1])
def test_rescale_out_of_range(amount: float) -> None:
    with pytest.raises(BadInput, match=rf"Guidance rescale goes from 0 \(off\) to 1, got {amount:g}\."):
        classifier_free(Toy(), COND, UNCOND, 7.5, rescale=amount)


@pytest.mark.parametrize(
    ("sigma", "scale"),
    # between two levels the scale of the step that is under way; at 0 the last one's
    [(9.0, 1.5), (8.0, 1.5), (5.0, 1.5), (4.0, 2.5), (3.0, 2.5), (2.0, 3.5), (1.0, 4.5), (0.5, 4.5), (0.0, 4.5)],
)
def test_a_scale_per_step(sigma: float, scale: float) -> None:
    assert per_step(SCHEDULE, [1.5, 2.5, 3.5, 4.5])(sigma) == scale


def test_scales_must_be_one_per_step() -> None:
    with pytest.raises(BadInput, match="3 guidance scales were given for a schedule of 4 steps: give one per step"):
        per_step(SCHEDULE, [1.0, 2.0, 3.0])


def test_an_interval_of_steps() -> None:
    toy = Toy()
    denoiser = classifier_free(toy, COND, UNCOND, within(SCHEDULE, 1, 3, 6.0))
    outs = [denoiser(X, sigma, 0.0) for sigma in SCHEDULE.sigmas[:-1]]
    assert toy.batches == [2, 4, 4, 2]
    assert torch.equal(outs[1].out, classifier_free(Toy(), COND, UNCOND, 6.0)(X, 4.0, 0.0).out)


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (2, 2), (3, 1), (0, 5)])
def test_an_interval_that_does_not_lie_within(start: int, stop: int) -> None:
    with pytest.raises(BadInput, match=f"Guidance from step {start} to {stop} does not lie within 4 steps"):
        within(SCHEDULE, start, stop, 6.0)
