"""How pictures lie in memory, seen as batch, channels and places, so that our kernels take them without a copy."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def memory_format(x: Tensor) -> torch.memory_format:
    """In which a result like ``x`` is written: channels-last if its channels are neighbours, whole or cut out."""
    last = x.ndim == 4 and x.stride(1) == 1 and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def flat_strides(x: Tensor) -> tuple[int, int, int] | None:
    """Of batch, channels and place, if all places are equally far apart; else None."""
    places = [(n, stride) for n, stride in zip(x.shape[2:], x.stride()[2:], strict=True) if n > 1]
    if any(stride != n * inner for (_, stride), (n, inner) in pairwise(places)):
        return None
    return x.stride(0), x.stride(1), places[-1][1] if places else 1


def flat(x: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """``x``, or a copy of it in its memory format, and its strides of batch, channels and place."""
    if (strides := flat_strides(x)) is None:
        x = x.contiguous(memory_format=memory_format(x))
        strides = flat_strides(x)
    assert strides is not None, "in either format all places are equally far apart"
    return x, strides
