"""What was measured on a card: how our kernels cut their work there, and how long every backend took.

``benchmarks/tune.py`` writes one file for each kind of card, ``measured/<card>.json``. Where there is none for the card that
is here, our kernels are cut as :mod:`.tuning` thinks right, and "auto" is torch's own.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections import Counter
from functools import cache, lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..core.errors import Note

FOLDER = Path(__file__).parent / "measured"
FORMAT = 1
OCTAVES = 1.0
"""How far from a measured size another is still taken to be like it."""


class Blocks(NamedTuple):
    """A tile of queries by keys, and what the compiler is told of it."""

    queries: int
    keys: int
    warps: int
    stages: int


class Strips(NamedTuple):
    """A tile of places by channels for the group norm, and how long a stretch one program takes statistics of."""

    places: int
    channels: int
    stretch: int
    warps: int


class Rows(NamedTuple):
    """Whole rows for one program."""

    rows: int
    warps: int


class Tile(NamedTuple):
    """Rows by columns for one program."""

    rows: int
    columns: int
    warps: int


Cut = Blocks | Strips | Rows | Tile
CUTS: dict[str, type[Blocks] | type[Strips] | type[Rows] | type[Tile]] = {
    "attention": Blocks, "group_norm_silu": Strips, "layer_norm": Rows, "add_layer_norm": Rows, "geglu": Tile,
}  # fmt: skip
POWERS = tuple(1 << i for i in range(14))
ALLOWED = {
    "warps": POWERS[:5], "stages": range(1, 9), "stretch": range(1, 1 << 31), "queries": POWERS[4:], "keys": POWERS[4:],
}  # fmt: skip
"""Of the numbers of a cut, else powers of two: what Triton would not compile is not read."""


class Key(NamedTuple):
    """What is looked up: ``same`` has to be equal, the sizes ``near`` within an octave each."""

    operation: str
    dtype: torch.dtype
    same: tuple[int, ...]
    near: tuple[int, ...]


class Measured(NamedTuple):
    """Of one shape: the best cut of our kernel, if it was right, and microseconds of every backend that was."""

    key: Key
    cut: Cut | None
    microseconds: dict[str, float]

    @property
    def fastest(self) -> str:
        """The backend."""
        return min(self.microseconds, key=lambda name: self.microseconds[name])


class Table(NamedTuple):
    """All of one card; ``about`` is when and with what it was measured."""

    about: str = ""
    rows: tuple[Measured, ...] = ()


@cache
def card(device: torch.device) -> str | None:
    """The card's name; None of what is none."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


def find(key: Key, device: torch.device) -> Measured | None:
    """What was measured on this card at these sizes, or at the nearest ones that are like them; None if nothing was."""
    name = card(device)
    return None if name is None else _nearest(key, name)


@lru_cache(maxsize=4096)
def _nearest(key: Key, name: str) -> Measured | None:
    best, least = None, math.inf
    for row in table(name).rows:
        if row.key[:3] != key[:3] or len(row.key.near) != len(key.near):
            continue
        apart = [abs(math.log2(max(here, 1) / there)) for here, there in zip(key.near, row.key.near, strict=True)]
        if max(apart, default=0.0) <= OCTAVES and sum(apart) < least:
            best, least = row, sum(apart)
    return best


@cache
def table(name: str) -> Table:
    """Of the card of that name, read once; empty if there is none, and with a Note if it cannot be used."""
    path = file(name)
    if not path.exists():
        return Table()
    try:
        return read(path, name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        why = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        warnings.warn(
            f"What was measured on {name} is not used ({path.name}: {why}), and auto is torch's own: run benchmarks/tune.py "
            "on the card to measure it again.",
            Note,
            stacklevel=2,
        )
        return Table()


def file(name: str, folder: Path | None = None) -> Path:
    """Where a card's measurements lie."""
    return (folder or FOLDER) / (re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") + ".json")


def read(path: Path, name: str) -> Table:
    """A file of measurements of that card.

    Raises:
        ValueError, KeyError, TypeError, AttributeError, OSError: it is damaged, of another card, or out of date.
    """
    found = json.loads(path.read_text(encoding="utf-8"))
    if found["format"] != FORMAT:
        raise ValueError(f"it has format {found['format']}, not {FORMAT}")
    if found["card"] != name:
        raise ValueError(f"it is of {found['card']!r}")
    for library in ("torch", "triton"):
        then, now = found["versions"][library], installed(library)
        if now is not None and then is not None and then.split(".")[:2] != now.split(".")[:2]:
            raise ValueError(f"it was measured with {library} {then}, and this is {now}")
    about = f"{found['date']}, torch {found['versions']['torch']}, triton {found['versions']['triton']}"
    return Table(about, tuple(_row(row) for row in found["rows"]))


def _row(row: dict[str, Any]) -> Measured:
    operation, dtype = row["operation"], getattr(torch, row["dtype"])
    key = Key(operation, dtype, tuple(row["same"]), tuple(row["near"]))
    cut = None if row["cut"] is None else CUTS[operation](**row["cut"])
    times = row["microseconds"]
    right = (
        isinstance(dtype, torch.dtype)
        and all(type(n) is int for n in key.same)
        and all(type(n) is int and n > 0 for n in key.near)
        and (cut is None or all(type(n) is int and n in ALLOWED.get(part, POWERS) for part, n in cut._asdict().items()))
        and bool(times)
        and all(type(t) in (int, float) and 0 < t < math.inf for t in times.values())
    )
    if not right:
        raise ValueError(f"it says {json.dumps(row)[:200]}")
    return Measured(key, cut, times)


def written(row: Measured) -> dict[str, Any]:
    """A row as it stands in the file."""
    operation, dtype, same, near = row.key
    cut = None if row.cut is None else row.cut._asdict()
    key = {"operation": operation, "dtype": str(dtype).removeprefix("torch."), "same": same, "near": near}
    return {**key, "cut": cut, "microseconds": row.microseconds}


def summary(name: str) -> str | None:
    """One sentence of what "auto" follows on the card of that name; None if nothing was measured there."""
    measured = table(name)
    if not measured.rows:
        return None
    wins = Counter((row.key.operation, row.fastest) for row in measured.rows)
    parts = [f"{operation} by {backend} at {count}" for (operation, backend), count in wins.items()]
    return f"On {name} auto follows what was measured there ({measured.about}), in shapes: {', '.join(parts)}."


def installed(library: str) -> str | None:
    """Its version; None if it is not there."""
    try:
        return version(library)
    except PackageNotFoundError:
        return None
