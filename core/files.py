"""Writing that never leaves half a file and never overwrites."""

from __future__ import annotations

import glob
import os
import secrets
import tempfile
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import BinaryIO

from .errors import CannotWrite


def write_atomically(path: str | Path, data: bytes) -> Path:
    """Write ``data`` beside ``path``, flush it to the disk, then move it into place.

    Raises:
        CannotWrite: the disk is full or the folder may not be written; nothing is left behind.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:  # Ctrl-C too
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    return path


def held(path: Path) -> BinaryIO | None:
    """A file opened, and known to be in use while it is open or its process lives; None if it is in use already.

    On Windows nothing is known of other processes, and an open file could not be replaced.
    """
    try:
        from fcntl import LOCK_EX, LOCK_NB, flock
    except ImportError:
        return open(os.devnull, "rb")
    file = path.open("rb")
    try:
        flock(file, LOCK_EX | LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    except OSError:
        pass  # a file system that knows no locks
    return file


def leftovers(folder: Path, name: str) -> None:
    """Remove the temporary files of a killed :func:`write_atomically` of ``name``, whatever its ending."""
    for file in folder.glob(f".{glob.escape(name)}*.????????"):
        file.unlink(missing_ok=True)


def claim(folder: Path, stem: str, ending: str, announce: Callable[[str], object] = lambda name: None) -> Path:
    """The first of ``stem_000``, ``stem_001``, … in ``folder`` that no file uses, as a path without an ending.

    Claimed by making ``stem_000<ending>`` exclusively, so that two processes never write to one name;
    write that file last, or delete it. ``announce`` is told every name before it is tried.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for number in count(_first_free({path.name for path in folder.iterdir()}, stem)):
            path = folder / f"{stem}_{number:03d}"
            announce(path.name)
            try:
                path.with_name(path.name + ending).touch(exist_ok=False)
            except FileExistsError:
                continue
            return path
    except OSError as error:
        raise _cannot_write(folder, error) from error
    raise AssertionError("unreachable: count() does not end")


def require_writable(folder: Path) -> None:
    """Raise CannotWrite now if nothing can be written into ``folder``, rather than after the work; makes it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise _cannot_write(folder, error) from error


def _cannot_write(path: Path, error: OSError) -> CannotWrite:
    return CannotWrite(
        f"Could not write {path} ({error.strerror}): choose another folder with --output, or free some space."
    )


def _first_free(names: set[str], stem: str) -> int:
    rests = [name.removeprefix(f"{stem}_") for name in names if name.startswith(f"{stem}_")]
    numbers = [rest.split(".")[0].split("-")[0] for rest in rests]
    return max((int(n) + 1 for n in numbers if n.isdigit()), default=0)
