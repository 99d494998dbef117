"""``unrolled diagnose``: which part of which stage is at fault."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import typer
from rich.table import Table
from rich.text import Text

from .options import on_chain, out, show

if TYPE_CHECKING:
    from ..chains.chain import Chain
    from ..chains.checkups import Check
    from ..chains.diagnose import Examined
    from ..chains.watched import Seen
    from ..core.loading import Shelf
    from ..stages.text import TokenRow

FOUND = 1
_STYLES = {"ok": "green", "odd": "bold yellow", "wrong": "bold red"}


@on_chain
def diagnose(job: "Chain", shelf: "Shelf") -> None:
    """Run a chain and say whether text encoding, denoising or decoding is at fault; no picture is written.

    Exit codes beside those of every command: 1 if something is odd or wrong.
    """
    from ..chains.diagnose import diagnose as examine

    found = examine(job, shelf)
    for stage in found.stages:
        out.rule(Text(stage.name), align="left")
        _print(stage)
    show(found.sentence)
    if found.fault is not None:
        raise typer.Exit(FOUND)


def _print(stage: "Examined") -> None:
    titles = ("known picture through the VAE", "text encoding", "denoising", "decoded picture")
    for title, (_, checks) in zip(titles, stage.parts, strict=True):
        if checks:
            out.print(_checks(title, checks))
        if title == "text encoding" and stage.tokens:
            out.print(_tokens(stage.tokens.items()))
        if title == "denoising" and stage.steps:
            out.print(_steps(stage.steps))


def _checks(title: str, checks: "Sequence[Check]") -> Table:
    table = Table(title, "found", "expected", "")
    for check in checks:
        table.add_row(*map(Text, (check.what, check.found, check.expected)), Text(check.verdict, _STYLES[check.verdict]))
    return table


def _tokens(prompts: "Iterable[tuple[str, Sequence[TokenRow]]]") -> Table:
    table = Table("token", "weight", "chunk", "place")
    for _, rows in prompts:
        for row in rows:
            place = ("dropped", "") if row.chunk is None else (str(row.chunk + 1), str(row.position))
            table.add_row(Text(row.text), f"{row.weight:.3g}", *place, style=_STYLES["odd"] if row.chunk is None else "")
        table.add_section()
    return table


def _steps(steps: "Sequence[Seen]") -> Table:
    table = Table("step", "sigma", "std of x over expected", "std of x0", "x0 far out", "cond from uncond")
    for step in steps:
        apart = "no guidance" if step.apart is None else f"{step.apart:.2g}"
        numbers = f"{step.sigma:.4g}", f"{step.spread:.3g}", f"{step.x0_std:.3g}", f"{step.beyond:.1%}"
        table.add_row(str(step.step + 1), *numbers, apart)
    return table
