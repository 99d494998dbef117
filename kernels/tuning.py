"""How our kernels cut their work into blocks, by shape: what was measured, else what ought to do well."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

HOPPER = 232_448
"""Bytes of shared memory that one program may have there."""


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
    return _fitting(_attention_blocks(q, keys), q.shape[-1] * q.element_size(), room(q.device))


def room(device: torch.device) -> int:
    """Bytes of shared memory for one program; as on Hopper where there is no card to ask."""
    if device.type != "cuda":
        return HOPPER
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", HOPPER)


def _fitting(blocks: Blocks, row: int, room: int) -> Blocks:
    """The same, or smaller until the queries and every stage's keys and values, of ``row`` bytes each, find room."""
    m, n, warps, stages = blocks
    while (m + 2 * stages * n) * row > room and (m, n, stages) != (16, 16, 1):
        m, n, stages = (m, n, stages - 1) if stages > 1 else (max(16, m // 2), max(16, n // 2), 1)
    return Blocks(m, n, warps, stages)


def _attention_blocks(q: Tensor, keys: int) -> Blocks:
    batch, queries, heads, size = q.shape
    wide = q.element_size() > 2
    if size > 160:
        return Blocks(32 if wide else 64, 16 if wide else 32, 8, 1 if wide else 2)
    if wide:
        return Blocks(32, 32, 4, 2)
    if keys <= 128 and size <= 80:
        return Blocks(64, 128, 4, 1)
    fills = batch * heads * -(-queries // 128) >= 2 * 132
    return Blocks(128 if fills and size <= 128 else 64, 64, 4, 3 if size <= 80 else 2)


def backward_blocks(q: Tensor, keys: int) -> Blocks:
    """For the two backward kernels, which hold twice as much; not measured either."""
    size, wide = q.shape[-1], q.element_size() > 2
    if size > 160 or (wide and size > 64):
        return Blocks(16, 16, 8 if size > 160 else 4, 1)
    return Blocks(32, 32, 4, 1) if wide or size > 80 else Blocks(64, 64, 4, 2)


def maps_blocks(q: Tensor) -> Blocks:
    """For the maps of chosen tokens, of which there are few: 16, the least a product takes; not measured."""
    size, wide = q.shape[-1], q.element_size() > 2
    return Blocks(16 if wide and size > 128 else 64, 16, 4, 1 if size > 128 else 2)


class Strips(NamedTuple):
    """A tile of places by channels for the group norm, and how long a stretch one program takes statistics of."""

    places: int
    channels: int
    stretch: int
    warps: int


def group_norm_strips(batch: int, channels: int, length: int, *, channels_last: bool) -> Strips:
    """For pictures of ``length`` places; not measured.

    Neighbours in memory lie along the longer side of a tile: 64 channels divide those of all our networks, and are one
    line of 128 bytes. Stretches are as long as leaves four programs for each of 132 multiprocessors.
    """
    wide = 64 if channels_last else max(4, 4096 // min(_power(length), 1024))
    wide = min(wide, _power(channels))
    places = min(_power(length), 4096 // wide)
    tiles = -(-length // places)
    splits = min(tiles, -(-4 * 132 // (batch * -(-channels // wide))))
    return Strips(places, wide, -(-tiles // splits) * places, 4)


class Rows(NamedTuple):
    """Whole rows for one program."""

    rows: int
    warps: int


def row_blocks(count: int, size: int) -> Rows:
    """For the layer norms, ``count`` rows of ``size``; not measured: 4096 numbers a program, fewer if rows are few."""
    padded = _power(size)
    fills = max(1, _power(count) // 1024)
    return Rows(min(max(1, 4096 // padded), fills), 4 if padded <= 4096 else 8)


class Tile(NamedTuple):
    """Rows by columns for one program."""

    rows: int
    columns: int
    warps: int


def geglu_tile(size: int) -> Tile:
    """For rows of ``size`` results; not measured: 2048 of them a program, two loads each."""
    columns = min(_power(size), 512)
    return Tile(2048 // columns, columns, 4)


def _power(n: int) -> int:
    """The least power of two that is not less."""
    return 1 << max(n - 1, 0).bit_length()
