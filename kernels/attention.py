"""Attention: ``softmax(q k^T * scale + bias) v``, as a reference, as our kernel, and the dispatch between them.

Queries, keys and values are (batch, length, heads, head size), as a network's projections leave them, so that nothing is
transposed or copied: views into packed QKV will do, as long as the last dimension is contiguous.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..core.errors import BadInput
from .attention_chunked import chunked, pays
from .backends import Backend, fastest, measurable, require
from .tuning import attention_key


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None = None, scale: float | None = None, backend: Backend = "auto"
) -> Tensor:
    """Every query's mean of the values, weighed by the softmax of its products with the keys.

    Args:
        q: (batch, queries, heads, head size).
        k, v: (batch, keys, heads, head size).
        bias: added to the scores, broadcastable to (batch, heads, queries, keys); -inf leaves a key out, and a query
            that is left no key at all comes out as 0. Our kernel takes anything below -2e38 for -inf.
        scale: of the products, by default one over the root of the head size.
        backend: "auto" is the one that was measured to be the fastest at such sizes on this card, or torch's own where
            none was, or a bias, a gradient or torch.compile comes in; on a CPU, in bfloat16, "chunked" where that is.

    Returns:
        (batch, queries, heads, head size), contiguous.

    Raises:
        BadInput: the shapes do not go together, or the backend cannot run here.
    """
    require_shapes(q, k, v, bias)
    require(backend, q.device, q.shape[-1], q.dtype)
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    name = _automatic(q, k, v, bias) if backend == "auto" else backend
    if name == "triton":
        _require_no_gradient(bias)
        out: Tensor = fused(q, k, v, bias, scale)[0]
        return out
    if name == "reference":
        return reference(q, k, v, bias, scale)[0]
    if name == "xformers":
        from xformers.ops import memory_efficient_attention

        whole = bias if bias is None else bias.expand(len(q), q.shape[2], q.shape[1], k.shape[1]).to(q.dtype)
        return memory_efficient_attention(q, k, v, attn_bias=whole, scale=scale)  # type: ignore[no-any-return]
    if name == "chunked":
        return chunked(q, k, v, bias, scale)
    mask = None if bias is None else bias.to(q.dtype)
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))  # heads before lengths, as torch has them
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2).contiguous()


def attention_with_lse(
    q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None = None, scale: float | None = None, backend: Backend = "auto"
) -> tuple[Tensor, Tensor]:
    """The same, and the logarithm of each softmax's sum, (batch, heads, queries) in float32, by our kernel or the reference.

    With it results over parts of the keys can be put together, and single probabilities be had later.
    """
    require_shapes(q, k, v, bias)
    require(backend, q.device, q.shape[-1], q.dtype)
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    if backend in ("sdpa", "xformers", "chunked"):
        raise BadInput(f"Attention {backend!r} does not give the log-sum-exp: use triton or reference.")
    if backend == "triton":
        _require_no_gradient(bias)
        out, lse = fused(q, k, v, bias, scale)
        return out, lse
    return reference(q, k, v, bias, scale)


def reference(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """In plain torch and at least float32: the output and the log-sum-exp."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("bmhd,bnhd->bhmn", q.to(wide), k.to(wide)) * scale
    scores = scores if bias is None else scores + bias.to(wide)
    # A query that is left no key: 0, and 0 for its gradient too.
    empty = scores.isneginf().all(-1, keepdim=True)
    share = scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)
    return torch.einsum("bhmn,bnhd->bmhd", share, v.to(wide)).to(q.dtype).contiguous(), scores.logsumexp(-1).to(
        torch.float32
    )


@torch.library.custom_op("unrolled::attention", mutates_args=())
def fused(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Our kernel: the output and the log-sum-exp, without the matrix of scores."""
    from .attention_forward import launch

    return launch(q, k, v, bias, scale)


@fused.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty((len(q), q.shape[2], q.shape[1]), dtype=torch.float32)


@torch.library.custom_op("unrolled::attention_backward", mutates_args=())
def fused_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of queries, keys and values."""
    from .attention_backward import launch

    return launch(grad, q, k, v, bias, out, lse, scale)


@fused_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, bias, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, bias, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 5
    q, k, v, bias, out, lse = ctx.saved_tensors
    return (*fused_backward(grad, q, k, v, bias, out, lse, ctx.scale), None, None)


fused.register_autograd(_backward, setup_context=_keep)


@register_flop_formula(torch.ops.unrolled.attention)
def _flops(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    batch, queries, heads, size = q
    return 4 * batch * heads * queries * int(k[1]) * size  # type: ignore[no-any-return]


@register_flop_formula(torch.ops.unrolled.attention_backward)
def _backward_flops(grad: Any, q: Any, k: Any, *_: Any, **__: Any) -> int:
    batch, queries, heads, size = q
    return 10 * batch * heads * queries * int(k[1]) * size  # type: ignore[no-any-return]


def _automatic(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> str:
    """The backend that "auto" is."""
    if pays(q, k.shape[1]):
        return "chunked"
    if bias is not None or not measurable(q, k, v):
        return "sdpa"
    return fastest(attention_key(q, k.shape[1]), q.device, "sdpa")


def _require_no_gradient(bias: Tensor | None) -> None:
    if bias is not None and bias.requires_grad and torch.is_grad_enabled():
        raise BadInput("Our attention has no gradient of the bias: use the backend sdpa or reference for one.")


def require_shapes(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> None:
    """Raise BadInput if they do not go together."""
    fits = q.ndim == k.ndim == v.ndim == 4 and k.shape == v.shape
    if not fits or (len(q), *q.shape[2:]) != (len(k), *k.shape[2:]):
        raise BadInput(
            "Attention takes queries (batch, queries, heads, head size) and keys and values (batch, keys, heads, head "
            f"size), but was given {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}."
        )
    if not q.dtype == k.dtype == v.dtype:
        raise BadInput(f"Queries, keys and values are of one dtype, but were given as {q.dtype}, {k.dtype} and {v.dtype}.")
    wanted = (len(q), q.shape[2], q.shape[1], k.shape[1])
    if bias is not None and (
        bias.ndim != 4 or any(given not in (1, n) for given, n in zip(bias.shape, wanted, strict=True))
    ):
        raise BadInput(f"A bias of attention broadcasts to {wanted} here, but was given as {tuple(bias.shape)}.")
