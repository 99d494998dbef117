"""Fused attention, forward: one pass over the keys with a running softmax (Dao, arXiv:2307.08691, alg. 1)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .backends import on_its_card
from .measured_table import Blocks
from .tuning import attention_blocks

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
EXACT = tl.constexpr("ieee")  # float32 is not to become tf32, which is what a product takes unasked


@on_its_card
def launch(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, blocks: Blocks | None = None
) -> tuple[Tensor, Tensor]:
    """Output (batch, queries, heads, head size) and log-sum-exp (batch, heads, queries); see :mod:`.attention`."""
    batch, queries, heads, size = q.shape
    keys = k.shape[1]
    q, k, v = (part if part.stride(-1) == 1 else part.contiguous() for part in (q, k, v))
    out = torch.empty(batch, queries, heads, size, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=q.device)
    blocks = blocks or attention_blocks(q, keys, biased=bias is not None)
    main, tail = head_parts(size)
    _forward[(triton.cdiv(queries, blocks.queries), batch * heads)](
        q, k, v, q if bias is None else bias, out, lse,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
        *bias_strides(bias, (batch, heads, queries, keys)), heads, queries, keys, scale,
        SIZE=size, MAIN=main, TAIL=tail, ALIGN=aligned(q, k, v, out), **bias_kind(bias),
        BLOCK_M=blocks.queries, BLOCK_N=blocks.keys, num_warps=blocks.warps, num_stages=blocks.stages,
    )  # fmt: skip
    return out, lse


def head_parts(size: int) -> tuple[int, int]:
    """A head as a power of two and a smaller rest (0 or at least 16, what a product takes): 80 is 64 + 16, not 128."""
    main = 1 << (size.bit_length() - 1)
    return main, max(16, triton.next_power_of_2(size - main)) if size > main else 0


def bias_strides(bias: Tensor | None, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of a bias broadcast to (batch, heads, queries, keys), without a copy."""
    return (0, 0, 0, 0) if bias is None else bias.expand(shape).stride()


def aligned(*parts: Tensor) -> int:
    """The numbers that every head starts at a multiple of, for loads of 16 bytes: heads of 40 are multiples of 8 only.

    Triton itself looks for multiples of 16 alone.
    """
    return 8 if all(stride % 8 == 0 for part in parts for stride in part.stride()[:3]) else 1


def bias_kind(bias: Tensor | None) -> dict[str, bool]:
    """Whether there is one, and whether it differs from query to query: one for the keys alone is a row, not a tile."""
    return {"HAS_BIAS": bias is not None, "PER_QUERY": bias is not None and bias.shape[2] > 1}


@triton.jit
def _bias(bias_at, m, n, stride_bm, stride_bn, in_m, in_n, PER_QUERY: tl.constexpr):
    """A tile of the bias, or the row of it that all queries share."""
    at, inside = bias_at + n[None, :].to(tl.int64) * stride_bn, in_n[None, :]
    if PER_QUERY:
        at, inside = at + m[:, None].to(tl.int64) * stride_bm, inside & in_m[:, None]
    return tl.load(at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _forward(
    Q, K, V, BIAS, OUT, LSE,
    stride_qb, stride_qm, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    stride_ob, stride_om, stride_oh, stride_bb, stride_bh, stride_bm, stride_bn, heads, queries, keys, sm_scale,
    SIZE: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, ALIGN: tl.constexpr,
    HAS_BIAS: tl.constexpr, PER_QUERY: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    batch, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, MAIN)
    rest = MAIN + tl.arange(0, TAIL if TAIL else 16)
    in_m, in_rest = m < queries, rest < SIZE
    q_at = Q + tl.multiple_of(batch * stride_qb + head * stride_qh, ALIGN) + m[:, None].to(tl.int64) * stride_qm
    k_at = K + tl.multiple_of(batch * stride_kb + head * stride_kh, ALIGN)
    v_at = V + tl.multiple_of(batch * stride_vb + head * stride_vh, ALIGN)
    bias_at = BIAS + batch * stride_bb + head * stride_bh

    q = tl.load(q_at + d[None, :], mask=in_m[:, None], other=0.0)
    acc = tl.zeros([BLOCK_M, MAIN], tl.float32)
    if TAIL:
        q_rest = tl.load(q_at + rest[None, :], mask=in_m[:, None] & in_rest[None, :], other=0.0)
        acc_rest = tl.zeros([BLOCK_M, TAIL if TAIL else 16], tl.float32)
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, keys, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        in_n = n < keys
        k_rows = k_at + n[None, :].to(tl.int64) * stride_kn
        k = tl.load(k_rows + d[:, None], mask=in_n[None, :], other=0.0)
        scores = tl.dot(q, k, input_precision=EXACT)
        if TAIL:
            k_rest = tl.load(k_rows + rest[:, None], mask=in_n[None, :] & in_rest[:, None], other=0.0)
            scores = tl.dot(q_rest, k_rest, scores, input_precision=EXACT)
        # In powers of two, which the hardware has.
        scores = scores * (sm_scale * LOG2_E)
        if HAS_BIAS:
            scores += _bias(bias_at, m, n, stride_bm, stride_bn, in_m, in_n, PER_QUERY) * LOG2_E
        scores = tl.where(in_n[None, :], scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        # A query all of whose keys so far are left out has nothing to subtract.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        share = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(highest - base)
        total = total * shrink + tl.sum(share, 1)
        highest = higher
        v_rows = v_at + n[:, None].to(tl.int64) * stride_vn
        values = tl.load(v_rows + d[None, :], mask=in_n[:, None], other=0.0)
        share = share.to(values.dtype)
        acc = tl.dot(share, values, acc * shrink[:, None], input_precision=EXACT)
        if TAIL:
            v_rest = tl.load(v_rows + rest[None, :], mask=in_n[:, None] & in_rest[None, :], other=0.0)
            acc_rest = tl.dot(share, v_rest, acc_rest * shrink[:, None], input_precision=EXACT)

    total_or_1 = tl.where(total == 0.0, 1.0, total)
    out_at = OUT + tl.multiple_of(batch * stride_ob + head * stride_oh, ALIGN) + m[:, None].to(tl.int64) * stride_om
    tl.store(out_at + d[None, :], (acc / total_or_1[:, None]).to(OUT.dtype.element_ty), mask=in_m[:, None])
    if TAIL:
        out_rest = (acc_rest / total_or_1[:, None]).to(OUT.dtype.element_ty)
        tl.store(out_at + rest[None, :], out_rest, mask=in_m[:, None] & in_rest[None, :])
    # Of nothing the sum is 0 and its logarithm -inf, which highest is then.
    tl.store(LSE + tl.program_id(1).to(tl.int64) * queries + m, (highest + tl.log2(total_or_1)) * LN_2, mask=in_m)
