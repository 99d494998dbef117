"""How much every query attends to a few chosen keys, averaged over the heads, without the matrix of scores.

What maps of cross-attention need (Tang et al., arXiv:2210.04885): where in the picture does a word act?
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..core.errors import BadInput
from .attention import attention_with_lse
from .backends import Backend


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
        BadInput: a token is no key, or the backend cannot run here.
    """
    low, high = (int(tokens.min()), int(tokens.max())) if len(tokens) else (0, 0)
    if tokens.ndim != 1 or low < 0 or high >= k.shape[1]:
        raise BadInput(f"Tokens are numbers of keys, 0 to {k.shape[1] - 1} here, but {tokens.tolist()} were asked for.")
    if lse is None:
        _, lse = attention_with_lse(q, k, k, bias=bias, scale=scale, backend=backend)
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    chosen = None if bias is None else bias[..., tokens if bias.shape[-1] > 1 else slice(None)]
    if backend == "triton":
        return maps(q, k, tokens, lse, chosen, scale)
    scores = torch.einsum("bmhd,bthd->bhmt", q.float(), k[:, tokens].float()) * scale
    scores = scores if chosen is None else scores + chosen.float()
    return torch.exp(scores - lse.masked_fill(lse.isinf(), math.inf)[..., None]).mean(1)


@torch.library.custom_op("unrolled::attention_maps", mutates_args=())
def maps(q: Tensor, k: Tensor, tokens: Tensor, lse: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Our kernel; ``bias`` is that of the tokens alone."""
    from .attention_maps_kernel import launch

    return launch(q, k, tokens, lse, bias, scale)


@maps.register_fake
def _(q: Tensor, k: Tensor, tokens: Tensor, lse: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    return q.new_empty((len(q), q.shape[1], len(tokens)), dtype=torch.float32)
