"""What a run leaves of every step: a digest that tells whether another is the same, and numbers that tell how near."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

SAMPLED = 16
"""Numbers kept of each image's latents, evenly spread."""


class Mark(NamedTuple):
    """One image's latents after one step.

    Args:
        step: the step's index in its stage's whole run.
        sigma: the noise level after it.
        digest: of all their bytes.
        sample: some of their numbers, float32 in base64: 16 are enough for the order of magnitude of a difference.
    """

    step: int
    sigma: float
    digest: str
    sample: str

    def numbers(self) -> np.ndarray:
        """The sample; ValueError if it is none."""
        return np.frombuffer(base64.b64decode(self.sample), np.float32).astype(np.float64)


Trail = Mapping[str, Sequence[Mark]]
"""One image's marks in every stage, in the order they were made."""


def marks(x: Tensor, step: int, sigma: float) -> list[Mark]:
    """Of every image of a batch."""
    rows = x.detach().to("cpu", torch.float32).flatten(1)
    places = torch.linspace(0, rows.shape[1] - 1, SAMPLED).long()
    return [
        Mark(
            step, sigma, digest(row.contiguous().numpy().tobytes()), base64.b64encode(row[places].numpy().tobytes()).decode()
        )
        for row in rows
    ]


def digest(data: bytes) -> str:
    """64 bits, in hexadecimal."""
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def picture_digest(picture: Image.Image) -> str:
    """Of a picture's size and pixels, however it is written to a file."""
    return digest(repr(picture.size).encode() + picture.convert("RGB").tobytes())


def distance(one: Mark, other: Mark) -> float:
    """The root of the mean square difference over that of ``other``, from their samples; exactly 0 for the same digest."""
    if one.digest == other.digest:
        return 0.0
    a, b = one.numbers(), other.numbers()
    if a.shape != b.shape:
        return math.inf
    return float(np.sqrt(np.mean((a - b) ** 2) / max(float(np.mean(b**2)), 1e-30)))


def read_trail(told: Mapping[str, Sequence[Sequence[object]]]) -> Trail:
    """A trail out of JSON; TypeError or ValueError if it is none."""
    return {stage: [Mark(*row) for row in rows] for stage, rows in told.items()}  # type: ignore[arg-type]
