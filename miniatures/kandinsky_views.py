"""Many views of one thing: what CLIP must see the same thing in.

A view is a 3D emoji or the flat emoji of the same thing (lobehub-fluent-emoji-flat, MIT; SVG files), shifted, mirrored,
on some background, with holes, noise and blur.

    npm pack @lobehub/fluent-emoji-flat@1.1.0 && tar xzf … --one-top-level=fluent-emoji-flat
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import torch
from PIL import Image, ImageChops, ImageColor, ImageDraw
from torch import Tensor
from torch.nn.functional import affine_grid, avg_pool2d, grid_sample, interpolate

from . import world

_FINE: Final = 8 * 32  # flat emoji are drawn on 32 units; eight pixels each, shrunk afterwards, make smooth edges
_SMOOTH: Final = np.linspace(0, 1, 9)[1:, None]
_TOKEN: Final = re.compile(r"[a-zA-Z]|[-+]?(?:\d*\.\d+|\d+\.?)(?:e[-+]?\d+)?")
_TAKES: Final = {"M": 2, "L": 2, "H": 1, "V": 1, "C": 6, "S": 4}


def _outlines(path: str) -> Iterator[list[tuple[float, float]]]:
    """The closed outlines of an SVG path; curves become eight straight pieces."""
    tokens = _TOKEN.findall(path)
    outline: list[np.ndarray[tuple[int], np.dtype[np.float64]]] = []
    here = start = handle = np.zeros(2)
    command, i = "M", 0
    while i < len(tokens):
        if tokens[i].isalpha():
            command, i = tokens[i], i + 1
        if command in "zZ":
            here = start
            continue
        kind, origin = command.upper(), here * command.islower()
        numbers = [float(token) for token in tokens[i : i + _TAKES[kind]]]
        i += _TAKES[kind]
        if kind == "H":
            points = np.array([[numbers[0] + origin[0], here[1]]])
        elif kind == "V":
            points = np.array([[here[0], numbers[0] + origin[1]]])
        else:
            points = np.array(numbers).reshape(-1, 2) + origin
        if kind == "M":
            if outline:
                yield [(x, y) for x, y in outline]
            outline, start = [], points[-1]
            command = "l" if command == "m" else "L"  # further pairs are lines
        if kind in "CS":
            first = 2 * here - handle if kind == "S" else points[0]
            handle, end, t = points[-2], points[-1], _SMOOTH
            curve = (1 - t) ** 3 * here + 3 * t * (1 - t) ** 2 * first + 3 * t * t * (1 - t) * handle + t**3 * end
            outline += list(curve)
        else:
            handle = points[-1]
            outline += list(points)
        here = points[-1]
    if outline:
        yield [(x, y) for x, y in outline]


def _flat(file: Path) -> Image.Image:
    """A flat emoji, near enough: filled paths only, and of a gradient its first colour."""
    source = file.read_text("utf-8")
    canvas = Image.new("RGBA", (_FINE, _FINE))
    for tag in re.findall(r"<path[^>]*>", source):
        attributes = dict(re.findall(r'([\w-]+)="([^"]*)"', tag))
        colour = attributes.get("fill", "black")
        if gradient := re.match(r"url\(#(.*)\)", colour):
            found = re.search(rf'id="{gradient[1]}".*?stop-color="([^"]*)"', source, re.DOTALL)
            colour = found[1] if found else "none"
        if colour == "none":
            continue
        inside = Image.new("1", canvas.size)
        for outline in _outlines(attributes["d"]):
            piece = Image.new("1", canvas.size)
            ImageDraw.Draw(piece).polygon([(8 * x, 8 * y) for x, y in outline], fill=1)
            inside = ImageChops.logical_xor(inside, piece)
        opacity = float(attributes.get("opacity", 1)) * float(attributes.get("fill-opacity", 1))
        layer = Image.new("RGBA", canvas.size, (*ImageColor.getrgb(colour)[:3], 0))
        layer.putalpha(inside.convert("L").point(lambda value, opacity=opacity: value * opacity))
        canvas.alpha_composite(layer)
    return canvas


def _cutout(data: Path, stem: str, flat: bool) -> Image.Image:
    """One emoji on nothing; the few that have no flat version are always solid."""
    drawing = next(data.glob("*fluent-emoji-flat*/package/assets")) / f"{stem}.svg"
    if flat and drawing.exists():
        return _flat(drawing)
    with Image.open(world.assets(data) / f"{stem}.webp") as file:
        return file.convert("RGBA")


def cutouts(data: Path, stems: Sequence[str], flat: bool) -> Tensor:
    """N × 4 × 64 × 64 in [0, 1], the colours already multiplied by the opacity."""
    size = (world.SIZE, world.SIZE)
    small = [_cutout(data, stem, flat).resize(size, Image.Resampling.LANCZOS) for stem in stems]
    stacked = torch.from_numpy(np.stack([np.asarray(one) for one in small])).permute(0, 3, 1, 2).float() / 255
    return torch.cat([stacked[:, :3] * stacked[:, 3:], stacked[:, 3:]], 1)


def on_white(cut: Tensor) -> Tensor:
    """Cutouts as pictures in [-1, 1]."""
    return 2 * (cut[:, :3] + 1 - cut[:, 3:]) - 1


def _some(count: int, chance: float) -> Tensor:
    """Which of the pictures something happens to."""
    return (torch.rand(count) < chance).view(-1, 1, 1, 1)


def view(cut: Tensor) -> Tensor:
    """A random view of each cutout, as a picture in [-1, 1]."""
    count = len(cut)
    zoom = 1 + 0.25 * torch.rand(count, 1) - 0.05
    zeros, mirror = torch.zeros(count, 1), 1 - 2 * (torch.rand(count, 1) < 0.4).float()
    shift = 0.2 * torch.rand(count, 2) - 0.1
    place = torch.stack([torch.cat([zoom * mirror, zeros, shift[:, :1]], 1), torch.cat([zeros, zoom, shift[:, 1:]], 1)], 1)
    seen = grid_sample(cut, affine_grid(place, list(cut.shape), align_corners=False), align_corners=False)
    moved = torch.where(_some(count, 0.7), seen, cut)
    plain = torch.where(_some(count, 0.5), torch.rand(count, 1, 1, 1), torch.rand(count, 3, 1, 1))
    sloped = interpolate(torch.rand(count, 3, 2, 2), size=cut.shape[-2:], mode="bilinear", align_corners=False)
    behind = torch.where(_some(count, 0.6), 1.0, torch.where(_some(count, 0.6), plain, sloped))
    picture = 2 * (moved[:, :3] + (1 - moved[:, 3:]) * behind) - 1
    picture = torch.where(_some(count, 0.2), avg_pool2d(picture, 3, 1, 1, count_include_pad=False), picture)
    hidden = interpolate((torch.rand(count, 1, 4, 4) < 0.15).float(), size=cut.shape[-2:])
    picture = torch.where(_some(count, 0.3) & (hidden > 0), 0.0, picture)
    return picture + _some(count, 0.4) * 0.15 * torch.rand(count, 1, 1, 1) * torch.randn_like(picture)
