from dataclasses import replace

import pytest
import torch
from unrolled.core.errors import BadInput
from unrolled.core.latents import Latents
from unrolled.core.loading import Model
from unrolled.core.noise import DiffusersNoise, Noise
from unrolled.core.schedule import Schedule
from unrolled.stages.noise import add_noise, noise, start_step, unit_noise

SCHEDULE = Schedule((8.0, 4.0, 0.0), (900.0, 500.0))


def test_noise_is_at_the_schedules_first_level(tiny: Model) -> None:
    latents = noise(tiny, SCHEDULE, 32, 48, seeds=(3, 4), stream="a")
    assert (latents.x.shape, latents.size) == ((2, 4, 4, 6), (32, 48))
    assert (latents.sigma, latents.seeds, latents.stream, latents.space) == (8.0, (3, 4), "a", tiny.space)
    assert torch.equal(latents.x, 8.0 * Noise((3, 4), "a")((2, 4, 4, 6), "latents"))


def test_variance_preserving_samplers_start_from_their_own_deviation(tiny: Model) -> None:
    own = noise(tiny, replace(SCHEDULE, start_std=10.0), 32, 32)
    assert torch.equal(own.x, 10.0 * Noise((0,))((1, 4, 4, 4), "latents"))
    assert own.sigma == 8.0


def test_native_size_by_default(tiny: Model) -> None:
    assert noise(tiny, SCHEDULE).size == (64, 64)
    assert noise(tiny, SCHEDULE, height=32).size == (32, 64)


def test_another_source(tiny: Model) -> None:
    latents = noise(tiny, SCHEDULE, 32, 32, seeds=(9,), source=DiffusersNoise.seeded(9))
    assert torch.equal(latents.x, 8.0 * torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(9)))


@pytest.mark.parametrize(
    ("height", "width", "nearest"),
    [(427, 640, "sizes are 640x424 and 640x432"), (64, 100, "sizes are 96x64 and 104x64"), (4, 4, "size is 8x8")],
)
def test_a_size_that_does_not_fit(tiny: Model, height: int, width: int, nearest: str) -> None:
    message = f"The size asked for is {width}x{height}, but sides must be multiples of 8: the nearest {nearest}."
    with pytest.raises(BadInput) as caught:
        noise(tiny, SCHEDULE, height, width)
    assert str(caught.value) == message


def test_noise_added_is_that_of_the_seeds(tiny: Model) -> None:
    clean = Latents(torch.ones(2, 4, 4, 4), tiny.space, seeds=(1, 2))
    noisy = add_noise(clean, SCHEDULE[1:])
    assert noisy.sigma == 4.0
    torch.testing.assert_close(noisy.x, clean.x + 4.0 * noise(tiny, SCHEDULE, 32, 32, seeds=(1, 2)).x / 8.0)
    assert torch.equal(add_noise(clean, SCHEDULE, unit_noise(clean)).x, add_noise(clean, SCHEDULE).x)


def test_noise_is_not_added_to_noise(tiny: Model) -> None:
    with pytest.raises(BadInput, match=r"Cannot add noise to latents that still hold noise at sigma 4 "):
        add_noise(Latents(torch.ones(1, 4, 4, 4), tiny.space, 4.0, (1,)), SCHEDULE)


@pytest.mark.parametrize(
    ("steps", "strength", "first"),
    [(50, 1.0, 0), (50, 0.8, 10), (50, 0.58, 21), (50, 0.29, 36), (10, 0.1, 9), (10, 0.19, 9), (3, 0.34, 2), (1, 1.0, 0)],
)
def test_start_step(steps: int, strength: float, first: int) -> None:
    assert start_step(steps, strength) == first


def test_faithful_loses_a_step_to_rounding() -> None:
    assert start_step(50, 0.58, faithful=True) == 22 == start_step(50, 0.58) + 1


@pytest.mark.parametrize("strength", [0.0, -0.1, 1.01, float("nan")])
def test_strength_out_of_range(strength: float) -> None:
    with pytest.raises(BadInput, match=rf"Strength must be more than 0 and at most 1, got {strength:g}\."):
        start_step(50, strength)


@pytest.mark.parametrize(
    ("steps", "strength", "least"),
    [
        (10, 0.05, r"use at least 0\.1, or 20 steps"),
        (3, 0.3, r"use at least 0\.334, or 4 steps"),
        (1, 0.99, "at least 1, or 2"),
    ],
)
def test_strength_that_leaves_no_step(steps: int, strength: float, least: str) -> None:
    with pytest.raises(BadInput, match=rf"Strength {strength:g} of {steps} steps leaves no step to run: .*{least}"):
        start_step(steps, strength)


@pytest.mark.parametrize("steps", [1, 3, 6, 7, 30])
def test_the_strength_offered_works(steps: int) -> None:
    with pytest.raises(BadInput) as caught:
        start_step(steps, 0.01)
    assert start_step(steps, float(str(caught.value).split("at least ")[1].split(",")[0])) == steps - 1
