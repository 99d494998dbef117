"""Attention on a CPU in half precision: a few heads and queries at a time, so that their scores stay in the cache.

Two large products of oneDNN and a softmax between them, where torch's own kernel does small ones. The scores are rounded
to the precision of q, so that its error is about twice that of torch's.
"""

from __future__ import annotations

import math
from itertools import product

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

ROWS = 256
"""Queries at a time."""
SCORES = 2**20
"""Scores at a time: as many heads as that allows."""
LANES = 16
"""Values of a head are filled up to a multiple of these: the second product is half as fast again at 48 as at 40."""


def chunked(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """As :func:`unrolled.kernels.attention.attention`, in plain torch."""
    batch, queries, heads, size = q.shape
    keys = k.shape[1]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    queries_first, keys_last, values = (q * scale).transpose(1, 2), k.permute(0, 2, 3, 1), v.transpose(1, 2)
    whole = None if bias is None else bias.to(q.dtype).expand(batch, heads, queries, keys)
    rows = max(1, min(ROWS, queries))
    several = max(1, min(heads, SCORES // max(1, rows * keys)))
    # One memory for all scores: a fresh one would be mapped page by page each time, which takes as long as the product.
    recorded = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (q, k, v, bias))
    room = None if recorded else q.new_empty(several * rows * keys)
    for b, h in product(range(batch), range(0, heads, several)):
        group = slice(h, h + several)
        these_keys, these_values = keys_last[b, group].contiguous(), F.pad(values[b, group], (0, -size % LANES))
        for m in range(0, queries, rows):
            few = slice(m, m + rows)
            these = queries_first[b, group, few]
            scores = torch.bmm(these, these_keys, out=_part(room, *these.shape[:2], keys))
            if whole is not None:
                scores += whole[b, group, few]
            share = torch.softmax(scores, -1, out=None if recorded else scores)
            if whole is not None:
                share = share.nan_to_num(0.0)  # of a query that is left no key
            out[b, few, group] = torch.bmm(share, these_values)[..., :size].transpose(0, 1)
    return out


def _part(room: Tensor | None, *shape: int) -> Tensor | None:
    return None if room is None else room[: math.prod(shape)].view(shape)


def pays(q: Tensor, keys: int) -> bool:
    """Whether it was measured to be faster than torch's own: in half precision, where the keys are many.

    benchmarks/results/cpu_attention.json; in float32 torch's own is the faster one.
    """
    return q.device.type == "cpu" and q.dtype == torch.bfloat16 and keys >= 256 and q.shape[1] >= 256
