"""The kernel of :mod:`.guided_step`: one read of everything, two writes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .backends import on_its_card
from .layout import flat

BLOCK = 1024  # not measured; latents are small and this is one short wave of programs


@on_its_card
def launch(
    x: Tensor, cond: Tensor, uncond: Tensor | None, history: Sequence[Tensor], noise: Tensor | None, numbers: Tensor
) -> tuple[Tensor, Tensor]:
    """The next x and x0, contiguous. The outputs may be channels-last, halves of a batch, or some of the channels."""
    x_next, x0 = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    if not x.numel():
        return x_next, x0
    x = x.contiguous()
    cond, cond_strides = flat(cond)
    without, without_strides = (cond, cond_strides) if uncond is None else flat(uncond)
    earlier = [past.contiguous() for past in history]
    channels = x.shape[1]
    length = x.numel() // (len(x) * channels)
    _step[(triton.cdiv(x.numel(), BLOCK),)](
        x, cond, without, *earlier, *[x] * (4 - len(earlier)), x if noise is None else noise.contiguous(),
        numbers, x_next, x0, *cond_strides, *without_strides, channels, length, x.numel(),
        GUIDED=uncond is not None, EARLIER=len(earlier), NOISY=noise is not None, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return x_next, x0


@triton.jit
def _step(
    X, COND, UNCOND, PAST_1, PAST_2, PAST_3, PAST_4, NOISE, NUMBERS, X_NEXT, X0,
    stride_cn, stride_cc, stride_cs, stride_un, stride_uc, stride_us, channels, length, total,
    GUIDED: tl.constexpr, EARLIER: tl.constexpr, NOISY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < total
    n, c, s = i // length // channels, i // length % channels, i % length
    x = tl.load(X + i, mask=inside, other=0.0).to(tl.float32)
    out = tl.load(COND + n * stride_cn + c * stride_cc + s * stride_cs, mask=inside, other=0.0).to(tl.float32)
    if GUIDED:
        without = tl.load(UNCOND + n * stride_un + c * stride_uc + s * stride_us, mask=inside, other=0.0).to(tl.float32)
        # From the side of the conditional one, as torch's lerp rounds it above a half.
        out += (tl.load(NUMBERS) - 1.0) * (out - without)
    x0 = tl.load(NUMBERS + 1) * x + tl.load(NUMBERS + 2) * out
    point = tl.load(NUMBERS + 3) * x + tl.load(NUMBERS + 4) * out
    x_next = tl.load(NUMBERS + 5) * x + tl.load(NUMBERS + 7) * point
    if EARLIER > 0:
        x_next += tl.load(NUMBERS + 8) * tl.load(PAST_1 + i, mask=inside, other=0.0).to(tl.float32)
    if EARLIER > 1:
        x_next += tl.load(NUMBERS + 9) * tl.load(PAST_2 + i, mask=inside, other=0.0).to(tl.float32)
    if EARLIER > 2:
        x_next += tl.load(NUMBERS + 10) * tl.load(PAST_3 + i, mask=inside, other=0.0).to(tl.float32)
    if EARLIER > 3:
        x_next += tl.load(NUMBERS + 11) * tl.load(PAST_4 + i, mask=inside, other=0.0).to(tl.float32)
    if NOISY:
        x_next += tl.load(NUMBERS + 6) * tl.load(NOISE + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(X_NEXT + i, x_next.to(X_NEXT.dtype.element_ty), mask=inside)
    tl.store(X0 + i, x0.to(X0.dtype.element_ty), mask=inside)
