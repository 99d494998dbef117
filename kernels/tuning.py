"""How our kernels cut their work into blocks, by shape: what was measured, else what ought to do well."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Blocks(NamedTuple):
    """A tile of queries by keys, and what the compiler is told of it."""

    queries: int
    keys: int
    warps: int
    stages: int


def attention_blocks(q: Tensor, keys: int) -> Blocks:
    """For the forward kernel; q is (batch, queries, heads, head size).

    None of it has been measured yet: large heads leave room for small tiles only, 77 keys are one block, and a
    grid that fills the card comes before a large tile.
    """
    batch, queries, heads, size = q.shape
    wide = q.element_size() > 2
    if size > 160:
        return Blocks(32 if wide else 64, 16 if wide else 32, 8, 1 if wide else 2)
    if wide:
        return Blocks(32, 32, 4, 2)
    fills = batch * heads * -(-queries // 128) >= 2 * 132
    return Blocks(128 if fills and size <= 128 else 64, 128 if keys <= 128 and size <= 80 else 64, 4, 3 if size <= 80 else 2)


def backward_blocks(q: Tensor, keys: int) -> Blocks:
    """For the two backward kernels, which hold twice as much; not measured either."""
    size, wide = q.shape[-1], q.element_size() > 2
    if size > 160:
        return Blocks(16, 16, 8, 1)
    return Blocks(32, 32, 4, 1) if wide or size > 80 else Blocks(64, 64, 4, 2)
