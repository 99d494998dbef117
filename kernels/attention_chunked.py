"""Attention on a CPU in half precision: a few heads and queries at a time, so that their scores stay in the cache.

Two large products of oneDNN and a softmax between them, where torch's own kernel does small ones. The scores are rounded
to the precision of q, so that its error is about three times that of torch's.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 256
"""Queries at a time."""
SCORES = 2**20
"""Scores at a time: as many heads as that allows."""


def chunked(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """As :func:`unrolled.kernels.attention.attention`, in plain torch."""
    batch, queries, heads, _ = q.shape
    keys = k.shape[1]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    queries_first, keys_last, values = (q * scale).transpose(1, 2), k.permute(0, 2, 3, 1), v.transpose(1, 2)
    whole = None if bias is None else bias.to(q.dtype).expand(batch, heads, queries, keys)
    several = max(1, SCORES // (min(ROWS, queries) * keys))
    for h in range(0, heads, several):
        group = slice(h, h + several)
        these_keys, these_values = keys_last[:, group].contiguous(), values[:, group].contiguous()
        for m in range(0, queries, ROWS):
            rows = slice(m, m + ROWS)
            scores = torch.matmul(queries_first[:, group, rows], these_keys)
            if whole is not None:
                scores += whole[:, group, rows]
            share = torch.softmax(scores, -1)
            if whole is not None:
                share = share.nan_to_num(0.0)  # of a query that is left no key
            out[:, rows, group] = torch.matmul(share, these_values).transpose(1, 2)
    return out


def pays(q: Tensor, keys: int) -> bool:
    """Whether it was measured to be faster than torch's own: in half precision, where the keys are many.

    benchmarks/results/cpu_attention.json; in float32 torch's own is the faster one.
    """
    return q.device.type == "cpu" and q.dtype == torch.bfloat16 and keys >= 256 and q.shape[1] >= 256
