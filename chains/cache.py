"""What stages have made before, kept on the disk: a run takes up where the first thing that has changed takes effect.

One file for every run of a stage, in a folder for everything that goes into all of its steps alike (:mod:`.keys`). Files are
written at once or not at all, and every tensor is checked against its digest when it is read, so that several processes may
share the folder and a damaged file is only made again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..core.errors import CannotWrite
from ..core.files import write_atomically
from ..core.latents import packed, unpacked
from ..core.loading import Shelf
from ..core.loop import Point
from .chain import Chain
from .keys import Keys, keys_of, stream_of
from .outputs import Output
from .plan import StagePlan
from .trail import Mark, digest


@dataclass(frozen=True)
class Kept:
    """What is known of a stage.

    Args:
        count: of its steps, the first so many.
        point: where it stood after them.
        marks: of those steps, of every image.
        pictures: that it made, if all of its steps are known and they were asked for.
        notes: that were made on the way, from its first step on.
    """

    count: int
    point: Point
    marks: list[list[Mark]]
    pictures: list[Image.Image]
    notes: list[str]


@dataclass(frozen=True)
class Cache:
    """A folder of what stages have made.

    Args:
        folder: is made when something is kept.
        limit: bytes; beyond them what was used longest ago goes.
    """

    folder: Path
    limit: int = 2 * 2**30

    @classmethod
    def usual(cls) -> Cache:
        """In the user's cache folder, or where the environment's UNROLLED_CACHE says."""
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        return cls(Path(os.environ.get("UNROLLED_CACHE") or home / "unrolled"))

    def find(self, keys: Keys) -> Kept | None:
        """The most that is known of a stage; damaged files that it meets are removed."""
        counts = [(self._known(path, keys), path) for path in (self.folder / keys.setting).glob("*.safetensors")]
        for count, path in sorted(counts, key=lambda found: -found[0]):
            if count and (kept := _read(path, count, len(keys.steps))):
                with suppress(OSError):
                    os.utime(path)
                return kept
        return None

    def put(
        self,
        keys: Keys,
        points: Sequence[Point],
        marks: Sequence[Sequence[Mark]],
        pictures: Sequence[Image.Image],
        notes: Sequence[str] = (),
    ) -> None:
        """Keep what a stage made; a full disk is no fault here.

        Args:
            points: where it stood after each of its steps, but for the first ones if those were known.
            marks: of all of its steps.
            notes: that were made on the way.
        """
        data = _written(keys.steps, points, marks, pictures, notes)
        if len(data) <= self.limit:
            with suppress(CannotWrite):
                write_atomically(self.folder / keys.setting / f"{keys.steps[-1]}.safetensors", data)
            self._make_room()

    def _known(self, path: Path, keys: Keys) -> int:
        """How many of the stage's first steps a file has."""
        try:
            with safe_open(path, framework="pt") as file:
                steps = _told(file)["steps"]
            same = [
                step for step, _ in takewhile(lambda pair: pair[0]["key"] == pair[1], zip(steps, keys.steps, strict=False))
            ]
            return max((i for i, step in enumerate(same, 1) if step["latents"]), default=0)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            _drop(path)
            return 0

    def _make_room(self) -> None:
        files = sorted(self._files(), key=lambda file: file[1].st_mtime_ns)
        total = sum(state.st_size for _, state in files)
        for path, state in files:
            if total <= self.limit:
                return
            _drop(path)
            total -= state.st_size
            with suppress(OSError):
                path.parent.rmdir()

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        for path in self.folder.glob("*/*"):  # what killed processes left half written too
            with suppress(OSError):  # another process may have removed it
                yield path, path.stat()


def foreseen(cache: Cache, chain: Chain, plans: Sequence[StagePlan], shelf: Shelf) -> dict[str, tuple[int, int]]:
    """By stage, how many of its steps are known and how many there are; the first that is not known whole is the last."""
    found, outputs = dict[str, tuple[int, int]](), dict[str, Output]()
    for index, item in enumerate(plans):
        before = chain.before(index)
        if not cache.folder.is_dir() or (before is not None and before.name not in outputs) or not item.on_disk:
            break
        keys = keys_of(chain, item, outputs[before.name] if before else None, stream_of(chain, index), shelf)
        if keys is None or (kept := cache.find(keys)) is None:
            break
        found[item.stage.name] = kept.count, len(keys.steps)
        if kept.count < len(keys.steps):
            break
        outputs[item.stage.name] = Output(kept.point.latents, kept.pictures)
    return found


def _written(
    keys: Sequence[str],
    points: Sequence[Point],
    marks: Sequence[Sequence[Mark]],
    pictures: Sequence[Image.Image],
    notes: Sequence[str],
) -> bytes:
    """A file of all of it; what several steps remember alike is in it once."""
    tensors = dict[str, Tensor]()

    def keep(tensor: Tensor) -> str:
        """Under its own digest."""
        tensors.setdefault(name := _digest_of(tensor), tensor)
        return name

    def kept(point: Point | None) -> dict[str, Any]:
        if point is None:
            return {"step": None, "latents": None}
        parts, facts = packed(point.latents)
        return {"step": point.step, "latents": facts, "names": {part: keep(tensor) for part, tensor in parts.items()}}

    whole = [*[None] * (len(keys) - len(points)), *points]
    steps = [kept(point) | {"key": key, "marks": images} for key, point, images in zip(keys, whole, marks, strict=True)]
    shown = [keep(torch.from_numpy(np.array(picture))) for picture in pictures]
    told = json.dumps({"steps": steps, "pictures": shown, "notes": list(notes)})
    data: bytes = save(tensors, {"told": told, "digest": digest(told.encode())})
    return data


def _told(file: Any) -> dict[str, Any]:
    """What a file says of its tensors; KeyError, TypeError or ValueError if it is damaged."""
    held = file.metadata()
    if digest(held["told"].encode()) != held["digest"]:
        raise ValueError("the digest is another one")
    told: dict[str, Any] = json.loads(held["told"])
    return told


def _read(path: Path, count: int, whole: int) -> Kept | None:
    """What a file has after so many steps; None, and no file any more, if that is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            told = _told(file)

            def tensor(name: str) -> Tensor:
                found: Tensor = file.get_tensor(name)
                if _digest_of(found) != name:
                    raise ValueError(name)
                return found

            step = told["steps"][count - 1]
            latents = unpacked(lambda part: tensor(step["names"][part]), step["latents"])
            marks = [[Mark(*mark) for mark in step["marks"]] for step in told["steps"][:count]]
            # A run that is stopped earlier has made no pictures of those of the one that went on.
            shown = told["pictures"] if count == whole == len(told["steps"]) else []
            pictures = [Image.fromarray(tensor(name).numpy()) for name in shown]
        return Kept(count, Point(latents, step["step"]), marks, pictures, told["notes"])
    except (OSError, SafetensorError, KeyError, IndexError, TypeError, ValueError):
        _drop(path)
        return None


def _drop(path: Path) -> None:
    """Remove a file, unless another process has, or it may not be: then it stays."""
    with suppress(OSError):
        path.unlink()


def _digest_of(tensor: Tensor) -> str:
    return digest(f"{tensor.dtype} {tuple(tensor.shape)}".encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
