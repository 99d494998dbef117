"""Previews while a run is under way, in a terminal or a notebook."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from PIL import Image
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.live import Live
from rich.style import Style
from rich.text import Text

from ..jobs import Hook
from ..runner import Observe
from ..tasks import Task
from .recorder import Preview, Show

_WIDEST, _BELOW = 64, 8  # columns of a picture; lines left for what stands below it


def previews(show: Show, every: int = 1) -> Observe:
    """For :func:`unrolled.chains.run.run`: shows the x0 of every step, decoded every so many."""

    @contextmanager
    def observe(task: Task) -> Iterator[Sequence[Hook]]:
        yield [Preview(task.pictures, every, show)]

    return observe


@contextmanager
def live(console: Console | None = None) -> Iterator[Show]:
    """What shows a picture here, in place of the one before: in a notebook as it is, in a terminal in half blocks."""
    if "ipykernel" in sys.modules:
        from IPython.display import display

        handle = display("…", display_id=True)
        yield lambda picture, words: handle.update(picture)
        return
    screen = Screen()
    with Live(screen, console=console, transient=True):
        yield screen


class Screen:
    """The newest of the pictures that it was called with, for rich to print."""

    def __init__(self) -> None:
        self.newest: tuple[Image.Image, str] | None = None

    def __call__(self, picture: Image.Image, words: str) -> None:
        """Show this one from now on."""
        self.newest = picture, words

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        if self.newest is not None:
            picture, words = self.newest
            high = max(2, console.height - _BELOW)
            width = min(_WIDEST, options.max_width, 2 * high * picture.width // picture.height)
            yield Group(half_blocks(picture, width), Text(words, style="dim"))


def half_blocks(picture: Image.Image, width: int) -> Text:
    """A picture as text of so many columns: two pixels to a character, one above the other."""
    high = max(1, round(width * picture.height / picture.width / 2))
    pixels = np.asarray(picture.convert("RGB").resize((width, 2 * high), Image.Resampling.BOX)).tolist()
    text = Text(no_wrap=True, end="")
    for above, below in zip(pixels[::2], pixels[1::2], strict=True):
        for top, bottom in zip(above, below, strict=True):
            text.append("▀", Style.parse("rgb({},{},{}) on rgb({},{},{})".format(*top, *bottom)))
        text.append("\n")
    return text
