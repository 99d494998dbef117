"""GroupNorm and what follows it in a resnet block, a modulation and SiLU, in one operation.

In eager torch these are four passes over the activations, and in channels-last two of them are slow; ours reads them
twice and writes once, in whichever memory format they come.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from ..core.errors import BadInput
from .backends import Choice, ours
from .layout import memory_format


def group_norm_silu(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    silu: bool = True,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    backend: Choice = "auto",
) -> Tensor:
    """``silu(norm(x) * (1 + scale) + shift)``, the norm over every group of channels of every picture (arXiv:1803.08494).

    Args:
        x: (batch, channels, …), contiguous or channels-last, in parts or whole.
        groups: of neighbouring channels; divides them.
        weight, bias: (channels,), of the norm.
        eps: added to the variance.
        silu: whether to end with it.
        scale, shift: (batch, channels), both or neither: what a time embedding says (diffusers' scale_shift).
        backend: "auto" is ours where that was measured to be faster on this card, else torch's own.

    Returns:
        Like x, in its memory format. Statistics are taken in float32 whatever the dtype.

    Raises:
        BadInput: the shapes do not go together, or our kernel cannot run here.
    """
    _require_shapes(x, groups, weight, bias, scale, shift)
    if ours("group_norm_silu", backend, x):
        out: Tensor = fused(x, groups, weight, bias, scale, shift, eps, silu)
        return out
    if backend == "reference":
        return reference(x, groups, weight, bias, scale, shift, eps, silu)
    out = F.group_norm(x, groups, weight, bias, eps)
    if scale is not None and shift is not None:
        out = torch.addcmul(_wide(shift, x), out, 1 + _wide(scale, x))
    return F.silu(out) if silu else out


def reference(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    silu: bool,
) -> Tensor:
    """In plain torch and at least float32."""
    z, _, _ = _normed(x, groups, weight, bias, eps)
    if scale is not None and shift is not None:
        z = z * (1 + _wide(scale.to(z), x)) + _wide(shift.to(z), x)
    return (F.silu(z) if silu else z).to(x.dtype).contiguous(memory_format=memory_format(x))


@torch.library.custom_op("unrolled::group_norm_silu", mutates_args=())
def fused(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    silu: bool,
) -> Tensor:
    """Our kernels."""
    from .group_norm_kernel import launch

    return launch(x, groups, weight, bias, scale, shift, eps, silu)


@fused.register_fake
def _(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    silu: bool,
) -> Tensor:
    return torch.empty_like(x, memory_format=memory_format(x))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.groups, weight, bias, scale, shift, ctx.eps, ctx.silu = inputs
    ctx.save_for_backward(x, weight, bias, scale, shift)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """In plain torch: right, and in no hurry."""
    x, weight, bias, scale, shift = ctx.saved_tensors
    z, normed, over_std = _normed(x, ctx.groups, weight, bias, ctx.eps)
    grad, spread = grad.to(z), 1.0 if scale is None else 1 + _wide(scale.to(z), x)
    if ctx.silu:
        out = z if scale is None else z * spread + _wide(shift.to(z), x)
        on = torch.sigmoid(out)
        grad = grad * on * (1 + out * (1 - on))
    places, pictures = list(range(2, x.ndim)), [0, *range(2, x.ndim)]
    moved = None if shift is None else grad.sum(places).to(shift)
    scaled = None if scale is None else (grad * z).sum(places).to(scale)
    grad = grad * spread
    by_weight = None if weight is None else (grad * normed).sum(pictures).to(weight)
    by_bias = None if bias is None else grad.sum(pictures).to(bias)
    grad = grad if weight is None else grad * _wide(weight.to(z), x)
    rows = (len(x), ctx.groups, -1)
    through = norm_gradient(grad.reshape(rows), normed.reshape(rows), over_std).reshape(x.shape)
    through = through.to(x.dtype).contiguous(memory_format=memory_format(x))
    return through, None, by_weight, by_bias, scaled, moved, None, None


fused.register_autograd(_backward, setup_context=_keep)


def norm_gradient(grad: Tensor, normed: Tensor, over_std: Tensor) -> Tensor:
    """What comes through ``normed = (x - mean) * over_std`` over the last dimension, both of which depend on x."""
    along = (grad * normed).mean(-1, keepdim=True)
    return over_std * (grad - grad.mean(-1, keepdim=True) - normed * along)


def _normed(x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """With weight and bias, without, and what it was divided by, in at least float32."""
    rows = x.to(torch.promote_types(x.dtype, torch.float32)).reshape(len(x), groups, -1)
    over_std = torch.rsqrt(rows.var(-1, correction=0, keepdim=True) + eps)
    normed = ((rows - rows.mean(-1, keepdim=True)) * over_std).reshape(x.shape)
    out = normed if weight is None else normed * _wide(weight.to(normed), x)
    return out if bias is None else out + _wide(bias.to(normed), x), normed, over_std


def _wide(numbers: Tensor, x: Tensor) -> Tensor:
    """(channels,) or (batch, channels) to multiply x with."""
    return numbers.reshape(-1, x.shape[1], *[1] * (x.ndim - 2))


def _require_shapes(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None
) -> None:
    if x.ndim < 2 or groups < 1 or x.shape[1] % groups:
        raise BadInput(f"A group norm of {groups} groups takes (batch, channels, …) with as many channels or a multiple "
                       f"of that, but was given {tuple(x.shape)}.")  # fmt: skip
    for name, part in {"weight": weight, "bias": bias}.items():
        if part is not None and part.shape != x.shape[1:2]:
            raise BadInput(f"The {name} of this norm is {tuple(x.shape[1:2])}, but was given as {tuple(part.shape)}.")
    if (scale is None) != (shift is None):
        raise BadInput("A modulation has a scale and a shift, but one was given without the other.")
    for name, part in {"scale": scale, "shift": shift}.items():
        if part is not None and part.shape != x.shape[:2]:
            raise BadInput(f"The {name} of this norm is {tuple(x.shape[:2])}, but was given as {tuple(part.shape)}.")
