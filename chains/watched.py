"""Looks at the steps of a stage's run while a chain runs, and judges them beside what is expected at their noise levels.

The bounds were measured as those of :mod:`.checkups`, in 44 stages of healthy runs: every system, several prompts, 12 and
20 steps, each system's usual guidance. What a guidance scale of 30 gives on SD's miniature, in 12 steps, is beside some.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..core.errors import NonFinite
from ..core.loop import Step
from ..core.model import Model
from ..core.prediction import Kind, preconditioning
from ..stages.decode import decode_tensor
from .checkups import INF, Bounds, Check, holds, relative, within

SPREAD = Bounds(0.4, 0.5, 2.6, 3.2)
"""Standard deviation of x over the expected, worst step: 0.74 to 2.28; absurd guidance 4.7."""
BEYOND = 1.5
RANGE = Bounds(-INF, -INF, 0.06, 0.15)
"""Part of the last x0 beyond 1.5 times the largest number of a known picture's latents: 0 to 0.042; 0.22."""
CLIPPED = 1.25
SATURATED = Bounds(-INF, -INF, 0.07, 0.15)
"""Part of the picture more than a quarter beyond white or black, where good ones hardly go: 0 to 0.052; 0.088."""
GIVEN = Bounds(0.5, 0.7, 1.4, 2.0)
"""Standard deviation of what the UNet is given first over the expected: 0.99 to 1.13."""
LARGEST = Bounds(-INF, -INF, 100.0, 65504.0)
"""Largest number the UNet is given: 3.5 to 10.1; above 65504 float16 ends."""
MOVES = Bounds(1e-4, 1e-3, INF, INF)
"""Distance of the conditional from the unconditional output over their size, farthest step: 0.050 to 0.36."""


@dataclass(frozen=True)
class Seen:
    """One step in numbers.

    Args:
        spread: standard deviation of x over the expected, ``sqrt(sigma^2 + data^2)``.
        x0_std: standard deviation of the estimated x0.
        beyond: part of x0 that is far beyond a known picture's latents.
        apart: distance of the conditional from the unconditional output over their size; None without guidance.
    """

    step: int
    sigma: float
    spread: float
    x0_std: float
    beyond: float
    apart: float | None

    @classmethod
    def of(cls, step: Step, known: Tensor) -> Seen:
        """A step, beside a known picture's latents, whose standard deviation is taken for the data's."""
        at, x0, expected = step.prediction, step.x0, math.hypot(step.sigma, float(known.std()))
        apart = None if at.cond is None or at.uncond is None else relative(at.cond - at.uncond, at.cond, at.uncond)
        beyond = float((x0.abs() > BEYOND * known.abs().max()).float().mean())
        return cls(step.index, step.sigma, float(step.before.std()) / expected, float(x0.std()), beyond, apart)


@dataclass
class Watched:
    """A run under watch.

    Args:
        known: latents of a known picture, if its model could make some.
        given: standard deviation and largest number of the latents in each call of the UNet.
    """

    known: Tensor | None
    seen: list[Seen] = field(default_factory=list)
    given: list[tuple[float, float]] = field(default_factory=list)
    last: Step | None = None

    def see(self, step: Step) -> None:
        """For the loop's hooks."""
        self.last = step
        if self.known is not None:
            self.seen.append(Seen.of(step, self.known))

    @contextmanager
    def on(self, model: Model) -> Iterator[None]:
        """See what the UNet is given, while it lasts."""

        def look(_: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
            x = arguments[0][:, : model.space.channels].float()
            self.given.append((float(x.std()), float(x.abs().max())))

        handle = model.unet.register_forward_pre_hook(look)
        try:
            yield
        finally:
            handle.remove()

    @property
    def ended(self) -> Step | None:
        """The last step, if the run came to its end and left no noise."""
        return self.last if self.last is not None and self.last.latents.is_clean else None


def run_checks(watched: Watched, kind: Kind, *, differ: bool) -> Iterator[Check]:
    """The steps of a run and what its network was given.

    Args:
        differ: whether conditional and unconditional output can differ at all.
    """
    seen, known = watched.seen, watched.known
    if not seen or known is None:
        return
    worst = max(seen, key=lambda step: abs(math.log(max(step.spread, 1e-9))))
    yield within(f"std of x over the expected, worst step ({worst.step + 1})", worst.spread, SPREAD)
    apart = [step.apart for step in seen if step.apart is not None]
    if apart and differ:
        yield within("distance of conditional from unconditional output", max(apart), MOVES)
    if watched.given:
        first, data = seen[0], preconditioning(kind).sigma_data
        expected = math.hypot(first.sigma, float(known.std())) / math.hypot(first.sigma, data)
        yield within("std of what the UNet is given over the expected", watched.given[0][0] / expected, GIVEN)
        yield within("largest number the UNet is given", max(most for _, most in watched.given), LARGEST)
    if watched.ended is not None:
        dtype = watched.ended.x.dtype
        yield holds("precision of x", dtype.itemsize >= 4, str(dtype).removeprefix("torch."), "float32")
        yield within("part of the last x0 beyond what the VAE knows", seen[-1].beyond, RANGE)


def picture_checks(model: Model, ended: Step, tiled: bool | None) -> Iterator[Check]:
    """What the VAE makes of a run's end."""
    pieces = list[None]()
    handle = model.vae.decoder.register_forward_pre_hook(lambda *_: pieces.append(None))
    try:
        pixels = decode_tensor(model, ended.latents, tiled=tiled)
    except NonFinite as error:
        yield Check("decoded picture", str(error), "", "wrong")
        return
    finally:
        handle.remove()
    yield within("part of the picture far beyond white and black", float((pixels.abs() > CLIPPED).float().mean()), SATURATED)
    tiles = len(pieces) // len(pixels)
    yield Check("decoded in", f"{tiles} tiles" if tiles > 1 else "one piece", "either", "ok")
