"""UnCLIP's and DDPM's trajectories, with the variance fixed and learned, against diffusers' step by step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor
from unrolled.core.errors import BadInput
from unrolled.core.latents import Latents, LatentSpace
from unrolled.core.loop import steps
from unrolled.core.noise import DiffusersNoise
from unrolled.core.prediction import Prediction
from unrolled.schedulers.config import read_scheduler

SHAPE = (2, 8, 4, 4)
TOLERANCE = 1e-4
LEARNED = {"variance_type": "learned_range"}


def network(x: Tensor, timestep: float, channels: int) -> Tensor:
    """Some smooth function of a scheduler's x; its further channels are a variance from -1 to 1."""
    return torch.cat([torch.tanh(3 * x.roll(1, 1) + timestep / 500), torch.cos(5 * x)], 1)[:, :channels]


def theirs(scheduler: Any, count: int, channels: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, found = torch.randn(SHAPE, generator=generator), list[Tensor]()
    scheduler.set_timesteps(count)
    for i, t in enumerate(scheduler.timesteps):
        following = {"prev_timestep": scheduler.timesteps[i + 1] if i + 1 < count else None}
        more = following if isinstance(scheduler, diffusers.UnCLIPScheduler) else {}
        x = scheduler.step(network(x, float(t), channels), t, x, generator=generator, **more).prev_sample
        found.append(x)
    return found


def ours(config: dict[str, Any], count: int, channels: int, space: LatentSpace, faithful: bool = False) -> list[Tensor]:
    scheduler, source = read_scheduler(config), DiffusersNoise.seeded(0)
    schedule = scheduler.schedule(count)

    def denoiser(x: Tensor, sigma: float, timestep: float) -> Prediction:
        out, *variance = torch.split(network(x / (1 + sigma**2) ** 0.5, timestep, channels), SHAPE[1], 1)
        return Prediction(out, x, sigma, scheduler.kind, variance=variance[0] if variance else None)

    start = Latents(source(SHAPE, "latents") * (1 + schedule.sigmas[0] ** 2) ** 0.5, space, schedule.sigmas[0])
    run = steps(denoiser, start, schedule, scheduler.solver(count, faithful=faithful), source)
    return [step.x / (1 + step.sigma_next**2) ** 0.5 for step in run]


def apart(mine: list[Tensor], reference: list[Tensor]) -> float:
    """The largest difference in any step, as a part of that step's largest number."""
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(mine, reference, strict=True))


@pytest.fixture
def wide() -> LatentSpace:
    return LatentSpace("none", SHAPE[1], 1, 1.0, "0" * 16)


@pytest.mark.parametrize("count", [2, 5, 10, 25, 50])
@pytest.mark.parametrize("kind", ["sample", "epsilon"])
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("variance", [{}, LEARNED])
def test_unclip(
    count: int, kind: str, clip: bool, variance: dict[str, Any], wide: LatentSpace, exact: Callable[[Any], Any]
) -> None:
    config = {"prediction_type": kind, "clip_sample": clip, "clip_sample_range": 0.5, **variance}
    channels = SHAPE[1] * (2 if variance else 1)
    reference = theirs(exact(diffusers.UnCLIPScheduler(**config)), count, channels)
    assert apart(ours({"_class_name": "UnCLIPScheduler", **config}, count, channels, wide), reference) < TOLERANCE


@pytest.mark.parametrize("count", [2, 25])
def test_unclips_last_step_in_float32_is_off(count: int, wide: LatentSpace) -> None:
    """1 - 0.9999588 holds three digits: x0 comes out multiplied by 0.9995 instead of by 1."""
    config = {"prediction_type": "sample"}
    scheduler = diffusers.UnCLIPScheduler(**config)
    mine = ours({"_class_name": "UnCLIPScheduler", **config}, count, SHAPE[1], wide)[-1]
    reference = theirs(scheduler, count, SHAPE[1])[-1]
    assert apart([mine], [reference]) == pytest.approx(5.3e-4, rel=0.1)
    factor = float(scheduler.betas[0] / (1 - scheduler.alphas_cumprod[0]))
    assert apart([mine * factor], [reference]) < TOLERANCE


def test_one_step_of_unclip_is_refused() -> None:
    """diffusers divides by zero."""
    with pytest.raises(ZeroDivisionError):
        diffusers.UnCLIPScheduler().set_timesteps(1)
    with pytest.raises(BadInput, match=r"^The steps of unclip begin and end with training's own: use 2 or more, not 1\.$"):
        read_scheduler({"_class_name": "UnCLIPScheduler"}).schedule(1)


@pytest.mark.parametrize("count", [1, 2, 5, 10, 25, 50])
@pytest.mark.parametrize("options", [{}, {"clip_sample": False, "beta_start": 0.00085, "beta_end": 0.012}])
def test_ddpm(count: int, options: dict[str, Any], wide: LatentSpace) -> None:
    reference = theirs(diffusers.DDPMScheduler(**options, **LEARNED), count, 2 * SHAPE[1])
    mine = ours({"_class_name": "DDPMScheduler", **options, **LEARNED}, count, 2 * SHAPE[1], wide)
    assert apart(mine, reference) < TOLERANCE


def test_ddpm_adds_no_noise_at_the_end(wide: LatentSpace) -> None:
    """diffusers does with a learned variance unless the last timestep is 0; all steps before are equal."""
    config = {"timestep_spacing": "trailing", **LEARNED}
    reference = theirs(diffusers.DDPMScheduler(**config), 10, 2 * SHAPE[1])
    mine = ours({"_class_name": "DDPMScheduler", **config}, 10, 2 * SHAPE[1], wide)
    assert apart(mine[:-1], reference[:-1]) < TOLERANCE
    assert apart(mine[-1:], reference[-1:]) == pytest.approx(0.417, rel=0.3)


def test_a_network_without_a_variance(wide: LatentSpace) -> None:
    with pytest.raises(
        BadInput, match=r"^This solver takes the variance from the network, but the network gives none: take"
    ):
        ours({"_class_name": "DDPMScheduler", **LEARNED}, 5, SHAPE[1], wide)
