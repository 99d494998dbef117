"""A plan as it is shown in a terminal: a table of the stages, their noise levels as a curve, a table of the steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby

from rich import box
from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ..core.memory import show_bytes
from .chain import Denoising
from .changes import lines as of_changes
from .checks import Finding
from .companions import lines
from .plan import StagePlan
from .runs import Run
from .trace import PlannedStep, planned_steps

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")
"""Of the stages that denoise, in turn: Okabe & Ito's, which the colour-blind tell apart."""

_BLOCKS = " ▁▂▃▄▅▆▇█"
_MARGIN = 7  # of the curve, for its axis
_WIDEST = 6  # columns for one evaluation
_SHOWN = 5  # steps of a long stage, at each end
_MODES = {"resident": "resident", "model": "part by part", "layer": "layer by layer"}
_STYLES = {"error": "bold red", "warning": "bold yellow", "note": "dim"}


def colours(plans: Sequence[StagePlan]) -> dict[str, str]:
    """A colour for every stage that denoises."""
    names = [plan.stage.name for plan in plans if plan.run is not None]
    return {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}


def stage_table(plans: Sequence[StagePlan]) -> Table:
    """One row for each stage."""
    table, colour = Table(box=box.SIMPLE_HEAD, padding=(0, 2, 0, 0), pad_edge=False), colours(plans)
    table.add_column("stage", overflow="fold", min_width=14)
    for column in ("model", "steps", "makes"):
        table.add_column(column, no_wrap=True, overflow="fold")
    for plan in plans:
        name = Text.assemble(("● " if plan.run else "  ", colour.get(plan.stage.name, "")), (plan.stage.name, "bold"))
        makes = f"{plan.size[0]}x{plan.size[1]}"
        memory = f"{show_bytes(plan.memory)} {_MODES[plan.mode]}" if plan.memory and plan.mode else ""
        cells = [Text(""), Text("")] if plan.run is None else [_two(*pair) for pair in _runs_as(plan, plan.run)]
        beside = (*of_changes(plan.stage), *lines(plan.stage)) if isinstance(plan.stage, Denoising) else ()
        takes = [plan.takes, *beside]
        table.add_row(Group(name, Padding(Text("\n".join(takes), style="dim"), (0, 0, 0, 2))), *cells, _two(makes, memory))
    return table


def _runs_as(plan: StagePlan, run: Run) -> list[tuple[str, str]]:
    """Model and solver; steps, and the levels that they lead through."""
    levels, count, whole = run.schedule.sigmas, len(run.schedule), len(run.whole)
    steps = f"{count} of {whole}" if count < whole else f"{count}"
    steps += f", {plan.repeats} times" if plan.repeats > 1 else ""
    calls = f", {plan.evaluations} calls" if plan.evaluations != count * plan.repeats else ""
    model = getattr(plan.stage, "model", "")
    return [(model, run.schedule.origin), (steps + calls, f"sigma {levels[0]:.3g} → {levels[-1]:.3g}")]


def _two(first: str, second: str) -> Group:
    return Group(Text(first), Text(second, style="dim"))


def curve(plans: Sequence[StagePlan], width: int = 80, height: int = 8) -> Text:
    """The noise level at every evaluation of the UNet, as bars on a logarithmic scale, ``width`` columns wide.

    Stages that go on from noisy latents follow without a gap. Where there are more evaluations than columns, some are
    left out.
    """
    runs = _runs(plans)
    if not runs:
        return Text()
    colour, levels = colours(plans), [level for _, evaluated in runs for level in evaluated]
    noisy = {plan.stage.name for plan in plans if plan.left_noisy}
    gaps = [not (i and runs[i - 1][0] in noisy and name != runs[i - 1][0]) and i > 0 for i, (name, _) in enumerate(runs)]
    widths = _widths([len(evaluated) for _, evaluated in runs], width - _MARGIN - sum(gaps))
    low, high = math.log(min(levels)), math.log(max(levels))
    low -= max(0.08 * (high - low), 0.1)  # so that the lowest has a bar
    text = Text(no_wrap=True)
    for row in reversed(range(height)):
        text.append(_axis(row, height, low, high), style="dim")
        for (name, evaluated), columns, gap in zip(runs, widths, gaps, strict=True):
            bars = (evaluated[i * len(evaluated) // columns] for i in range(columns))
            filled = (round((math.log(level) - low) / (high - low) * height * 8) - row * 8 for level in bars)
            text.append(" " * gap + "".join(_BLOCKS[min(max(part, 0), 8)] for part in filled), style=colour[name])
        text.append("\n")
    text.append(" " * _MARGIN)
    for name, run in groupby(zip(runs, widths, gaps, strict=True), key=lambda one: one[0][0]):
        parts = list(run)
        room = sum(columns + gap for _, columns, gap in parts) - parts[0][2]
        if name == runs[-1][0]:
            room = max(room, min(len(name) + 1, width - _MARGIN - sum(widths) - sum(gaps) + room))
        label = name if len(name) < room else name[: max(room - 2, 0)] + "…" * (room > 1)
        text.append(" " * parts[0][2] + label.ljust(room), style=colour[name])
    text.append(f"\n{'':{_MARGIN}}sigma at each of {len(levels)} evaluations", style="dim")
    return text


def _runs(plans: Sequence[StagePlan]) -> list[tuple[str, list[float]]]:
    """Stage and levels evaluated, for every repetition of every stage."""
    return [
        (name, [level for step in steps for level in step.evaluated])
        for (name, _), steps in groupby(planned_steps(plans), key=lambda step: (step.stage, step.repetition))
    ]


def _widths(counts: Sequence[int], room: int) -> list[int]:
    """How many columns each run gets: as many for each evaluation, or at least one for each run."""
    total = sum(counts)
    if total <= room:
        return [count * min(room // total, _WIDEST) for count in counts]
    return [max(1, int(count * room / total)) for count in counts]


def _axis(row: int, height: int, low: float, high: float) -> str:
    """The label of a row that holds a power of ten, or of the ends where there is none."""
    bottom, top = (math.exp(low + (high - low) * part / height) for part in (row, row + 1))
    powers = [10.0**n for n in range(-4, 8) if bottom <= 10.0**n < top]
    if not any(math.exp(low) <= 10.0**n < math.exp(high) for n in range(-4, 8)) and row in (0, height - 1):
        powers = [bottom if row == 0 else top]
    return f"{f'{powers[0]:.3g}' if powers else '':>{_MARGIN - 2}} " + ("┤" if powers else "│")


def step_table(plans: Sequence[StagePlan], every: bool = False) -> Table:
    """One row for each step: index, step, timestep, sigma, guidance, points the solver remembers, evaluations, stage.

    The sigmas of a step's further evaluations stand in brackets.

    Args:
        every: leave nothing out; else the middle of long stages is.
    """
    table, colour = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False), colours(plans)
    for column in ("", "step", "timestep", "sigma", "next", "guidance", "history"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("evaluations", min_width=11)
    table.add_column("stage", overflow="fold", min_width=8)
    for (name, repetition), group in groupby(planned_steps(plans), key=lambda step: (step.stage, step.repetition)):
        steps = list(group)
        long = len(steps) > 2 * _SHOWN + 1 and not every
        label = Text(f"{name}, again ({repetition + 1})" if repetition else name, style=colour[name])
        for i, step in enumerate(steps[:_SHOWN] + steps[-_SHOWN:] if long else steps):
            if long and i == _SHOWN:
                table.add_row("⋮", "⋮", style="dim")
            table.add_row(*_step_row(step), label, end_section=step is steps[-1])
    return table


def _step_row(step: PlannedStep) -> list[str]:
    levels = [f"{step.timestep:.4g}", f"{step.sigma:.4g}", f"{step.sigma_next:.4g}"]
    guided = f"{step.guidance_scale:.3g}" if step.guidance_scale > 1 else "off"
    further = " ".join(f"{level:.4g}" for level in step.evaluated[1:])
    calls = f"{len(step.evaluated)} ({further})" if further else "1"
    return [str(step.index), str(step.step), *levels, guided, str(step.remembered or ""), calls]


def finding_list(findings: Sequence[Finding]) -> Table:
    """What was found, the worst first, one sentence each."""
    table = Table.grid(padding=(0, 1))
    table.add_column(no_wrap=True)
    table.add_column()
    for finding in sorted(findings, key=lambda one: list(_STYLES).index(one.severity)):
        sentence = Text.assemble((finding.stage, "bold"), ": ", finding.sentence)
        table.add_row(Text(finding.severity, style=_STYLES[finding.severity]), sentence)
    return table
