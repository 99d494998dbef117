"""The kernel of :mod:`.geglu`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .backends import on_its_card
from .measured_table import Tile
from .tuning import geglu_tile

OVER_ROOT_2 = tl.constexpr(0.7071067811865476)


@on_its_card
def launch(projected: Tensor, tile: Tile | None = None) -> Tensor:
    """(…, n) of (…, 2 n), contiguous."""
    size = projected.shape[-1] // 2
    out = torch.empty(*projected.shape[:-1], size, dtype=projected.dtype, device=projected.device)
    if not out.numel():
        return out
    rows = projected.reshape(-1, 2 * size)
    tile = tile or geglu_tile(projected)
    _geglu[(triton.cdiv(len(rows), tile.rows), triton.cdiv(size, tile.columns))](
        rows, out, *rows.stride(), len(rows), size, ROWS=tile.rows, COLUMNS=tile.columns, num_warps=tile.warps
    )
    return out


@triton.jit
def _geglu(X, OUT, stride_m, stride_n, rows, size, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    m = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None].to(tl.int64)
    n = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside, at = (m < rows) & (n < size), X + m * stride_m + n * stride_n
    value = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(at + size * stride_n, mask=inside, other=0.0).to(tl.float32)
    out = value * gate * 0.5 * (1.0 + tl.erf(gate * OVER_ROOT_2))
    tl.store(OUT + m * size + n, out.to(OUT.dtype.element_ty), mask=inside)
