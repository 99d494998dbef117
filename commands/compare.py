"""``unrolled replay`` and ``unrolled diff``: is it the same, and if not, where and why."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from ..core.files import write_atomically
from ..stages.finish import png
from .options import err, out, show
from .run import Progressing, bars

if TYPE_CHECKING:
    from ..chains.compare import Compared

DIFFERENT = 1


def replay(
    picture: Annotated[Path, typer.Argument(metavar="IMAGE", help="A picture that a chain wrote, or the .json beside it.")],
    inputs: Annotated[Path | None, typer.Option(help="The folder of the pictures that went in.")] = None,
    output: Annotated[Path | None, typer.Option(help="Write the picture as it came out now, a .png file.")] = None,
    allow_pickle: Annotated[bool, typer.Option("--allow-pickle", help="Read pickled weights if it names some.")] = False,
    progress: Progressing = True,
) -> None:
    """Make a picture again and say whether it is identical; if not, where it differs, how far, and what has changed.

    Exit codes beside those of every command: 1 if it is not identical.
    """
    from ..chains.replay import replay as make_again

    with bars(on=progress and err.is_terminal) as watch:
        again = make_again(picture, inputs=inputs, watch=watch, free=True, allow_pickle=allow_pickle)
    show(again)
    if output is not None:
        show(write_atomically(output, png(again.picture)))
    if not again.same:
        raise typer.Exit(DIFFERENT)


def diff(
    one: Annotated[Path, typer.Argument(metavar="A", help="A picture that a chain wrote.")],
    other: Annotated[Path, typer.Argument(metavar="B", help="Another one.")],
    output: Annotated[Path | None, typer.Option(help="Write both and their difference, side by side, a .png file.")] = None,
) -> None:
    """Show two runs side by side: settings, distance after every step, pictures."""
    from ..chains.compare import compare

    found = compare(one, other)
    _print(found, one.name, other.name)
    if output is not None:
        show(write_atomically(output, png(found.picture)))


def _print(found: "Compared", one: str, other: str) -> None:
    if found.settings:
        table = Table("setting", one, other)
        for setting in found.settings:
            table.add_row(setting.name, *("-" if value is None else str(value) for value in setting[1:]))
        out.print(table)
    for circumstance in found.circumstances:
        show(f"circumstance: {circumstance}")
    if found.steps:
        table = Table("stage", "step", "sigma after it", "relative distance")
        for stage, step, sigma, far in found.steps:
            table.add_row(stage, str(step + 1), f"{sigma:.4g}", f"{far:.1e}" if far else "identical")
        out.print(table)
    else:
        show("steps: not compared, as sizes, noise levels or stages are not the same")
    if found.pixels is None:
        show("pictures: of different sizes")
    else:
        mean, most = found.pixels
        show(f"pictures: {mean:.2g} of 255 apart in the mean, at most {most:.0f}" if most else "pictures: identical")
