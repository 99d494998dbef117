"""RePaint beside diffusers' scheduler of that name, on the same numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers import RePaintScheduler
from diffusers.schedulers import scheduling_repaint
from torch import Tensor
from unrolled import Latents, LatentSpace, Noise, Prediction, Schedule
from unrolled.examples import repaint as example
from unrolled.examples.repaint import repaint
from unrolled.schedulers.config import read_scheduler

STEPS, JUMP, TIMES, SHAPE = 12, 3, 3, (2, 4, 5, 5)
# As many training steps as steps: with fewer, diffusers' undo_step goes over betas that lie elsewhere than what it undoes.
BETAS = {"num_train_timesteps": STEPS, "beta_start": 0.01, "beta_end": 0.4, "beta_schedule": "linear", "clip_sample": False}


@dataclass(frozen=True)
class SameNoise:
    """Draws one noise for the step and for the known part, as diffusers does."""

    seeds: tuple[int, ...]
    stream: str

    def __call__(self, shape: Sequence[int], purpose: str, step: int = 0, draw: int = 0, levels: Any = None) -> Tensor:
        return Noise((0, 1), self.stream)(shape, "up" if purpose == "up" else "both", step)


def network(x: Tensor, sigma: float) -> Tensor:
    """What the noise is estimated to be of latents of unit variance."""
    return torch.tanh(x.roll(1, -1) + 0.3 * sigma) + 0.5 * x


def denoiser(x: Tensor, sigma: float, timestep: float) -> Prediction:
    return Prediction(network(x / math.sqrt(1 + sigma**2), sigma), x, sigma)


@pytest.fixture
def known() -> tuple[Tensor, Tensor]:
    """Clean latents, and a mask that is 1 where they are painted anew."""
    generator = torch.Generator().manual_seed(5)
    return torch.randn(SHAPE, generator=generator), (torch.rand(1, 1, 5, 5, generator=generator) < 0.5).float()


def theirs(schedule: Schedule, start: Tensor, clean: Tensor, mask: Tensor, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """diffusers' RePaintPipeline's loop on its scheduler, with the same numbers drawn."""
    scheduler = RePaintScheduler(**BETAS)
    scheduler.set_timesteps(STEPS, jump_length=JUMP, jump_n_sample=TIMES)
    scheduler.eta = 1.0
    draws: Iterator[Tensor]
    monkeypatch.setattr(scheduling_repaint, "randn_tensor", lambda *_, **__: next(draws))
    x, last, times = start, STEPS, dict[int, int]()
    for t in scheduler.timesteps.tolist():
        if t < last:
            index = STEPS - 1 - t
            time = times.get(index, 0)
            times[index] = time + 1
            draws = iter([SameNoise((), f"time {time}")(SHAPE, "step", index)])
            x = scheduler.step(network(x, schedule.sigmas[index]), t, x, clean, 1 - mask).prev_sample
        else:  # one small step up; together JUMP of them add what ours adds at once
            index = STEPS - 1 - last
            first = index // JUMP * JUMP
            high, low = schedule.sigmas[first], schedule.sigmas[first + JUMP]
            part = (schedule.sigmas[index] ** 2 - schedule.sigmas[index + 1] ** 2) / (high**2 - low**2)
            draws = iter([math.sqrt(part) * SameNoise((), f"time {times[first]}")(SHAPE, "up", first)])
            x = scheduler.undo_step(x, last)
        last = t
    return x


def test_it_is_diffusers_repaint(known: tuple[Tensor, Tensor], space: LatentSpace, monkeypatch: pytest.MonkeyPatch) -> None:
    clean, mask = known
    monkeypatch.setattr(example, "Noise", SameNoise)
    schedule = read_scheduler({"_class_name": "DDPMScheduler", **BETAS}).schedule(STEPS)
    unit = torch.randn(SHAPE, generator=torch.Generator().manual_seed(6))
    start = Latents(unit * math.sqrt(1 + schedule.sigmas[0] ** 2), space, schedule.sigmas[0], (0, 1))
    ours = repaint(denoiser, start, schedule, Latents(clean, space, seeds=(0, 1)), mask, jump=JUMP, times=TIMES)
    expected = theirs(schedule, unit, clean, mask, monkeypatch)
    assert ours.is_clean
    assert (ours.x - expected).abs().max() < 1e-4 * expected.abs().max()


def test_the_known_part_is_the_given_one(known: tuple[Tensor, Tensor], space: LatentSpace) -> None:
    clean, mask = known
    schedule = Schedule.at([10.0, 3.0, 1.0, 0.3, 0.0])
    start = Latents(10 * torch.randn(SHAPE), space, 10.0, (0, 1))
    filled = repaint(denoiser, start, schedule, Latents(clean, space, seeds=(0, 1)), mask, jump=2, times=2)
    assert torch.equal(filled.x[:, :, mask[0, 0] == 0], clean[:, :, mask[0, 0] == 0])
    assert (filled.x - clean)[:, :, mask[0, 0] == 1].abs().min() > 0
