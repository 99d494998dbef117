"""Which options of a stage change nothing.

Asked of no list of rules but of the run itself: the stage's own schedule, solver and guidance are run on a small made-up
network, with an option and without. What gives the same numbers has no effect.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor

from ..core.conditioning import Conditioning
from ..core.errors import UnrolledError
from ..core.guidance import classifier_free
from ..core.latents import Latents
from ..core.loop import denoise
from ..core.prediction import Prediction
from ..core.source import System
from .chain import Denoising
from .defaults import filled
from .runs import Run, guidance_scale, plan_run
from .trace import PIXEL

_KEYS = (
    *("steps", "spacing", "sigmas", "timesteps", "eta", "stop", "faithful"),
    *("guidance_scale", "guidance_interval", "guidance_rescale"),
    *("negative_prompt", "negative_prompt_2", "negative_size"),
)
"""What a run on any network depends on, beside the scheduler's options."""

_SIZES = torch.logspace(-3.0, 1.6, 24, dtype=torch.float64).reshape(1, 1, 4, 6)
"""How large the made-up latents and outputs are: some within any limit that an option clips at, some beyond."""


@dataclass(frozen=True)
class Setup:
    """A stage and what decides what it runs.

    Args:
        stage: with its system's usual values filled in.
        scheduler: the checkpoint's scheduler config.
        handed: the noise level it is handed, if it goes on from noisy latents.
    """

    stage: Denoising
    scheduler: Mapping[str, Any]
    system: System
    handed: float | None = None

    def options(self) -> list[str]:
        """What it was given beside what holds anyway: ``eta``, ``scheduler.use_karras_sigmas``, …"""
        given = (key for key in _KEYS if getattr(self.stage, key) != getattr(self.without(key).stage, key))
        return [*given, *(f"scheduler.{key}" for key in self.stage.scheduler)]

    def without(self, option: str) -> Setup:
        """The same had the option not been given."""
        key, _, part = option.partition(".")
        if key == "checkpoint":
            return replace(self, scheduler={name: value for name, value in self.scheduler.items() if name != part})
        others = {name: value for name, value in self.stage.scheduler.items() if name != part}
        default = others if part else type(self.stage).model_fields[key].default
        return replace(self, stage=filled(self.stage.model_copy(update={key: default}), self.system))

    def value(self, option: str) -> object:
        """What holds for an option, given or not."""
        key, _, part = option.partition(".")
        return getattr(self.run().config, part) if part else getattr(self.stage, key)

    def run(self) -> Run:
        """What it will run."""
        return plan_run(self.stage, self.scheduler, self.handed)

    def outcome(self) -> Tensor | None:
        """What its run makes of a made-up start on a made-up network; None if it cannot be run."""
        try:
            return _outcome(self.stage, self.run(), timed=self.system != "x2")  # which goes by the noise level
        except (UnrolledError, ArithmeticError, ValueError):
            return None


def idle(setup: Setup) -> Iterator[tuple[str, str | None]]:
    """The options that change nothing, and for each the other one that keeps it from doing so, if it is one.

    An option that says what holds anyway is not meant: it may be said.
    """
    full, alone = setup.outcome(), dict[str, Tensor | None]()
    for option in setup.options():
        less = setup.without(option)
        if _same(full, less.outcome()) and setup.value(option) != less.value(option):
            yield option, _beside(setup, option, alone)


def _beside(setup: Setup, option: str, alone: dict[str, Tensor | None]) -> str | None:
    """Another without which ``option`` would have an effect, the stage's or the checkpoint's own.

    Args:
        alone: the outcome without each other, to be filled.
    """
    own = (f"checkpoint.{key}" for key in setup.scheduler if not key.startswith("_"))
    for other in (*setup.options(), *own):
        less = setup.without(other)
        if other not in alone:
            alone[other] = less.outcome()
        if other != option and alone[other] is not None and not _same(alone[other], less.without(option).outcome()):
            return other
    return None


def shown(option: str, value: object) -> str:
    """An option as a chain file would have it, shortened."""
    text = _toml(value)
    return f"{option} = {text if len(text) <= 48 else f'{text[:44]} …{text[-1]}'}"


def _toml(value: object) -> str:
    if isinstance(value, BaseModel):
        value = value.model_dump(exclude_none=True)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, Mapping):
        return f"{{ {', '.join(f'{key} = {_toml(held)}' for key, held in value.items())} }}"
    return json.dumps(value, default=str, ensure_ascii=False)


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is not None and other is not None and torch.allclose(one, other, rtol=1e-12, atol=0.0, equal_nan=True)


def _outcome(stage: Denoising, run: Run, timed: bool) -> Tensor:
    """Depends on every noise level, timestep (if ``timed``), guidance scale, draw and coefficient of the run, in float64."""

    def network(x: Tensor, sigma: float, timestep: float, conditioning: Conditioning) -> Prediction:
        assert conditioning.pooled is not None
        seen = 1.7 * x / math.sqrt(1.0 + sigma**2) + 0.01 * timestep * timed + conditioning.pooled[:, :, None, None]
        return Prediction(_SIZES * torch.sin(seen), x, sigma, run.config.kind, variance=torch.cos(seen))

    scale = guidance_scale(stage, run.whole)
    negative = _number(stage.negative_prompt, stage.negative_prompt_2, stage.negative_size)
    denoiser = classifier_free(network, _number(), negative, scale, rescale=stage.guidance_rescale, batched=False)
    x = _SIZES * torch.cos(torch.arange(24.0).reshape(_SIZES.shape)) * run.schedule.sigmas[0]
    return denoise(denoiser, Latents(x, PIXEL, run.schedule.sigmas[0], seeds=(0,)), run.schedule, run.solver).x


def _number(*told: object) -> Conditioning:
    """A conditioning that is another for every other thing told."""
    return Conditioning(pooled=torch.tensor([[zlib.crc32(repr(told).encode()) / 2**32]], dtype=torch.float64))
