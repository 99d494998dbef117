"""Fused attention, backward: the scores computed again from the log-sum-exp (Dao, arXiv:2307.08691, alg. 2)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_forward import EXACT, LOG2_E, _bias, aligned, bias_kind, bias_strides
from .backends import on_its_card
from .tuning import Passes, backward_passes


@on_its_card
def launch(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    passes: Passes | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, each of its shape and contiguous."""
    batch, queries, heads, size = q.shape
    keys = k.shape[1]
    grad, q, k, v = (part if part.stride(-1) == 1 else part.contiguous() for part in (grad, q, k, v))
    # What the softmax takes off every row's gradient.
    delta = torch.einsum("bmhd,bmhd->bhm", grad.float(), out.float()).contiguous()
    dq, dk, dv = (torch.empty(part.shape, dtype=part.dtype, device=part.device) for part in (q, k, v))
    kept, passed, warps, stages = passes or backward_passes(q)
    inputs = (q, k, v, q if bias is None else bias, grad, lse, delta)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *grad.stride()[:3])
    strides = (*strides, *bias_strides(bias, (batch, heads, queries, keys)))
    options = {
        "SIZE": size, "PADDED": max(16, triton.next_power_of_2(size)), "ALIGN": aligned(grad, q, k, v, dq, dk),
        **bias_kind(bias), "num_warps": warps, "num_stages": stages,
    }  # fmt: skip
    sizes = (heads, queries, keys, scale)
    _of_keys[(triton.cdiv(keys, kept), batch * heads)](
        *inputs, dk, dv, *strides, *dk.stride()[:3], *sizes, **options, BLOCK_M=passed, BLOCK_N=kept
    )
    _of_queries[(triton.cdiv(queries, kept), batch * heads)](
        *inputs, dq, *strides, *dq.stride()[:3], *sizes, **options, BLOCK_M=kept, BLOCK_N=passed
    )
    return dq, dk, dv


@triton.jit
def _rows(X, batch, head, rows, d, mask, stride_b, stride_n, stride_h, ALIGN: tl.constexpr):
    """Rows of one head, 0 outside."""
    at = X + tl.multiple_of(batch * stride_b + head * stride_h, ALIGN) + rows * stride_n + d[None, :]
    return tl.load(at, mask=mask, other=0.0)


@triton.jit
def _probabilities(
    q, k_t, bias_at, lse, m, n, stride_bm, stride_bn, in_m, in_n, sm_scale,
    HAS_BIAS: tl.constexpr, PER_QUERY: tl.constexpr,
):  # fmt: skip
    """The softmax of a tile, from its rows' log-sum-exp; 0 where nothing is left in, and outside."""
    scores = tl.dot(q, k_t, input_precision=EXACT) * (sm_scale * LOG2_E)
    inside = in_m[:, None] & in_n[None, :]
    if HAS_BIAS:
        scores += _bias(bias_at, m, n, stride_bm, stride_bn, in_m, in_n, PER_QUERY) * LOG2_E
    inside = inside & (lse > float("-inf"))[:, None]
    return tl.where(inside, tl.exp2(tl.where(inside, scores - (lse * LOG2_E)[:, None], 0.0)), 0.0)


@triton.jit
def _of_keys(
    Q, K, V, BIAS, GRAD, LSE, DELTA, DK, DV,
    stride_qb, stride_qm, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    stride_gb, stride_gm, stride_gh, stride_bb, stride_bh, stride_bm, stride_bn, stride_db, stride_dn, stride_dh,
    heads, queries, keys, sm_scale,
    SIZE: tl.constexpr, PADDED: tl.constexpr, ALIGN: tl.constexpr, HAS_BIAS: tl.constexpr, PER_QUERY: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A block of keys and values, over all queries."""
    pair = tl.program_id(1).to(tl.int64)
    batch, head = pair // heads, pair % heads
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, PADDED)
    in_n, in_d = n < keys, d < SIZE
    key_mask = in_n[:, None] & in_d[None, :]
    rows = n[:, None].to(tl.int64)
    k = _rows(K, batch, head, rows, d, key_mask, stride_kb, stride_kn, stride_kh, ALIGN)
    v = _rows(V, batch, head, rows, d, key_mask, stride_vb, stride_vn, stride_vh, ALIGN)
    bias_at = BIAS + batch * stride_bb + head * stride_bh
    dk = tl.zeros([BLOCK_N, PADDED], tl.float32)
    dv = tl.zeros([BLOCK_N, PADDED], tl.float32)
    for start in range(0, queries, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        in_m = m < queries
        mask, at = in_m[:, None] & in_d[None, :], m[:, None].to(tl.int64)
        q = _rows(Q, batch, head, at, d, mask, stride_qb, stride_qm, stride_qh, ALIGN)
        grad = _rows(GRAD, batch, head, at, d, mask, stride_gb, stride_gm, stride_gh, ALIGN)
        lse = tl.load(LSE + pair * queries + m, mask=in_m, other=float("-inf"))
        delta = tl.load(DELTA + pair * queries + m, mask=in_m, other=0.0)
        p = _probabilities(
            q, tl.trans(k), bias_at, lse, m, n, stride_bm, stride_bn, in_m, in_n, sm_scale, HAS_BIAS, PER_QUERY
        )
        dv = tl.dot(tl.trans(p.to(grad.dtype)), grad, dv, input_precision=EXACT)
        ds = p * (tl.dot(grad, tl.trans(v), input_precision=EXACT) - delta[:, None])
        dk = tl.dot(tl.trans(ds.to(q.dtype)), q, dk, input_precision=EXACT)
    at = tl.multiple_of(batch * stride_db + head * stride_dh, ALIGN) + rows * stride_dn + d[None, :]
    tl.store(DK + at, (dk * sm_scale).to(DK.dtype.element_ty), mask=key_mask)
    tl.store(DV + at, dv.to(DV.dtype.element_ty), mask=key_mask)


@triton.jit
def _of_queries(
    Q, K, V, BIAS, GRAD, LSE, DELTA, DQ,
    stride_qb, stride_qm, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    stride_gb, stride_gm, stride_gh, stride_bb, stride_bh, stride_bm, stride_bn, stride_db, stride_dm, stride_dh,
    heads, queries, keys, sm_scale,
    SIZE: tl.constexpr, PADDED: tl.constexpr, ALIGN: tl.constexpr, HAS_BIAS: tl.constexpr, PER_QUERY: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A block of queries, over all keys."""
    pair = tl.program_id(1).to(tl.int64)
    batch, head = pair // heads, pair % heads
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, PADDED)
    in_m, in_d = m < queries, d < SIZE
    mask, rows = in_m[:, None] & in_d[None, :], m[:, None].to(tl.int64)
    q = _rows(Q, batch, head, rows, d, mask, stride_qb, stride_qm, stride_qh, ALIGN)
    grad = _rows(GRAD, batch, head, rows, d, mask, stride_gb, stride_gm, stride_gh, ALIGN)
    lse = tl.load(LSE + pair * queries + m, mask=in_m, other=float("-inf"))
    delta = tl.load(DELTA + pair * queries + m, mask=in_m, other=0.0)
    bias_at = BIAS + batch * stride_bb + head * stride_bh
    dq = tl.zeros([BLOCK_M, PADDED], tl.float32)
    for start in range(0, keys, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        in_n = n < keys
        key_mask, at = in_n[:, None] & in_d[None, :], n[:, None].to(tl.int64)
        k = _rows(K, batch, head, at, d, key_mask, stride_kb, stride_kn, stride_kh, ALIGN)
        v = _rows(V, batch, head, at, d, key_mask, stride_vb, stride_vn, stride_vh, ALIGN)
        p = _probabilities(
            q, tl.trans(k), bias_at, lse, m, n, stride_bm, stride_bn, in_m, in_n, sm_scale, HAS_BIAS, PER_QUERY
        )
        ds = p * (tl.dot(grad, tl.trans(v), input_precision=EXACT) - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=EXACT)
    at = tl.multiple_of(batch * stride_db + head * stride_dh, ALIGN) + rows * stride_dm + d[None, :]
    tl.store(DQ + at, (dq * sm_scale).to(DQ.dtype.element_ty), mask=mask)
