"""LayerNorm over the last dimension, alone and with the residual sum before it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from ..core.errors import BadInput
from .backends import Choice, ours
from .group_norm_silu import norm_gradient

LONGEST = 16384
"""The longest row our kernel takes: it holds it whole."""


def layer_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float = 1e-5, backend: Choice = "auto"
) -> Tensor:
    """``(x - mean) / sqrt(variance + eps) * weight + bias`` of every row (arXiv:1607.06450), statistics in float32.

    Args:
        x: (…, n); weight, bias: (n,).
        backend: "auto" is ours where that was measured to be faster on this card, else torch's own.

    Returns:
        (…, n), contiguous from our kernel.

    Raises:
        BadInput: the shapes do not go together, or our kernel cannot run here or not on so long rows.
    """
    _require_shapes(x, weight, bias, backend)
    if ours("layer_norm", backend, x):
        out: Tensor = fused(x, weight, bias, eps)
        return out
    return reference(x, weight, bias, eps) if backend == "reference" else F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def add_layer_norm(
    x: Tensor,
    more: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    backend: Choice = "auto",
) -> tuple[Tensor, Tensor]:
    """``x + more``, rounded to its dtype as it goes on in the residual stream, and the norm of that.

    Args and errors as in :func:`layer_norm`; ``more`` is like x.
    """
    _require_shapes(x, weight, bias, backend)
    if (x.shape, x.dtype) != (more.shape, more.dtype):
        raise BadInput(
            f"A residual sum adds two of one kind, but was given {tuple(x.shape)} in {x.dtype} and {tuple(more.shape)} "
            f"in {more.dtype}."
        )
    if ours("add_layer_norm", backend, x):
        total, out = fused_add(x, more, weight, bias, eps)
        return total, out
    total = x + more
    return total, layer_norm(total, weight, bias, eps=eps, backend=backend)


def reference(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """In plain torch and at least float32."""
    return _normed(x, weight, bias, eps)[0].to(x.dtype).contiguous()


@torch.library.custom_op("unrolled::layer_norm", mutates_args=())
def fused(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Our kernel."""
    from .layer_norm_kernel import launch

    return launch(x, None, weight, bias, eps)[1]


@fused.register_fake
def _(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("unrolled::add_layer_norm", mutates_args=())
def fused_add(x: Tensor, more: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """Our kernel: the sum and its norm."""
    from .layer_norm_kernel import launch

    return launch(x, more, weight, bias, eps)


@fused_add.register_fake
def _(x: Tensor, more: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, ctx.eps = inputs
    ctx.save_for_backward(x, weight, bias)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias = ctx.saved_tensors
    return *_gradients(grad, x, weight, bias, ctx.eps), None


def _keep_sum(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, weight, bias, ctx.eps = inputs
    ctx.save_for_backward(output[0], weight, bias)


def _backward_of_sum(ctx: Any, grad_total: Tensor, grad: Tensor) -> tuple[Tensor | None, ...]:
    total, weight, bias = ctx.saved_tensors
    through, by_weight, by_bias = _gradients(grad, total, weight, bias, ctx.eps)
    through = through + grad_total
    return through, through, by_weight, by_bias, None


fused.register_autograd(_backward, setup_context=_keep)
fused_add.register_autograd(_backward_of_sum, setup_context=_keep_sum)


def _gradients(
    grad: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Of x, weight and bias, in plain torch: right, and in no hurry."""
    _, normed, over_std = _normed(x, None, None, eps)
    grad, rows = grad.to(normed), list(range(x.ndim - 1))
    by_weight = None if weight is None else (grad * normed).sum(rows).to(weight)
    by_bias = None if bias is None else grad.sum(rows).to(bias)
    grad = grad if weight is None else grad * weight.to(grad)
    return norm_gradient(grad, normed, over_std).to(x.dtype).contiguous(), by_weight, by_bias


def _normed(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """With weight and bias, without, and what it was divided by, in at least float32."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    over_std = torch.rsqrt(wide.var(-1, correction=0, keepdim=True) + eps)
    normed = (wide - wide.mean(-1, keepdim=True)) * over_std
    out = normed if weight is None else normed * weight.to(normed)
    return out if bias is None else out + bias.to(normed), normed, over_std


def _require_shapes(x: Tensor, weight: Tensor | None, bias: Tensor | None, backend: str) -> None:
    if not x.ndim or (backend == "triton" and x.shape[-1] > LONGEST):
        raise BadInput(f"A layer norm takes rows of up to {LONGEST} numbers by our kernel, but was given {tuple(x.shape)}.")
    for name, part in {"weight": weight, "bias": bias}.items():
        if part is not None and part.shape != x.shape[-1:]:
            raise BadInput(f"The {name} of this norm is {tuple(x.shape[-1:])}, but was given as {tuple(part.shape)}.")
