"""Two pictures side by side: what was asked for, how far their runs are apart at every step, and what is to be seen."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ..core.errors import BadInput
from ..stages import finish
from .record import read_manifest
from .replay import changes
from .trail import Mark, distance, read_trail


class Setting(NamedTuple):
    """What two runs were not told alike, "steps" of a stage say; None is not told."""

    name: str
    one: object
    other: object


class Distance(NamedTuple):
    """How far two runs are apart after a step: the root mean square difference over that of the second."""

    stage: str
    step: int
    sigma: float
    far: float


@dataclass(frozen=True)
class Compared:
    """Two pictures and what made them.

    Args:
        settings: what was asked for and is not the same.
        circumstances: versions, device, weights, inputs that are not the same.
        steps: of the stages that both have, as far as both go through the same noise levels; none for pictures of
            different sizes.
        pixels: mean and largest difference, 0 to 255; None for pictures of different sizes.
        picture: both, and their difference, 8 times as strong.
    """

    settings: tuple[Setting, ...]
    circumstances: tuple[str, ...]
    steps: tuple[Distance, ...]
    pixels: tuple[float, float] | None
    picture: Image.Image


def compare(one: Path, other: Path) -> Compared:
    """Two pictures that chains wrote.

    Raises:
        BadInput: nothing in a file says how it was made, or it is no picture.
    """
    facts = read_manifest(one), read_manifest(other)
    try:
        ours, theirs = (read_trail(told["trail"]) for told in facts)
        settings = tuple(_settings(*(_flat(told["chain"]) for told in facts)))
        steps = tuple(
            Distance(stage, a.step, a.sigma, distance(a, b))
            for stage in ours
            for a, b in takewhile(_at_one_level, zip(ours[stage], theirs.get(stage, ()), strict=False))
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadInput(f"{one} and {other} cannot be compared ({error}): one is of another version.") from error
    pixels, sheet = _seen(_picture(one), _picture(other), (one.name, other.name))
    return Compared(settings, tuple(changes(*facts)), steps if pixels else (), pixels, sheet)


def _at_one_level(pair: tuple[Mark, Mark]) -> bool:
    """Whether two steps end at the same noise level: beyond, there is nothing to compare."""
    return math.isclose(pair[0].sigma, pair[1].sigma, rel_tol=1e-4)


def _flat(chain: Mapping[str, Any]) -> dict[str, dict[str, object]]:
    """The keys of a chain, under "", and of its stages, under their names."""
    own = {key: value for key, value in chain.items() if key != "stages"}
    return {"": own} | {stage["name"]: {k: v for k, v in stage.items() if k != "name"} for stage in chain["stages"]}


def _settings(one: Mapping[str, Mapping[str, object]], other: Mapping[str, Mapping[str, object]]) -> Iterator[Setting]:
    for name in {**one, **other}:
        if name not in one or name not in other:
            yield Setting(f"stage {name}", *("there" if name in chain else None for chain in (one, other)))
            continue
        ours, theirs = one[name], other[name]
        for key in {**ours, **theirs}:
            if ours.get(key) != theirs.get(key):
                yield Setting(f"{name}.{key}" if name else key, ours.get(key), theirs.get(key))


def _picture(path: Path) -> Image.Image:
    path = path.with_suffix(".png") if path.suffix == ".json" else path
    try:
        with Image.open(path) as file:
            return file.convert("RGB")
    except (OSError, Image.DecompressionBombError) as error:
        raise BadInput(f"There is no picture to see at {path} ({error}).") from error


def _seen(one: Image.Image, other: Image.Image, labels: tuple[str, str]) -> tuple[tuple[float, float] | None, Image.Image]:
    if one.size != other.size:
        return None, finish.grid([one, other], columns=2, labels=labels)
    far = np.abs(np.asarray(one, np.int16) - np.asarray(other, np.int16))
    strong = Image.fromarray(np.minimum(8 * far, 255).astype(np.uint8))
    sheet = finish.grid([one, other, strong], columns=3, labels=[*labels, "difference, 8 times"])
    return (float(far.mean()), float(far.max())), sheet
