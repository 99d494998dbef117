"""The kernel of :mod:`.attention_maps`: a tile of queries by tokens, summed over the heads where it is computed."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_forward import EXACT, LOG2_E, _bias, aligned, bias_kind, bias_strides
from .backends import on_its_card
from .tuning import maps_blocks


@on_its_card
def launch(q: Tensor, k: Tensor, tokens: Tensor, lse: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """(batch, queries, tokens) in float32."""
    batch, queries, heads, size = q.shape
    q, k = (part if part.stride(-1) == 1 else part.contiguous() for part in (q, k))
    tokens = tokens.to(q.device).contiguous()
    out = torch.empty(batch, queries, len(tokens), dtype=torch.float32, device=q.device)
    blocks = maps_blocks(q)
    _maps[(triton.cdiv(queries, blocks.queries), triton.cdiv(len(tokens), blocks.keys), batch)](
        q, k, tokens, lse.contiguous(), q if bias is None else bias, out,
        *q.stride()[:3], *k.stride()[:3], *bias_strides(bias, (batch, heads, queries, len(tokens))),
        heads, queries, len(tokens), scale,
        SIZE=size, PADDED=max(16, triton.next_power_of_2(size)), ALIGN=aligned(q, k), **bias_kind(bias),
        BLOCK_M=blocks.queries, BLOCK_T=blocks.keys, num_warps=blocks.warps, num_stages=blocks.stages,
    )  # fmt: skip
    return out


@triton.jit
def _maps(
    Q, K, TOKENS, LSE, BIAS, OUT,
    stride_qb, stride_qm, stride_qh, stride_kb, stride_kn, stride_kh, stride_bb, stride_bh, stride_bm, stride_bt,
    heads, queries, count, sm_scale,
    SIZE: tl.constexpr, PADDED: tl.constexpr, ALIGN: tl.constexpr, HAS_BIAS: tl.constexpr, PER_QUERY: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(2).to(tl.int64)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.arange(0, PADDED)
    in_m, in_t, in_d = m < queries, t < count, d < SIZE
    inside, rows = in_m[:, None] & in_t[None, :], m[:, None].to(tl.int64)
    n = tl.load(TOKENS + t, mask=in_t, other=0).to(tl.int64)
    mean = tl.zeros([BLOCK_M, BLOCK_T], tl.float32)
    for head in range(heads):
        q_at = Q + tl.multiple_of(batch * stride_qb + head * stride_qh, ALIGN) + rows * stride_qm
        q = tl.load(q_at + d[None, :], mask=in_m[:, None] & in_d[None, :], other=0.0)
        k_at = K + tl.multiple_of(batch * stride_kb + head * stride_kh, ALIGN) + n[None, :] * stride_kn
        k = tl.load(k_at + d[:, None], mask=in_t[None, :] & in_d[:, None], other=0.0)
        scores = tl.dot(q, k, input_precision=EXACT) * (sm_scale * LOG2_E)
        if HAS_BIAS:
            bias_at = BIAS + batch * stride_bb + head * stride_bh
            scores += _bias(bias_at, m, t, stride_bm, stride_bt, in_m, in_t, PER_QUERY) * LOG2_E
        lse = tl.load(LSE + (batch * heads + head) * queries + m, mask=in_m, other=float("-inf"))
        # A query that is left no key attends to none.
        known = inside & (lse > float("-inf"))[:, None]
        mean += tl.where(known, tl.exp2(tl.where(known, scores - (lse * LOG2_E)[:, None], 0.0)), 0.0)
    at = OUT + (batch * queries + rows) * count + t[None, :]
    tl.store(at, mean / heads, mask=inside)
