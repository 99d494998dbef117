"""The schedule of a whole chain as a picture: noise level over evaluations, every stage in its colour."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import BadInput
from ..core.files import write_atomically
from .chain import Denoising, ImageToImage, Inpaint
from .plan import StagePlan
from .terminal import colours
from .trace import PlannedStep, planned_steps

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ENDINGS = (".png", ".svg", ".pdf")
_GREY = "#777777"
_KEY = "● a step   ○ a further evaluation in it   – levels of its own that a stage leaves out"
_WIDTH, _HEIGHT = 10.0, 5.2  # inches
_ACROSS = 0.905  # of the width, that the axes take
_ROW = 0.5  # inches that a row of labels takes above them


@dataclass(frozen=True)
class _Run:
    """The steps of one stage, or of one repetition of it, and where they lie on the axis of evaluations."""

    plan: StagePlan
    steps: list[PlannedStep]
    start: int
    first: bool

    @property
    def end(self) -> int:
        return self.start + sum(len(step.evaluated) for step in self.steps)


def draw_plan(plans: Sequence[StagePlan], path: str | Path) -> Path:
    """Draw the noise level at every evaluation of a chain into a PNG, SVG or PDF file.

    A filled dot is a step's first evaluation, a hollow one a further one. What a strength or a stop leaves out of a
    stage's own levels is marked by grey dashes where the stage starts or ends.

    Raises:
        BadInput: another ending, no stage that denoises, or matplotlib is not installed.
        CannotWrite: see :func:`unrolled.core.files.write_atomically`.
    """
    path = Path(path)
    if path.suffix.lower() not in ENDINGS:
        raise BadInput(f"{path} is no name for a picture of a plan: use one that ends in {', '.join(ENDINGS)}.")
    if not any(plan.run for plan in plans):
        raise BadInput("There is nothing to draw: no stage of this chain denoises.")
    try:
        from matplotlib import rc_context
    except ImportError as error:
        raise BadInput('Pictures of plans need matplotlib, which is not here: pip install "unrolled[plot]".') from error
    file, ending = io.BytesIO(), path.suffix.lower()[1:]
    with rc_context({"svg.hashsalt": "unrolled", "svg.fonttype": "none", "font.size": 9}):
        # Without the date, so that the same plan gives the same file.
        dates: dict[str, Any] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
        figure_of(plans).savefig(file, format=ending, dpi=160, metadata=dates.get(ending))
    return write_atomically(path, file.getvalue())


def figure_of(plans: Sequence[StagePlan]) -> Figure:
    """The same as a matplotlib figure, to be changed or shown in a notebook."""
    from matplotlib.figure import Figure

    runs, colour = _runs(plans), colours(plans)
    levels = [level for run in runs for step in run.steps for level in (*step.evaluated, step.sigma_next) if level > 0]
    highest = max(plan.run.whole.sigmas[0] for plan in plans if plan.run)
    floor, total = min(levels) / 2, runs[-1].end
    labels = _labels(runs, total)
    above = _ROW * (1 + max(label.row for label in labels)) + 0.15
    figure = Figure(figsize=(_WIDTH, _HEIGHT + above))
    axes = figure.add_axes((0.075, 0.1, _ACROSS, 1 - 0.1 - above / (_HEIGHT + above)))
    for before, run in pairwise((None, *runs)):
        assert run is not None
        _draw_run(axes, run, colour[run.plan.stage.name], floor)
        if before is not None:
            _draw_join(axes, before, run, floor, total)
    for label in labels:
        _draw_label(axes, label, colour[label.run.plan.stage.name])
    _draw_plain_stages(axes, plans, runs)
    _dress(axes, floor, max(*levels, highest), total)
    figure.text(0.98, 0.02, _KEY, ha="right", fontsize=7.5, color=_GREY)
    return figure


def _runs(plans: Sequence[StagePlan]) -> list[_Run]:
    by_name, found, start = {plan.stage.name: plan for plan in plans}, list[_Run](), 0
    for (name, repetition), group in groupby(planned_steps(plans), key=lambda step: (step.stage, step.repetition)):
        found.append(_Run(by_name[name], list(group), start, not repetition))
        start = found[-1].end
    return found


def _draw_run(axes: Axes, run: _Run, colour: str, floor: float) -> None:
    """The curve of one run, its evaluations, and the levels of its own that it leaves out."""
    assert run.plan.run is not None
    levels = [(level, i == 0) for step in run.steps for i, level in enumerate(step.evaluated)]
    end = run.steps[-1].sigma_next
    x, y = list(range(run.start, run.end + 1)), [*(level for level, _ in levels), max(end, floor)]
    axes.axvspan(run.start, run.end, color=colour, alpha=0.07, linewidth=0)
    axes.plot(x[:-1], y[:-1], color=colour, linewidth=1.4, solid_capstyle="round")
    axes.plot(x[-2:], y[-2:], color=colour, linewidth=1.4, linestyle="-" if end else (0, (2, 2)))
    size = max(1.5, min(5.0, 250 / max(len(x), 1)))
    for first in (True, False):
        dots = [(at, level) for at, (level, is_first) in zip(x, levels, strict=False) if is_first is first]
        face = colour if first else "white"
        axes.plot(*zip(*dots, strict=True) if dots else ([], []), "o", markersize=size, color=colour, markerfacecolor=face)
    if not run.plan.left_noisy:
        axes.plot([run.end], [max(end, floor)], "v", markersize=6, color=colour, clip_on=False)
    whole, part = run.plan.run.whole.sigmas, run.plan.run.schedule.sigmas
    skipped = [sigma for sigma in whole if sigma > part[0]] if run.first else []
    left = [sigma for sigma in whole if 0 < sigma < part[-1]]
    for at, missing in ((run.start, skipped), (run.end, left)):
        axes.plot([at] * len(missing), missing, "_", markersize=7, color="#AAAAAA", zorder=1)


def _draw_join(axes: Axes, before: _Run, run: _Run, floor: float, total: int) -> None:
    """Where one run ends and another begins: noisy latents handed on, or noise added to clean ones."""
    x, start, stopped = run.start, run.steps[0].sigma, max(before.steps[-1].sigma_next, floor)
    wide = run.end - x > 0.2 * total
    if _goes_on(run.plan):
        axes.axvline(x, color=_GREY, linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
        words, place, way = f"handed on at sigma {start:.3g}", (x, start), (5, 5) if wide else (-6, -6)
    elif isinstance(run.plan.stage, ImageToImage | Inpaint) and run.plan.takes.startswith(("latents", "pixels")):
        arrow = {"arrowstyle": "->", "color": _GREY, "linewidth": 0.9, "shrinkA": 0, "shrinkB": 3}
        axes.annotate("", (x, start), (x, stopped), arrowprops=arrow)
        words, place, way = "noise added" if wide and run.first else "", (x, math.sqrt(start * stopped)), (5, 0)
    else:
        axes.axvline(x, color=_GREY, linewidth=0.8, zorder=0)
        return
    ha, va = "left" if way[0] > 0 else "right", "bottom" if way[1] >= 0 else "top"
    axes.annotate(words, place, way, textcoords="offset points", fontsize=7.5, color=_GREY, ha=ha, va=va)


@dataclass(frozen=True)
class _Label:
    """A stage's name and what it runs, above the curve: in a row, to the right of where it starts or to the left."""

    run: _Run
    name: str
    words: str
    row: int
    right: bool


def _labels(runs: Sequence[_Run], total: int) -> list[_Label]:
    """Placed so that none runs into another or off the picture."""
    ends, placed = list[list[tuple[float, float]]](), list[_Label]()
    for run in (run for run in runs if run.first):
        name, words = run.plan.stage.name, _words(run.plan)
        width, start = max(len(name) * 0.1, len(words) * 0.062) + 0.15, run.start / total * _ACROSS * _WIDTH
        right = start + width < (_ACROSS + 0.02) * _WIDTH
        low, high = (start, start + width) if right else (start - width, start)
        row = next((i for i, taken in enumerate(ends) if all(b < low or high < a for a, b in taken)), len(ends))
        ends[row:] = [[*(ends[row] if row < len(ends) else []), (low, high)], *ends[row + 1 :]]
        placed.append(_Label(run, name, words, row, right))
    return placed


def _words(plan: StagePlan) -> str:
    stage, run = plan.stage, plan.run
    assert run is not None
    assert isinstance(stage, Denoising)
    of = f" of {len(run.whole)}" if len(run.schedule) < len(run.whole) else ""
    by = isinstance(stage, ImageToImage | Inpaint) and not _goes_on(plan) and run.schedule.first and stage.strength
    words = f"{stage.model} · {run.schedule.origin} · {len(run.schedule)}{of} steps"
    return words + (f", strength {by:g}" if by else "") + (f", {plan.repeats} times" if plan.repeats > 1 else "")


def _goes_on(plan: StagePlan) -> bool:
    return isinstance(plan.stage, ImageToImage) and plan.stage.start != "strength"


def _draw_label(axes: Axes, label: _Label, colour: str) -> None:
    across, x, y = axes.get_xaxis_transform(), label.run.start, 1 + (0.12 + label.row * _ROW) / _HEIGHT
    axes.plot([x, x], [1, y + 0.3 / _HEIGHT], transform=across, color=colour, clip_on=False, zorder=1)
    lines = ((label.words, 0.0, 7.5, "normal", "#444444"), (label.name, 0.17, 10, "bold", colour))
    for text, up, size, weight, shade in lines:
        axes.annotate(
            text,
            (x, y + up / _HEIGHT),
            (5 if label.right else -5, 0),
            xycoords=across,
            textcoords="offset points",
            ha="left" if label.right else "right",
            fontsize=size,
            fontweight=weight,
            color=shade,
            annotation_clip=False,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0},  # what points to labels above passes behind
        )


def _draw_plain_stages(axes: Axes, plans: Sequence[StagePlan], runs: Sequence[_Run]) -> None:
    """Stages that do not denoise, named where they come."""
    x = 0
    for ran, group in groupby(plans, key=lambda plan: plan.run is not None):
        names = [plan.stage.name for plan in group]
        if ran:
            x = max(run.end for run in runs if run.plan.stage.name in names)
            continue
        axes.annotate(
            ", then ".join(names),
            (x, 0.98),
            (-8, 0),
            xycoords=axes.get_xaxis_transform(),
            textcoords="offset points",
            rotation=90,
            ha="right",
            va="top",
            fontsize=7.5,
            color=_GREY,
        )


def _dress(axes: Axes, floor: float, high: float, total: int) -> None:
    axes.set_yscale("log")
    axes.set_ylim(floor, high * 1.35)
    axes.set_xlim(-0.012 * total, total * 1.012)
    ticks = [10.0**n for n in range(-4, 8) if 1.4 * floor < 10.0**n <= high * 1.3]
    axes.set_yticks([floor, *ticks], ["0", *(f"{tick:g}" for tick in ticks)])
    axes.set_yticks([], minor=True)
    axes.grid(axis="y", color="#E5E5E5", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_ylabel("sigma, the noise level")
    axes.set_xlabel("evaluations of the UNet", loc="left")
