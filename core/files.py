"""Writing that never leaves half a file and never overwrites."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from itertools import count
from pathlib import Path

from .errors import CannotWrite


def write_atomically(path: str | Path, data: bytes) -> Path:
    """Write ``data`` beside ``path``, flush it to the disk, then move it into place.

    Raises:
        CannotWrite: the disk is full or the folder may not be written; nothing is left behind.
    """
    path = Path(path)
    temporary = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
        temporary = ""
    except OSError as error:
        raise CannotWrite(
            f"Could not write {path} ({error.strerror}): free some space or choose another folder with --output."
        ) from error
    finally:  # Ctrl-C too
        if temporary:
            Path(temporary).unlink(missing_ok=True)
    return path


def numbered(folder: Path, stem: str) -> Iterator[Path]:
    """``folder/stem_000``, ``_001`` and so on (without an ending), from the first number no file uses."""
    taken = {p.name for p in folder.iterdir() if p.name.startswith(f"{stem}_")} if folder.is_dir() else set()
    return (folder / f"{stem}_{i:03d}" for i in count(_first_free(taken, stem)))


def _first_free(names: set[str], stem: str) -> int:
    numbers = [name.removeprefix(f"{stem}_").split(".")[0].split("-")[0] for name in names]
    return max((int(n) + 1 for n in numbers if n.isdigit()), default=0)


def _umask() -> int:
    # There is no way to read the mask but to set it.
    mask = os.umask(0)
    os.umask(mask)
    return mask
