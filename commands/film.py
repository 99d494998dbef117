"""``unrolled film``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import err, on_chain, say, show
from .run import INTERRUPTED, Previewing, Progressing, bars, report

if TYPE_CHECKING:
    from ..chains.chain import Chain
    from ..core.loading import Shelf


@on_chain
def film(
    job: "Chain",
    shelf: "Shelf",
    output: Annotated[Path, typer.Option(help="The page to write; it is overwritten.")] = Path("film.html"),
    words: Annotated[str, typer.Option(help="Words of the prompt to draw heat maps of, with commas between.")] = "",
    every: Annotated[int, typer.Option(help="Decode the preview of every so many steps.")] = 1,
    beside: Annotated[Path | None, typer.Option(help="Another film's page, to show beside this one.")] = None,
    preview: Previewing = False,
    progress: Progressing = True,
) -> None:
    """Run a chain and film it: one page to look through every step of every stage, in any browser, without a network."""
    from ..chains.film.filming import Camera
    from ..chains.film.live import Screen
    from ..chains.film.page import require_html
    from ..chains.film.values import Film
    from ..chains.run import run as run_chain
    from ..core.files import require_writable

    require_html(output)
    require_writable(output.parent)
    parent = None if beside is None else Film.load(beside)
    screen = Screen() if preview and err.is_terminal else None
    named = [word.strip() for word in words.split(",") if word.strip()]
    camera = Camera(job, words=named, every=every, show=screen)
    try:
        with bars(on=progress and err.is_terminal, above=screen) as watch:
            report(run_chain(job, shelf, None, watch, free=True, observe=camera.observe))
    except KeyboardInterrupt:
        say("Interrupted.")
        raise typer.Exit(INTERRUPTED) from None
    finally:  # what was seen before a fault is worth a look
        if camera.scenes:
            show(camera.film(shelf).save(output, parent))
