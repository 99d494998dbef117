"""How much every query attends to a few chosen keys, averaged over the heads, without the matrix of scores.

What maps of cross-attention need (Tang et al., arXiv:2210.04885): where in the picture does a word act?
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..core.errors import BadInput
from .attention import attention_with_lse, require_shapes
from .backends import Backend, require


def attention_maps(
    q: Tensor,
    k: Tensor,
    tokens: Tensor,
    *,
    lse: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    backend: Backend = "reference",
) -> Tensor:
    """The probabilities of the keys ``tokens``, averaged over the heads: (batch, queries, tokens) in float32.

    Args:
        q: (batch, queries, heads, head size); k: (batch, keys, heads, head size).
        tokens: which keys, (tokens,) integers.
        lse: what :func:`attention_with_lse` gave for the same q, k and bias; else it is computed.
        bias, scale: as there.
        backend: "triton" or "reference".

    Raises:
        BadInput: a token is no key, the shapes do not go together, or the backend cannot run here or gives no maps.
    """
    require_shapes(q, k, k, bias)
    require(backend, q.device, q.shape[-1], q.dtype)
    if backend not in ("triton", "reference"):
        raise BadInput(f"Attention {backend!r} gives no maps: use triton or reference.")
    low, high = (int(tokens.min()), int(tokens.max())) if tokens.numel() else (0, 0)
    if tokens.ndim != 1 or low < 0 or high >= k.shape[1]:
        raise BadInput(f"Tokens are numbers of keys, 0 to {k.shape[1] - 1} here, but {tokens.tolist()} were asked for.")
    if lse is None:
        _, lse = attention_with_lse(q, k, k, bias=bias, scale=scale, backend=backend)
    if lse.shape != (len(q), q.shape[2], q.shape[1]):
        raise BadInput(
            f"The log-sum-exp of these is {(len(q), q.shape[2], q.shape[1])}, but was given as {tuple(lse.shape)}."
        )
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    chosen = None if bias is None else bias[..., tokens if bias.shape[-1] > 1 else slice(None)]
    if backend == "triton":
        mean: Tensor = maps(q, k, tokens, lse, chosen, scale)
        return mean
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("bmhd,bthd->bhmt", q.to(wide), k[:, tokens].to(wide)) * scale
    scores = scores if chosen is None else scores + chosen.to(wide)
    return torch.exp(scores - lse.masked_fill(lse.isinf(), math.inf)[..., None]).mean(1).to(torch.float32)


@torch.library.custom_op("unrolled::attention_maps", mutates_args=())
def maps(q: Tensor, k: Tensor, tokens: Tensor, lse: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Our kernel; ``bias`` is that of the tokens alone."""
    from .attention_maps_kernel import launch

    return launch(q, k, tokens, lse, bias, scale)


@maps.register_fake
def _(q: Tensor, k: Tensor, tokens: Tensor, lse: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    return q.new_empty((len(q), q.shape[1], len(tokens)), dtype=torch.float32)


@register_flop_formula(torch.ops.unrolled.attention_maps)
def _flops(q: Any, k: Any, tokens: Any, *_: Any, **__: Any) -> int:
    batch, queries, heads, size = q
    return 2 * batch * heads * queries * int(tokens[0]) * size  # type: ignore[no-any-return]
