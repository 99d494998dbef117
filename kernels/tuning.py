"""How our kernels cut their work into blocks, by shape: what was measured on this card, else what ought to do well."""

from __future__ import annotations

import math
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from .measured_table import Blocks, Key, Rows, Strips, Tile, find

HOPPER = 232_448
"""Bytes of shared memory that one program may have there."""


def attention_key(q: Tensor, keys: int) -> Key:
    """What attention is looked up by; q is (batch, queries, heads, head size)."""
    batch, queries, heads, size = q.shape
    return Key("attention", q.dtype, (size,), (batch * heads, queries, keys))


def attention_blocks(q: Tensor, keys: int, *, biased: bool = False) -> Blocks:
    """For the forward kernel; nothing was measured with a bias.

    Unmeasured, large heads leave room for small tiles only, 77 keys are one block, and a grid that fills the card comes
    before a large tile.
    """
    key = attention_key(q, keys)
    measured = None if biased else _measured(key, q.device, Blocks)
    return fitting(measured or _attention_blocks(q, keys, biased), key, q.device)


def room(device: torch.device) -> int:
    """Bytes of shared memory for one program; as on Hopper where there is no card to ask."""
    if device.type != "cuda":
        return HOPPER
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", HOPPER)


def fitting(blocks: Blocks, key: Key, device: torch.device) -> Blocks:
    """The same, or smaller until the queries and every stage's keys and values find room."""
    row, most = key.same[0] * key.dtype.itemsize, room(device)
    m, n, warps, stages = blocks
    while (m + 2 * stages * n) * row > most and (m, n, stages) != (16, 16, 1):
        m, n, stages = (m, n, stages - 1) if stages > 1 else (max(16, m // 2), max(16, n // 2), 1)
    return Blocks(m, n, warps, stages)


def _attention_blocks(q: Tensor, keys: int, biased: bool) -> Blocks:
    batch, queries, heads, size = q.shape
    wide = q.element_size() > 2
    if size > 160:
        return Blocks(32 if wide else 64, 16 if wide else 32, 8, 1 if wide else 2)
    if wide:
        return Blocks(32, 32, 4, 2)
    if keys <= 128 and size <= 80:
        return Blocks(128, 64 if biased else 128, 8, 1)  # registers hold no tile of 128 and its bias too
    fills = batch * heads * -(-queries // 128) >= 2 * 132
    return Blocks(128 if fills and size <= 128 else 64, 64, 4, 3 if size <= 80 else 2)


class Passes(NamedTuple):
    """What a program of a backward kernel keeps of one side, and how much of the other it goes through at a time."""

    kept: int
    passed: int
    warps: int
    stages: int


def backward_passes(q: Tensor) -> Passes:
    """For the two backward kernels, which hold twice as much as the forward; not measured."""
    size, wide = q.shape[-1], q.element_size() > 2
    row, most = _power(max(16, size)) * q.element_size(), room(q.device)
    if size > 160 or (wide and size > 64):
        kept, passed, warps, stages = 16, 16, 8 if size > 160 else 4, 1
    else:
        kept, passed, warps, stages = (32, 32, 4, 1) if wide or size > 80 else (64, 64, 4, 2)
    # Two tensors of either side, and the tile of scores. A product sums over what is passed: 16 at the least.
    while 2 * (kept + stages * passed) * row + kept * passed * q.element_size() > most and (kept, stages) != (8, 1):
        kept, passed, stages = (kept, passed, 1) if stages > 1 else (kept // 2, max(16, passed // 2), 1)
    return Passes(kept, passed, warps, stages)


def maps_blocks(q: Tensor) -> Blocks:
    """For the maps of chosen tokens, of which there are few: 16, the least a product takes; not measured."""
    size, wide = q.shape[-1], q.element_size() > 2
    return Blocks(16 if wide and size > 128 else 64, 16, 4, 1 if size > 128 else 2)


def key_of(operation: str, x: Tensor) -> Key:
    """What any other operation on x is looked up by: a group norm as (batch, channels, places), the others as rows."""
    if operation == "group_norm_silu":
        batch, channels = x.shape[:2]
        return Key(operation, x.dtype, (int(x.stride(1) == 1),), (batch, channels, math.prod(x.shape[2:])))
    return Key(operation, x.dtype, (), (math.prod(x.shape[:-1]), *x.shape[-1:]))


def group_norm_strips(x: Tensor) -> Strips:
    """For pictures (batch, channels, …).

    Unmeasured, neighbours in memory lie along the longer side of a tile: 64 channels divide those of all our networks,
    and are one line of 128 bytes. Stretches are as long as leaves four programs for each of 132 multiprocessors.
    """
    key = key_of("group_norm_silu", x)
    if measured := _measured(key, x.device, Strips):
        return measured
    (channels_last,), (batch, channels, length) = key.same, key.near
    wide = 64 if channels_last else max(4, 4096 // min(_power(length), 1024))
    wide = min(wide, _power(channels))
    places = min(_power(length), 4096 // wide)
    tiles = -(-length // places)
    splits = min(tiles, -(-4 * 132 // (batch * -(-channels // wide))))
    return Strips(places, wide, -(-tiles // splits) * places, 4)


def row_blocks(operation: str, x: Tensor) -> Rows:
    """For the layer norms, whose rows are the last dimension.

    Unmeasured, 4096 numbers a program, fewer if rows are few.
    """
    key = key_of(operation, x)
    if measured := _measured(key, x.device, Rows):
        return measured
    count, size = key.near
    padded = _power(size)
    fills = max(1, _power(count) // 1024)
    return Rows(min(max(1, 4096 // padded), fills), 4 if padded <= 4096 else 8)


def geglu_tile(projected: Tensor) -> Tile:
    """For rows of values and gates; unmeasured, 2048 results a program, two loads each."""
    columns = min(_power(projected.shape[-1] // 2), 512)
    guess = Tile(2048 // columns, columns, 4)
    return _measured(key_of("geglu", projected), projected.device, Tile) or guess


T = TypeVar("T", Blocks, Strips, Rows, Tile)


def _measured(key: Key, device: torch.device, kind: type[T]) -> T | None:
    found = find(key, device)
    return found.cut if found is not None and isinstance(found.cut, kind) else None


def _power(n: int) -> int:
    """The least power of two that is not less."""
    return 1 << max(n - 1, 0).bit_length()
