"""What can go wrong, one sentence each: what was given, what is allowed, what to do.

The command line prints the sentence and leaves with the class's exit code.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar


class UnrolledError(Exception):
    """Any fault this package reports about its input; never a bug of its own."""

    exit_code: ClassVar[int] = 1


class BadInput(UnrolledError):
    """A value handed to a function or stage is not allowed."""

    exit_code = 2


class BadChain(UnrolledError):
    """A chain file or an override of it cannot be understood."""

    exit_code = 2


class BadModel(UnrolledError):
    """A checkpoint is missing, damaged, of another class, or not safe to read."""

    exit_code = 3


class SpaceMismatch(UnrolledError):
    """Latents of one latent space were handed to a model of another."""

    exit_code = 4


class NonFinite(UnrolledError):
    """NaN or infinity appeared; the message names the stage and step."""

    exit_code = 5


class OutOfMemory(UnrolledError):
    """The device ran out of memory; what was finished before is kept."""

    exit_code = 6


class CannotWrite(UnrolledError):
    """A result could not be written (full disk, no permission)."""

    exit_code = 7


class Note(UserWarning):
    """Something worth knowing that is no fault; the command line shows it and the manifest keeps it."""


def closest(given: str, known: Iterable[str]) -> str:
    """What may have been meant, to end a sentence with, if something known is like what was given."""

    def said(name: str) -> str:
        return name.lower().replace("+", "p").replace("-", "").replace("_", "")

    names = {said(name): name for name in known}
    near = difflib.get_close_matches(said(given), list(names), 1)
    return f"; did you mean {names[near[0]]!r}?" if near else ""
