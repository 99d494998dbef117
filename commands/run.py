"""``unrolled run``."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from .options import err, on_chain, say, show

if TYPE_CHECKING:
    from ..chains.chain import Chain, Stage
    from ..core.loading import Shelf
    from ..core.loop import Step

INTERRUPTED = 130


@on_chain
def run(
    job: "Chain",
    shelf: "Shelf",
    output: Annotated[Path, typer.Option(help="Folder to write into; nothing in it is overwritten.")] = Path("outputs"),
    progress: Annotated[bool, typer.Option(help="Show progress bars (never when not on a terminal).")] = True,
) -> None:
    """Run a chain and write its pictures."""
    from ..chains.run import run as run_chain

    try:
        with bars(on=progress and err.is_terminal) as watch:
            result = run_chain(job, shelf, output, watch, free=True)
    except KeyboardInterrupt:  # typer would leave without a word
        say(f"Interrupted; what was made so far is in {output} (interrupted_*.safetensors, unfinished_*).")
        raise typer.Exit(INTERRUPTED) from None
    for note in dict.fromkeys(result.notes):
        say(note, "note")
    for file in result.files:
        show(file)


@contextmanager
def bars(on: bool) -> Iterator[Any]:
    """What watches a run with a progress bar for every stage."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, disable=not on) as progress:
        tasks: dict[str, TaskID] = {}

        def watch(stage: "Stage", step: "Step") -> None:
            if stage.name not in tasks:
                tasks[stage.name] = progress.add_task(stage.name, total=step.total, completed=step.index)
            progress.update(tasks[stage.name], completed=step.index + 1)

        yield watch
