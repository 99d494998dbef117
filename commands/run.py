"""``unrolled run`` and ``unrolled resume``."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from .options import err, on_chain, say, show

if TYPE_CHECKING:
    from ..chains.chain import Chain, Stage
    from ..chains.outputs import Result
    from ..core.loading import Shelf
    from ..core.loop import Step

INTERRUPTED = 130


SaveEvery = Annotated[
    int, typer.Option(metavar="N", help="Save the run after every N steps of a stage, so that it can be resumed if killed.")
]
Caching = Annotated[bool, typer.Option(help="Reuse the steps that another run has made, and keep those of this one.")]
Previewing = Annotated[bool, typer.Option("--preview", help="Show the x0 of every step in the terminal.")]
Progressing = Annotated[bool, typer.Option(help="Show progress bars (never when not on a terminal).")]


@on_chain
def run(
    job: "Chain",
    shelf: "Shelf",
    output: Annotated[Path, typer.Option(help="Folder to write into; nothing in it is overwritten.")] = Path("outputs"),
    save_every: SaveEvery = 0,
    cache: Caching = True,
    preview: Previewing = False,
    progress: Progressing = True,
) -> None:
    """Run a chain and write its pictures."""
    from ..chains.cache import Cache
    from ..chains.film.live import Screen, previews
    from ..chains.run import run as run_chain

    screen = Screen() if preview and err.is_terminal else None
    observe = previews(screen) if screen else None
    with told(output), bars(on=progress and err.is_terminal, above=screen) as watch:
        how: Any = {"observe": observe, "save_every": save_every, "cache": Cache.usual() if cache else None}
        report(run_chain(job, shelf, output, watch, free=True, **how))


def resume(
    where: Annotated[Path, typer.Argument(metavar="DIR", help="The folder of a run that was stopped, or its saved file.")],
    save_every: SaveEvery = 0,
    progress: Progressing = True,
) -> None:
    """Go on with a run that was interrupted, to the same pictures as if it had not been."""
    from ..chains.run import resume as resume_run

    with told(where), bars(on=progress and err.is_terminal) as watch:
        report(resume_run(where, watch=watch, free=True, save_every=save_every))


@on_chain
def fork(
    job: "Chain",
    shelf: "Shelf",
    at: Annotated[str, typer.Option(metavar="STAGE.STEP", help="After how many steps, without STAGE of the last.")],
    change: Annotated[
        list[str] | None, typer.Option(metavar="STAGE.KEY=VALUE", help="What is different from there on.")
    ] = None,
    reseed: Annotated[int | None, typer.Option(help="Seed of the noise from there on.")] = None,
    latents: Annotated[Path | None, typer.Option(help="Latents to go on from there: a file of Latents.save.")] = None,
    film: Annotated[Path | None, typer.Option(help="A page with both films, side by side; it is overwritten.")] = None,
    output: Annotated[Path, typer.Option(help="Folder to write into; nothing in it is overwritten.")] = Path("outputs"),
    progress: Progressing = True,
) -> None:
    """Run a chain, and once more from some step on with changes: two pictures, and both side by side."""
    from ..chains.film.filming import Camera
    from ..chains.film.page import require_html
    from ..chains.fork import fork as fork_run
    from ..chains.read import changed
    from ..core.errors import BadInput
    from ..core.files import claim, write_atomically
    from ..core.latents import Latents
    from ..stages.finish import png

    stage, _, step = at.rpartition(".")
    if not step.isdigit():
        raise BadInput(f"--at {at!r} is not of the form STEP or STAGE.STEP, e.g. 12 or {job.stages[0].name}.12.")
    other = changed(job, change or (), seed=reseed)
    if other == job and latents is None:
        raise BadInput("Nothing is different after the fork: say what with --change, --reseed or --latents.")
    edit = (lambda at_fork: Latents.load(latents, at_fork.x.device)) if latents is not None else None
    cameras = (Camera(job), Camera(other)) if film is not None else ()
    if film is not None:
        require_html(film)
    how: Any = {"edit": edit, "free": True, "observe": tuple(camera.observe for camera in cameras) or (None, None)}
    with told(output), bars(on=progress and err.is_terminal) as watch:
        made = fork_run(job, other, shelf, int(step), stage or None, output, watch, **how)
    report(made.parent)
    report(made.branch)
    name = claim(output, "fork", ".png").with_suffix(".png")
    show(write_atomically(name, png(made.sheet())))
    if film is not None:
        parent, branch = (camera.film(shelf) for camera in cameras)
        show(branch.save(film, parent))


def report(result: "Result") -> None:
    """Print what a run has to say, and the files it made."""
    for note in dict.fromkeys(result.notes):
        say(note, "note")
    for file in result.files:
        show(file)


@contextmanager
def told(output: Path) -> Iterator[None]:
    """Say what an interrupted run leaves; typer would leave without a word."""

    def runs() -> set[tuple[Path, int]]:
        return {(file, file.stat().st_mtime_ns) for file in output.glob("interrupted_*.safetensors")}

    before = runs()
    try:
        yield
    except KeyboardInterrupt:
        if output.is_file() or runs() - before:
            say(f"Interrupted; `unrolled resume {output}` goes on with it, and what was finished is there.")
        else:
            say("Interrupted before there was anything to keep.")
        raise typer.Exit(INTERRUPTED) from None


@contextmanager
def bars(on: bool, above: RenderableType | None = None) -> Iterator[Any]:
    """What watches a run with a progress bar for every stage, below something else perhaps."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())

    class Bars(Progress):
        def get_renderables(self) -> Iterable[RenderableType]:
            return [*([above] if above else []), *super().get_renderables()]

    with Bars(*columns, console=err, disable=not on) as progress:
        tasks: dict[str, TaskID] = {}

        def watch(stage: "Stage", step: "Step") -> None:
            if stage.name not in tasks:
                tasks[stage.name] = progress.add_task(stage.name, total=step.total, completed=step.index)
            progress.update(tasks[stage.name], completed=step.index + 1)

        yield watch
