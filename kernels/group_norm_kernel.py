"""The kernels of :mod:`.group_norm_silu`: statistics by stretches, put together, applied.

A picture is (length, channels) with any strides: in channels-last the channels are neighbours, else the places are.
Statistics are taken per channel over a stretch of the picture, so that a large group keeps the whole card busy, and as
a mean and the squared distances from it, which are put together exactly (Chan et al., 1983): a difference of large
sums of squares would leave nothing of a small variance around a large mean.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .backends import on_its_card
from .layout import flat, memory_format
from .measured_table import Strips
from .tuning import group_norm_strips


@on_its_card
def launch(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    silu: bool,
    strips: Strips | None = None,
) -> Tensor:
    """Like x, in its memory format."""
    out = torch.empty_like(x, memory_format=memory_format(x))
    if not x.numel():
        return out
    x, strides = flat(x)
    batch, channels = x.shape[:2]
    length = x.numel() // (batch * channels)
    strips = strips or group_norm_strips(x)
    splits = triton.cdiv(length, strips.stretch)
    partial = torch.empty(batch, splits, 2, channels, dtype=torch.float32, device=x.device)
    folded = torch.empty(batch, 3, channels, dtype=torch.float32, device=x.device)
    blocks = {"BLOCK_S": strips.places, "BLOCK_C": strips.channels, "num_warps": strips.warps}
    across = triton.cdiv(channels, strips.channels)
    _statistics[(splits, across, batch)](x, partial, *strides, channels, length, strips.stretch, **blocks)
    _fold[(groups, batch)](
        partial, folded, *(x if part is None else part.contiguous() for part in (weight, bias, scale, shift)),
        channels, length, strips.stretch, splits, eps,
        HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None, MODULATED=scale is not None,
        GROUP=channels // groups, PADDED=triton.next_power_of_2(channels // groups), BLOCK=64, num_warps=4,
    )  # fmt: skip
    _apply[(triton.cdiv(length, strips.places), across, batch)](
        x, folded, out, *strides, *flat(out)[1], channels, length, SILU=silu, **blocks
    )
    return out


@triton.jit
def _statistics(
    X, PARTIAL, stride_xn, stride_xc, stride_xs, channels, length, stretch, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Of one stretch of the picture, every channel's mean and sum of squared distances from it."""
    split, n = tl.program_id(0), tl.program_id(2).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c, stop = c < channels, tl.minimum((split + 1) * stretch, length)
    x_at = X + n * stride_xn + c[None, :].to(tl.int64) * stride_xc
    # Distances from the stretch's first place keep the digits that a mean far from 0 would cost.
    first = tl.load(x_at + (split * stretch).to(tl.int64) * stride_xs, mask=in_c[None, :], other=0.0).to(tl.float32)
    seen = tl.zeros([BLOCK_C], tl.float32)
    mean = tl.zeros([BLOCK_C], tl.float32)
    squares = tl.zeros([BLOCK_C], tl.float32)
    for start in range(split * stretch, stop, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        inside = (s < stop)[:, None] & in_c[None, :]
        x = tl.load(x_at + s[:, None].to(tl.int64) * stride_xs, mask=inside, other=0.0).to(tl.float32)
        x = tl.where(inside, x - first, 0.0)
        count = tl.minimum(stop - start, BLOCK_S).to(tl.float32)
        here = tl.sum(x, 0) / count
        away = tl.where(inside, x - here[None, :], 0.0)
        apart = here - mean
        squares += tl.sum(away * away, 0) + apart * apart * (seen * count / (seen + count))
        mean += apart * (count / (seen + count))
        seen += count
    at = PARTIAL + (n * tl.num_programs(0) + split) * 2 * channels + c
    tl.store(at, mean + tl.sum(first, 0), mask=in_c)
    tl.store(at + channels, squares, mask=in_c)


@triton.jit
def _fold(
    PARTIAL, FOLDED, WEIGHT, BIAS, SCALE, SHIFT, channels, length, stretch, splits, eps,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, MODULATED: tl.constexpr,
    GROUP: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One group's stretches and channels put together: what to subtract, multiply and add in each of its channels."""
    n = tl.program_id(1).to(tl.int64)
    j = tl.arange(0, PADDED)
    c, in_group = tl.program_id(0) * GROUP + j, j < GROUP
    part_at = PARTIAL + n * splits * 2 * channels + c[None, :]
    # Two passes: the mean first, then the distances from it.
    base = tl.load(PARTIAL + n * splits * 2 * channels + tl.program_id(0) * GROUP)
    mean = base * 1.0
    for start in range(0, splits, BLOCK):
        split = start + tl.arange(0, BLOCK)
        inside = (split < splits)[:, None] & in_group[None, :]
        count = tl.minimum(length - split * stretch, stretch).to(tl.float32)
        means = tl.load(part_at + split[:, None] * 2 * channels, mask=inside, other=0.0)
        mean += tl.sum(tl.where(inside, means - base, 0.0) * (count / length)[:, None]) / GROUP
    variance = 0.0
    for start in range(0, splits, BLOCK):
        split = start + tl.arange(0, BLOCK)
        inside = (split < splits)[:, None] & in_group[None, :]
        count = tl.minimum(length - split * stretch, stretch).to(tl.float32)
        means = tl.load(part_at + split[:, None] * 2 * channels, mask=inside, other=0.0)
        squares = tl.load(part_at + split[:, None] * 2 * channels + channels, mask=inside, other=0.0)
        apart = tl.where(inside, means - mean, 0.0)
        variance += tl.sum(squares / length + apart * apart * (count / length)[:, None]) / GROUP
    scale = 1.0 / tl.sqrt(variance + eps) + tl.zeros([PADDED], tl.float32)
    shift = tl.zeros([PADDED], tl.float32)
    if HAS_WEIGHT:
        scale *= tl.load(WEIGHT + c, mask=in_group, other=0.0).to(tl.float32)
    if HAS_BIAS:
        shift += tl.load(BIAS + c, mask=in_group, other=0.0).to(tl.float32)
    if MODULATED:
        spread = 1.0 + tl.load(SCALE + n * channels + c, mask=in_group, other=0.0).to(tl.float32)
        scale *= spread
        shift = shift * spread + tl.load(SHIFT + n * channels + c, mask=in_group, other=0.0).to(tl.float32)
    at = FOLDED + n * 3 * channels + c
    tl.store(at, mean + tl.zeros([PADDED], tl.float32), mask=in_group)
    tl.store(at + channels, scale, mask=in_group)
    tl.store(at + 2 * channels, shift, mask=in_group)


@triton.jit
def _apply(
    X, FOLDED, OUT, stride_xn, stride_xc, stride_xs, stride_on, stride_oc, stride_os, channels, length,
    SILU: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A tile of the picture."""
    n = tl.program_id(2).to(tl.int64)
    s = (tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S))[:, None].to(tl.int64)
    c = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :].to(tl.int64)
    inside, at = (s < length) & (c < channels), FOLDED + n * 3 * channels + c
    mean = tl.load(at, mask=c < channels, other=0.0)
    scale = tl.load(at + channels, mask=c < channels, other=0.0)
    shift = tl.load(at + 2 * channels, mask=c < channels, other=0.0)
    x = tl.load(X + n * stride_xn + s * stride_xs + c * stride_xc, mask=inside, other=0.0).to(tl.float32)
    out = (x - mean) * scale + shift
    if SILU:
        out = out * tl.sigmoid(out)
    tl.store(OUT + n * stride_on + s * stride_os + c * stride_oc, out.to(OUT.dtype.element_ty), mask=inside)
