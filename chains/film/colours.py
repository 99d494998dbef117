"""Latents and heat as colours, without a decoder."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor

WIDEST, CELLS = 256, 128
"""Pixels a side of a picture in a film, at most, and of latents; noise is much to store."""

# Black, violet, red, orange, pale yellow: brighter all the way, so that it reads without colour too.
_HEAT = np.array([[0, 0, 0], [84, 15, 109], [187, 55, 84], [249, 142, 9], [252, 255, 164]])


def fitted(z: Tensor, picture: Image.Image) -> Tensor:
    """The linear map from a cell of latents to its colour that comes nearest to a decoded picture, by least squares.

    Args:
        z: clean latents (channels, height, width), and what the decoder makes of them.

    Returns:
        (channels + 1, 3), to be applied to a cell and a 1; colours go from 0 to 1.
    """
    height, width = z.shape[-2:]
    small = np.asarray(picture.convert("RGB").resize((width, height), Image.Resampling.BOX))
    colours = torch.from_numpy(small.copy()).double().reshape(-1, 3) / 255.0
    linear: Tensor = torch.linalg.lstsq(_cells(z), colours, driver="gelsd").solution
    return linear


def unfitted(channels: int) -> Tensor:
    """The first three channels as red, green and blue, for want of a decoded picture."""
    rgb = torch.zeros(channels + 1, 3, dtype=torch.float64)
    rgb[:3, :3], rgb[-1] = 0.25 * torch.eye(3, dtype=torch.float64)[: min(channels, 3)], 0.5
    return rgb


def coloured(z: Tensor, linear: Tensor) -> Image.Image:
    """Latents (channels, height, width) through a linear map: one pixel for each cell, or for a few."""
    rgb = (_cells(z) @ linear).nan_to_num(0.0).clamp(0.0, 1.0) * 255.0
    return small(Image.fromarray(rgb.round().byte().reshape(*z.shape[-2:], 3).numpy()), CELLS)


def glow(heat: Tensor) -> Image.Image:
    """Heat (height, width) from 0 to 1 as a picture."""
    array, stops = heat.clamp(0.0, 1.0).double().numpy(), np.linspace(0.0, 1.0, len(_HEAT))
    rgb = np.stack([np.interp(array, stops, channel) for channel in _HEAT.T], axis=-1)
    return Image.fromarray(rgb.round().astype(np.uint8))


def small(picture: Image.Image, widest: int = WIDEST) -> Image.Image:
    """A copy in RGB, made smaller if need be."""
    picture = picture.convert("RGB").copy()
    picture.thumbnail((widest, widest))
    return picture


def webp(picture: Image.Image) -> bytes:
    """A small picture as a file."""
    file = io.BytesIO()
    picture.save(file, "WEBP", quality=80)
    return file.getvalue()


def _cells(z: Tensor) -> Tensor:
    rows = z.double().cpu().flatten(1).T
    return torch.cat([rows, torch.ones_like(rows[:, :1])], 1)
