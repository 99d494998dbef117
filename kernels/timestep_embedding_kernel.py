"""The kernel of :mod:`.timestep_embedding`."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .backends import on_its_card


@on_its_card
def launch(timesteps: Tensor, dim: int, flip_sin_to_cos: bool, freq_shift: float, max_period: float) -> Tensor:
    """(n, dim) in float32."""
    out = torch.empty(len(timesteps), dim, dtype=torch.float32, device=timesteps.device)
    if not len(timesteps):
        return out
    slope = -math.log(max_period) / (dim // 2 - freq_shift)
    # Too small to be worth measuring.
    _embed[(len(timesteps), triton.cdiv(dim, 256))](
        timesteps, out, timesteps.stride(0), dim, slope, COS_FIRST=flip_sin_to_cos, BLOCK=256, num_warps=4
    )
    return out


@triton.jit
def _embed(T, OUT, stride_t, dim, slope, COS_FIRST: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    half = dim // 2
    angle = tl.load(T + row * stride_t) * tl.exp((j % half).to(tl.float32) * slope)
    cosine = (j < half) == COS_FIRST
    out = tl.where(cosine, tl.cos(angle), tl.sin(angle))
    tl.store(OUT + row * dim + j, tl.where(j < 2 * half, out, 0.0), mask=j < dim)
