"""``unrolled plan``, ``models`` and ``doctor``: what would run, and on what."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from ..core.errors import BadChain
from .options import on_chain, out, show

if TYPE_CHECKING:
    from ..chains.chain import Chain
    from ..core.loading import Shelf


@on_chain
def plan(
    job: "Chain",
    shelf: "Shelf",
    table: Annotated[bool, typer.Option("--table", help="Show every step; the middle of long stages is left out.")] = False,
    every: Annotated[bool, typer.Option("--all", help="With --table, leave nothing out.")] = False,
    picture: Annotated[Path | None, typer.Option(help="Draw the schedule into a .png, .svg or .pdf file.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 if anything but notes is found.")] = False,
) -> None:
    """Show what a chain will run, draw its schedule and find its mistakes, without loading a model.

    Exit codes beside those of every command: 1 with --strict and a warning, 2 if a finding is an error.
    """
    from ..chains.cache import Cache, foreseen
    from ..chains.checks import findings
    from ..chains.drawing import draw_plan
    from ..chains.plan import plan as plan_chain
    from ..chains.terminal import curve, finding_list, stage_table, step_table

    plans = plan_chain(job, shelf)
    found = findings(job, plans)
    count = f"{len(plans)} stage{'s' if len(plans) > 1 else ''}"
    seeds = f"seed{'s' if job.batch > 1 else ''} {', '.join(map(str, job.seeds()))}"
    out.print(f"{count} on {shelf.device}, {seeds}", highlight=False, soft_wrap=True)
    out.print(stage_table(plans), curve(plans, out.width))
    for name, (known, total) in foreseen(Cache.usual(), job, plans, shelf).items():
        show(f"{name}: {known} of {total} steps were made before and will be reused (not with --no-cache)")
    if table:
        out.print(step_table(plans, every))
    if found:
        out.print(finding_list(found))
    if picture is not None:
        show(draw_plan(plans, picture))
    severities = {finding.severity for finding in found}
    if "error" in severities:
        raise typer.Exit(BadChain.exit_code)
    if strict and "warning" in severities:
        raise typer.Exit(1)


def models() -> None:
    """List the models that have short names."""
    from ..core.catalog import CATALOG

    for name, entry in CATALOG.items():
        out.print(f"[bold]{name}[/bold]  {entry.about}\n    {entry.hub}", highlight=False, soft_wrap=True)


def doctor() -> None:
    """Show versions, the device, and which attention backends can run here."""
    import torch

    from ..chains.record import versions
    from ..kernels.backends import doctor as backends

    table = Table("what", "found", show_header=False)
    for package, found in versions().items():
        table.add_row(package, found)
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else "none; the CPU is used"
    table.add_row("CUDA device", cuda)
    table.add_row("CPU threads", str(torch.get_num_threads()))
    for name, state in backends().items():
        table.add_row(f"attention: {name}", state)
    out.print(table)
