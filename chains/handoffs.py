"""Where a stage goes on from noisy latents: gaps and overlaps, what is lost, what is done twice."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from ..core.latents import Latents
from ..core.schedule import Schedule, timestep_of
from .chain import Chain, Denoising, ImageToImage
from .plan import StagePlan
from .runs import Run

Severity = Literal["error", "warning", "note"]
Said = tuple[Severity, str]

_OF_THE_RUN = ("steps", "solver", "scheduler", "spacing", "sigmas", "timesteps", "eta", "faithful")


@dataclass(frozen=True)
class Part:
    """A stage that denoises and what it starts from: what a check looks at.

    Args:
        given: the stage as it was written; ``stage`` has its system's usual values filled in.
        before: the plan of the stage whose output it takes.
        held: the latents file it starts from.
    """

    chain: Chain
    plan: StagePlan
    run: Run
    given: Denoising
    stage: Denoising
    before: StagePlan | None
    held: Latents | None

    @property
    def schedule(self) -> Schedule:
        """The levels it runs, of ``run.whole``."""
        return self.run.schedule

    @property
    def goes_on(self) -> bool:
        """Whether it starts from noisy latents."""
        return isinstance(self.stage, ImageToImage) and self.stage.start != "strength"

    @property
    def highest(self) -> float:
        """The highest noise level that its model was trained on."""
        return max(self.run.whole.training_sigmas, default=math.inf)

    @property
    def giver(self) -> str:
        """Where its latents come from, in words."""
        return repr(self.before.stage.name) if self.before else str(getattr(self.stage, "latents", ""))


def level(part: Part) -> Iterator[Said]:
    """Gaps and overlaps: how the level it is handed lies to its own."""
    if not part.goes_on:
        return
    handed = part.held.sigma if part.held else part.before.end if part.before else 0.0
    starts, own = part.schedule.sigmas[0], part.run.whole.sigmas
    if abs(handed - starts) > 1e-4 * starts:
        yield (
            "error",
            f"it starts at sigma {starts:.6g} but is handed latents at {handed:.6g}, which the loop will refuse: "
            'say start = "handoff".',
        )
    elif starts > part.highest * (1 + 1e-4):
        yield (
            "warning",
            f"it is handed latents at sigma {starts:.4g}, above {part.highest:.4g}, the highest level its model was trained "
            f"on, whose timestep it will be told: let {part.giver} stop later.",
        )
    elif starts > own[0]:
        yield (
            "note",
            f"it starts at sigma {starts:.4g}, above its own first level, {own[0]:.4g}: one more step brings it there.",
        )
    elif starts not in own:
        high, low = min(sigma for sigma in own if sigma > starts), part.schedule.sigmas[1]
        left = f", {math.log(starts / low) / math.log(high / low):.0%} of it" if low else ""
        yield (
            "note",
            f"it starts at sigma {starts:.4g} (timestep {part.schedule.timesteps[0]:.4g}), between its own levels "
            f"{high:.4g} and {low:.4g}: its first step is what is left of that one{left}.",
        )
    yield from _trained_otherwise(part, starts)


def _trained_otherwise(part: Part, sigma: float) -> Iterator[Said]:
    other = part.before.run.whole.training_sigmas if part.before and part.before.run else ()
    mine = part.run.whole.training_sigmas
    theirs, ours = timestep_of(sigma, other), timestep_of(sigma, mine)
    if other and mine and abs(theirs - ours) > 0.5:
        yield (
            "note",
            f"it was trained on other noise levels than {part.giver}: sigma {sigma:.4g} is timestep {ours:.4g} here and "
            f"{theirs:.4g} there; the level is what is handed on.",
        )


def history(part: Part) -> Iterator[Said]:
    """What a solver remembers and the next one is not told."""
    if not part.goes_on or part.plan.continues:
        return
    before = part.before
    points = part.held.history if part.held else before.trace[-1].history if before and before.trace else ()
    if not points:
        return
    count = "the 1 point" if len(points) == 1 else f"the {len(points)} points"
    starts = f"{part.stage.solver} starts afresh, its first steps are of a lower order: {count} remembered"
    if before is None or not isinstance(before.stage, Denoising):
        yield (
            "warning",
            f"{starts} in {part.giver} cannot be used, as a chain cannot tell what run it is of; "
            "go on in Python, with steps(denoiser, Latents.load(...), schedule, solver).",
        )
    elif (before.stage.model, before.stage.borrowed) != (part.stage.model, part.stage.borrowed):
        yield "note", f"{starts} by {before.stage.solver} in {part.giver} cannot be used by another model."
    else:
        pair = before.stage, part.stage
        differ = [key for key in _OF_THE_RUN if getattr(pair[0], key, None) != getattr(pair[1], key, None)]
        yield (
            "warning",
            f"{starts} by {before.stage.solver} in {part.giver} cannot be used in another run; give both stages the same "
            f"{' and '.join(differ) or 'schedule and solver'} to make them one.",
        )


def nearly_twice(part: Part) -> Iterator[Said]:
    """Steps so short that nearly the same level is evaluated twice."""
    levels, joined = list(part.schedule.sigmas), False
    if part.goes_on and part.before is not None and part.before.run is not None:
        levels, joined = [part.before.run.schedule.sigmas[-2], *levels], True
    lengths = [math.log(high / low) if low else math.inf for high, low in pairwise(levels)]
    for i, length in enumerate(lengths[joined:], start=joined):
        neighbours = [other for other in (*lengths[max(i - 1, 0) : i], *lengths[i + 1 : i + 2]) if other < math.inf]
        if neighbours and length < 0.05 * min(neighbours):
            where = f" where {part.giver} stops" if joined and i == 1 else ""
            share = f"{100 * length / min(neighbours):.2g}%"
            digits = 4 if f"{levels[i]:.4g}" != f"{levels[i + 1]:.4g}" else 8
            yield (
                "warning",
                f"it evaluates nearly the same level twice{where}: its step from sigma {levels[i]:.{digits}g} to "
                f"{levels[i + 1]:.{digits}g} is {share} as long as the shorter one beside it; make the two levels one.",
            )


def half_steps(part: Part) -> Iterator[Said]:
    """That a split of a run of second order is not diffusers', even where its faults are asked for."""
    before = part.before
    if not (part.goes_on and before and before.trace and isinstance(before.stage, Denoising)):
        return
    calls = len(before.trace[-1].predictions)
    if calls > 1 and (part.stage.faithful or before.stage.faithful):
        yield (
            "note",
            f"faithful does not repeat diffusers' fault at this cut, where it runs the last step of {before.stage.solver} "
            f"in {part.giver} once too often: the {calls} evaluations of a step stay together here (docs/departures.md).",
        )
