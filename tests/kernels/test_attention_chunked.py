"""Attention in chunks against the reference, and when the dispatch takes it."""

from typing import Any

import pytest
import torch
from unrolled.core.errors import BadInput
from unrolled.core.loading import Shelf
from unrolled.kernels import attention as dispatch
from unrolled.kernels.attention import attention, attention_with_lse
from unrolled.kernels.attention_chunked import ROWS, chunked, pays

SHAPES = [
    (1, 1, 1, 1, 8),
    (2, 300, 77, 3, 40),
    (1, 513, 1300, 2, 16),
    (3, ROWS, 4, 2, 8),
    (2, 256, 256, 8, 160),
    (1, 0, 4, 2, 8),
    (1, 4, 0, 2, 8),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_it_is_attention(shape: tuple[int, ...], with_bias: bool, dtype: torch.dtype, tolerance: float) -> None:
    batch, queries, keys, heads, size = shape
    draw = torch.Generator().manual_seed(0)
    qkv = [torch.randn(batch, n, heads, size, generator=draw).to(dtype) for n in (queries, keys, keys)]
    bias = None
    if with_bias:
        bias = torch.randn(batch, 1, queries, keys, generator=draw).to(dtype)
        bias[..., :1, :] = float("-inf")  # a query that is left no key
    wanted = attention(*(t.double() for t in qkv), bias=None if bias is None else bias.double(), backend="reference")
    out = attention(*qkv, bias=bias, backend="chunked")
    assert out.dtype == dtype
    assert out.is_contiguous()
    assert (out.double() - wanted).norm() <= tolerance * wanted.norm()


def test_views_of_packed_projections_and_gradients() -> None:
    packed = torch.randn(2, 300, 3 * 4 * 16, dtype=torch.float64, requires_grad=True)
    q, k, v = (part.view(2, 300, 4, 16) for part in torch.split(packed, 64, dim=-1))
    grads = [
        torch.autograd.grad(attention(q, k, v, backend=name).square().sum(), packed, retain_graph=True)[0]
        for name in ("chunked", "reference")
    ]
    torch.testing.assert_close(*grads)


def test_when_auto_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def counted(*given: Any) -> torch.Tensor:
        calls.append(1)
        return chunked(*given)

    monkeypatch.setattr(dispatch, "chunked", counted)
    for dtype, queries, keys, taken in [
        (torch.bfloat16, 256, 256, 1),
        (torch.bfloat16, 4096, 77, 0),
        (torch.float32, 1024, 1024, 0),
    ]:
        q, k = torch.randn(1, queries, 2, 8, dtype=dtype), torch.randn(1, keys, 2, 8, dtype=dtype)
        calls.clear()
        attention(q, k, k)
        assert len(calls) == taken == pays(q, keys)


def test_it_gives_no_sums_and_is_for_fast_networks(tiny_folder: object) -> None:
    q = torch.randn(1, 4, 1, 8)
    with pytest.raises(BadInput, match="Attention 'chunked' does not give the log-sum-exp"):
        attention_with_lse(q, q, q, backend="chunked")
    with pytest.raises(BadInput, match=r"Attention 'chunked' is one of optimised networks: say fast=True \(--fast\) too"):
        Shelf(device="cpu", attention="chunked").load(str(tiny_folder))
    Shelf(device="cpu", attention="chunked", fast=True).load(str(tiny_folder))
