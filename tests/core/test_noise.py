import math

import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor
from unrolled.core.errors import BadInput
from unrolled.core.noise import Brownian, DiffusersNoise, Noise

SHAPE = (4, 8, 8)


def test_an_image_does_not_change_with_the_batch() -> None:
    together = Noise((3, 1, 4))((3, *SHAPE), "latents")
    for i, seed in enumerate((3, 1, 4)):
        assert torch.equal(Noise((seed,))((1, *SHAPE), "latents")[0], together[i])


def test_an_image_does_not_change_with_earlier_draws() -> None:
    noise = Noise((5,))
    once = noise((1, *SHAPE), "step", 3, 1)
    torch.randn(100)
    noise((1, *SHAPE), "posterior")
    noise((1, *SHAPE), "step", 2)
    assert torch.equal(noise((1, *SHAPE), "step", 3, 1), once)


def test_drawing_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    wanted = torch.randn(3)
    torch.manual_seed(0)
    Noise((5,))((1, *SHAPE), "latents")
    assert torch.equal(torch.randn(3), wanted)


def test_every_place_has_its_own_numbers() -> None:
    places = [("latents", 0, 0), ("step", 0, 0), ("step", 1, 0), ("step", 0, 1), ("step", 10, 0), ("posterior", 0, 0)]
    draws = [Noise((seed,), stream)((1, *SHAPE), *p) for seed in (0, 1, -1) for stream in ("", "a") for p in places]
    for i, a in enumerate(draws):
        assert all((a - b).abs().max() > 0.1 for b in draws[:i])


def test_it_is_unit_normal_float32_on_the_cpu() -> None:
    draw = Noise((0,))((1, 4, 128, 128), "latents")
    assert draw.dtype == torch.float32
    assert draw.device.type == "cpu"
    assert abs(float(draw.mean())) < 0.02
    assert abs(float(draw.std()) - 1) < 0.02


@pytest.mark.parametrize(("seeds", "images"), [((), 1), ((1, 2), 3), ((1, 2), 1)])
def test_one_seed_per_image(seeds: tuple[int, ...], images: int) -> None:
    with pytest.raises(
        BadInput, match=f"Noise for {images} images was asked of {len(seeds)} seeds: give one seed per image"
    ):
        Noise(seeds)((images, *SHAPE), "latents")


@pytest.mark.parametrize("seeds", [(11,), (11, 12, 13)])
def test_diffusers_noise_draws_in_diffusers_order(seeds: tuple[int, ...]) -> None:
    ours = DiffusersNoise.seeded(*seeds)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    theirs = generators[0] if len(seeds) == 1 else generators
    for purpose in ("latents", "step", "step"):
        shape = (len(seeds), *SHAPE)
        assert torch.equal(ours(shape, purpose), randn_tensor(shape, generator=theirs))


def test_diffusers_noise_takes_one_generator_for_a_batch() -> None:
    ours = DiffusersNoise(torch.Generator().manual_seed(3))((2, *SHAPE), "latents")
    assert torch.equal(ours, randn_tensor((2, *SHAPE), generator=torch.Generator().manual_seed(3)))


def test_a_brownian_path_adds_up_and_refining_it_changes_nothing() -> None:
    path, shape = Brownian((5,)), (1, 4, 16, 16)

    def increment(high: float, low: float) -> torch.Tensor:
        return path(shape, "step", levels=(high, low)) * math.sqrt(high - low)

    parts = increment(3.0, 1.2) + increment(1.2, 0.7) + increment(0.7, 0.1)
    assert torch.allclose(increment(3.0, 0.1), parts, atol=1e-5)


@pytest.mark.parametrize(("high", "low"), [(4096.0, 700.0), (14.6, 10.0), (1.0, 0.5), (0.0301, 0.03), (0.5, 0.0)])
def test_its_increments_are_unit_normal_whatever_the_levels(high: float, low: float) -> None:
    draw = Brownian((5, 6))((2, 4, 64, 64), "step", levels=(high, low))
    assert draw.dtype == torch.float32
    assert abs(float(draw.mean())) < 0.02
    assert abs(float(draw.std()) - 1) < 0.02


def test_increments_over_levels_that_do_not_overlap_are_independent() -> None:
    path, shape = Brownian((5,)), (1, 4, 64, 64)
    one, other = (path(shape, "step", levels=levels) for levels in ((1.0, 0.5), (0.5, 0.2)))
    assert abs(float((one * other).mean())) < 0.03


def test_a_path_belongs_to_a_seed_and_a_stream_and_only_steps_down_follow_it() -> None:
    shape, levels = (4, 8, 8), (1.0, 0.5)
    together = Brownian((3, 1))((2, *shape), "step", levels=levels)
    assert torch.equal(Brownian((1,))((1, *shape), "step", levels=levels)[0], together[1])
    assert not torch.equal(Brownian((1,), "other")((1, *shape), "step", levels=levels)[0], together[1])
    assert torch.equal(Brownian((1,))((1, *shape), "latents"), Noise((1,))((1, *shape), "latents"))
    up = Brownian((1,))((1, *shape), "step", 3, 1, levels=(0.5, 1.0))
    assert torch.equal(up, Noise((1,))((1, *shape), "step", 3, 1))
    assert not torch.equal(up[0], together[1])


def test_what_a_path_remembers_changes_nothing() -> None:
    path, shape = Brownian((5,)), (1, 4, 8, 8)
    pairs = [(8.0, 3.0), (3.0, 1.0), (1.0, 0.2), (0.2, 0.05), (8.0, 3.0)]
    for levels in pairs:
        assert torch.equal(path(shape, "step", levels=levels), Brownian((5,))(shape, "step", levels=levels))
    assert len(path._known) <= 4
    with pytest.raises(BadInput, match="Noise for 2 images was asked of 1 seeds"):
        path((2, 4, 8, 8), "step", levels=(8.0, 3.0))
