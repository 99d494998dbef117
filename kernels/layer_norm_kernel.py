"""The kernel of :mod:`.layer_norm`: some whole rows, read once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .backends import on_its_card
from .measured_table import Rows
from .tuning import row_blocks


@on_its_card
def launch(
    x: Tensor, more: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, blocks: Rows | None = None
) -> tuple[Tensor, Tensor]:
    """The sum (x itself without ``more``) and its norm, contiguous."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = x if more is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not x.numel():
        return total, out
    size = x.shape[-1]
    rows = x.reshape(-1, size)
    more_rows = rows if more is None else more.reshape(-1, size)
    blocks = blocks or row_blocks("layer_norm" if more is None else "add_layer_norm", x)
    _norm[(triton.cdiv(len(rows), blocks.rows),)](
        rows, more_rows, *(x if part is None else part.contiguous() for part in (weight, bias)), total, out,
        *rows.stride(), *more_rows.stride(), len(rows), eps,
        HAS_MORE=more is not None, HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None,
        SIZE=size, PADDED=triton.next_power_of_2(size), ROWS=blocks.rows, num_warps=blocks.warps,
    )  # fmt: skip
    return total, out


@triton.jit
def _norm(
    X, MORE, WEIGHT, BIAS, TOTAL, OUT, stride_xm, stride_xn, stride_mm, stride_mn, rows, eps,
    HAS_MORE: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    SIZE: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    m = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None].to(tl.int64)
    j = tl.arange(0, PADDED)
    n, in_row = j[None, :], j < SIZE
    inside = (m < rows) & in_row[None, :]
    x = tl.load(X + m * stride_xm + n * stride_xn, mask=inside, other=0.0)
    if HAS_MORE:
        x = x.to(tl.float32) + tl.load(MORE + m * stride_mm + n * stride_mn, mask=inside, other=0.0).to(tl.float32)
        # The norm is of the sum as it goes on, rounded.
        x = x.to(TOTAL.dtype.element_ty)
        tl.store(TOTAL + m * SIZE + n, x, mask=inside)
    x = x.to(tl.float32)
    away = tl.where(inside, x - (tl.sum(x, 1) / SIZE)[:, None], 0.0)
    out = away * (1.0 / tl.sqrt(tl.sum(away * away, 1) / SIZE + eps))[:, None]
    if HAS_WEIGHT:
        out *= tl.load(WEIGHT + j, mask=in_row, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        out += tl.load(BIAS + j, mask=in_row, other=0.0).to(tl.float32)[None, :]
    tl.store(OUT + m * SIZE + n, out.to(OUT.dtype.element_ty), mask=inside)
