"""What is done to finished pictures."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFilter, ImageFont

from ..core.errors import BadInput

FORMATS = {"png": "PNG", "jpg": "JPEG", "jpeg": "JPEG", "webp": "WEBP"}
"""File endings that can be written."""


def sharpen(picture: Image.Image, percent: float = 100.0, radius: float = 1.0) -> Image.Image:
    """Unsharp masking; ``percent`` is its strength, ``radius`` in pixels."""
    if percent < 0 or radius <= 0:
        raise BadInput(f"Sharpening takes a percent of at least 0 and a radius above 0, got {percent:g} and {radius:g}.")
    return picture.filter(ImageFilter.UnsharpMask(radius, round(percent), 0))


def resize(picture: Image.Image, factor: float | None = None, size: tuple[int, int] | None = None) -> Image.Image:
    """Lanczos to ``factor`` times its size, or to ``size`` (width, height)."""
    if (factor is None) == (size is None):
        raise BadInput("A resize takes either a factor or a size.")
    if factor is not None:
        size = (round(picture.width * factor), round(picture.height * factor))
    if size is None or min(size) < 1:
        raise BadInput(f"A resize to {size} leaves nothing: sides must be at least 1 pixel.")
    return picture.resize(size, Image.Resampling.LANCZOS)


def grid(
    pictures: Sequence[Image.Image], columns: int | None = None, labels: Sequence[str] = (), gap: int = 4
) -> Image.Image:
    """Pictures side by side on white, row by row, with labels below them.

    Args:
        columns: by default as square as it gets.
        labels: one per picture, or none.
    """
    if not pictures:
        raise BadInput("A grid needs at least one picture.")
    if labels and len(labels) != len(pictures):
        raise BadInput(f"A grid of {len(pictures)} pictures was given {len(labels)} labels: give one each, or none.")
    if columns is not None and columns < 1:
        raise BadInput(f"A grid needs at least one column, got {columns}.")
    columns = columns or math.ceil(math.sqrt(len(pictures)))
    width, height = max(p.width for p in pictures), max(p.height for p in pictures)
    font = ImageFont.load_default(size=max(10, min(width // 10, 24)))
    wrapped = [_wrapped(label, font, width) for label in labels]
    line = font.getbbox("Ag")[3] + 3
    text_height = round(max((w.count("\n") + 1 for w in wrapped), default=0) * line + (4 if labels else 0))
    rows = math.ceil(len(pictures) / columns)
    cell = (width + gap, height + text_height + gap)
    sheet = Image.new("RGB", (columns * cell[0] + gap, rows * cell[1] + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for i, picture in enumerate(pictures):
        left, top = gap + i % columns * cell[0], gap + i // columns * cell[1]
        sheet.paste(picture, (left + (width - picture.width) // 2, top + (height - picture.height) // 2))
        if labels:
            draw.multiline_text((left + width / 2, top + height + 2), wrapped[i], "black", font, anchor="ma", align="center")
    return sheet


def gif(pictures: Sequence[Image.Image], seconds: float = 0.12, hold: float = 1.0) -> bytes:
    """An endless GIF of a run; the last picture is held longer."""
    if not pictures:
        raise BadInput("A GIF needs at least one picture.")
    durations = [round(1000 * seconds)] * (len(pictures) - 1) + [round(1000 * hold)]
    first, *rest = (p.convert("RGB") for p in pictures)
    file = io.BytesIO()
    first.save(file, "GIF", save_all=True, append_images=rest, duration=durations, loop=0)
    return file.getvalue()


def png(picture: Image.Image) -> bytes:
    """A PNG file."""
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def _wrapped(label: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """``label`` broken at blanks, and behind hyphens, into lines that fit."""
    lines = [""]
    for part in re.findall(r"[^\s-]*-+|[^\s-]+\s*|\s+", label):
        if lines[-1] and font.getlength((lines[-1] + part).strip()) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(line.strip() for line in lines)
