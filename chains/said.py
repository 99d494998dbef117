"""What is said of a stage: its name in whatever goes wrong in it, and its notes."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..core.errors import Note, OutOfMemory, UnrolledError
from .chain import Stage


@contextmanager
def named(stage: Stage) -> Iterator[None]:
    """Name the stage in whatever goes wrong in it."""
    try:
        yield
    except UnrolledError as error:
        raise type(error)(f"Stage {stage.name!r}: {error}") from error
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise OutOfMemory(_memory_sentence(stage)) from error
    except RuntimeError as error:
        if "alloc" in str(error) and "memory" in str(error):
            raise OutOfMemory(_memory_sentence(stage)) from error
        raise


def _memory_sentence(stage: Stage) -> str:
    return f"Stage {stage.name!r} ran out of memory: make the batch or the picture smaller, or use --dtype float16 on a GPU."


@contextmanager
def noted(notes: list[str]) -> Iterator[None]:
    """Collect notes, and let every other warning through."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", Note)
        show = warnings.showwarning

        def collect(message: Warning | str, category: type[Warning], *rest: object, **more: object) -> None:
            if issubclass(category, Note):
                notes.append(str(message))
            else:
                show(message, category, *rest, **more)  # type: ignore[arg-type]

        warnings.showwarning = collect
        yield
