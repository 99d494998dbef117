"""Where a run starts: pure noise, or a picture's latents with noise added."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from ..core.errors import BadInput
from ..core.latents import Latents
from ..core.loading import Model
from ..core.noise import Noise, NoiseSource
from ..core.schedule import Schedule
from .pictures import require_size


def noise(
    model: Model,
    schedule: Schedule,
    height: int | None = None,
    width: int | None = None,
    seeds: Sequence[int] = (0,),
    *,
    stream: str = "",
    source: NoiseSource | None = None,
) -> Latents:
    """Pure noise at the schedule's first level, one image per seed.

    Args:
        height, width: in pixels, multiples of ``model.cell``; by default the model's native size.
        stream: another stream of the same seeds, for a further stage.
        source: where the numbers come from instead of the seeds.

    Raises:
        BadInput: the size does not fit; the nearest ones are named.
    """
    space = model.space
    height, width = height or model.native_size, width or model.native_size
    require_size((width, height), max(model.cell, space.downscale), "The size asked for")
    source = source or Noise(tuple(seeds), stream)
    unit = source((len(seeds), space.channels, height // space.downscale, width // space.downscale), "latents")
    std = schedule.start_std if schedule.start_std is not None else schedule.sigmas[0]
    return Latents(unit.to(model.device) * std, space, schedule.sigmas[0], tuple(seeds), stream, end=schedule.finished_at)


def unit_noise(latents: Latents, source: NoiseSource | None = None) -> Tensor:
    """The noise these latents start from, of unit variance: the same each time for the same seeds."""
    source = source or Noise(latents.seeds, latents.stream)
    return source(latents.x.shape, "latents").to(latents.x)


def add_noise(latents: Latents, schedule: Schedule, unit: Tensor | None = None) -> Latents:
    """Clean latents taken to the schedule's first level: ``x0 + sigma * unit``."""
    latents.require_clean("add noise to")
    unit = unit_noise(latents) if unit is None else unit
    sigma = schedule.sigmas[0]
    return replace(latents, x=latents.clean + sigma * unit, sigma=sigma, history=(), end=schedule.finished_at)


def start_step(steps: int, strength: float, *, faithful: bool = False) -> int:
    """The first of ``steps`` steps that is run at ``strength``: the last ``floor(steps * strength)`` are.

    Args:
        strength: more than 0 (nothing changes) to 1 (everything).
        faithful: let float rounding lose a step as diffusers does (50 steps at 0.58 run 28, not 29).

    Raises:
        BadInput: strength is out of range or leaves no step.
    """
    if not 0.0 < strength <= 1.0:
        raise BadInput(f"Strength must be more than 0 and at most 1, got {strength:g}.")
    run = int(steps * strength) if faithful else math.floor(steps * strength + 1e-6)
    if run < 1:
        least = math.ceil(1000 / steps) / 1000
        raise BadInput(
            f"Strength {strength:g} of {steps} steps leaves no step to run: use at least {least:g}, "
            f"or {math.ceil(1 / strength)} steps."
        )
    return steps - run
