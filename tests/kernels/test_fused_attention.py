"""Fused attention against float64: every head size, odd lengths, strides, biases."""

from collections.abc import Callable
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from unrolled.kernels.attention import attention, attention_with_lse, reference

pytest.importorskip("triton")

Draw = Callable[..., Tensor]
Agree = Callable[..., None]
HALF, SINGLE = torch.float16, torch.float32
SIZES = [16, 40, 64, 80, 128, 160, 512]
LENGTHS = [(1, 1), (7, 1), (1, 77), (64, 64), (77, 130), (130, 7), (128, 77), (576, 608)]
NEVER = float("-inf")
dtypes = pytest.mark.parametrize("dtype", [HALF, SINGLE], ids=["half", "single"])


def exact(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, scale: float | None = None) -> tuple[Tensor, Tensor]:
    return reference(q.double(), k.double(), v.double(), bias, q.shape[-1] ** -0.5 if scale is None else scale)


def check(agree: Agree, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, scale: float | None = None) -> Tensor:
    """Ours is the exact one, contiguous and of the inputs' dtype, with its log-sum-exp."""
    out, lse = attention_with_lse(q, k, v, bias=bias, scale=scale, backend="triton")
    wanted, wanted_lse = exact(q, k, v, bias, scale)
    assert out.dtype == q.dtype
    assert out.is_contiguous()
    assert lse.dtype == torch.float32
    agree(out, wanted)
    torch.testing.assert_close(lse, wanted_lse, rtol=2e-6, atol=5e-6)
    return out


def test_the_reference_is_torch_s(draw: Draw, agree: Agree) -> None:
    q, k, v = (draw(2, n, 3, 40, dtype=torch.float64) for n in (7, 13, 13))
    bias = draw(2, 1, 7, 13, dtype=torch.float64)
    out, lse = reference(q, k, v, bias, 0.3)
    theirs = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=bias, scale=0.3
    )
    torch.testing.assert_close(out, theirs.transpose(1, 2))
    scores = torch.einsum("bmhd,bnhd->bhmn", q, k) * 0.3 + bias
    torch.testing.assert_close(lse, scores.exp().sum(-1).log().float())


@dtypes
@pytest.mark.parametrize("size", SIZES)
def test_every_head_size(size: int, dtype: torch.dtype, draw: Draw, agree: Agree) -> None:
    check(agree, draw(2, 77, 2, size, dtype=dtype), draw(2, 41, 2, size, dtype=dtype), draw(2, 41, 2, size, dtype=dtype))


@pytest.mark.parametrize("size", [17, 24, 63, 65, 100, 255])
def test_head_sizes_between(size: int, draw: Draw, agree: Agree) -> None:
    q, k, v = (draw(1, n, 2, size) for n in (33, 50, 50))
    check(agree, q, k, v)


@dtypes
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_every_length(lengths: tuple[int, int], dtype: torch.dtype, draw: Draw, agree: Agree) -> None:
    queries, keys = lengths
    q, k, v = (draw(1, n, 2, 40, dtype=dtype) for n in (queries, keys, keys))
    check(agree, q, k, v)


@pytest.mark.parametrize(("batch", "queries", "keys"), [(0, 5, 5), (1, 0, 5), (1, 5, 0)])
def test_nothing_to_do(batch: int, queries: int, keys: int, draw: Draw) -> None:
    q, k, v = (draw(batch, n, 2, 16) for n in (queries, keys, keys))
    out, lse = attention_with_lse(q, k, v, backend="triton")
    assert torch.equal(out, torch.zeros_like(q)), "of no keys at all the sum is 0"
    assert torch.equal(lse, torch.full_like(lse, NEVER))


def layouts(draw: Draw, dtype: torch.dtype) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Queries, keys and values (2, 19, 3, 40), each way with other strides."""
    batch, length, heads, size = shape = 2, 19, 3, 40
    first = [draw(batch, heads, length, size, dtype=dtype).transpose(1, 2) for _ in range(3)]
    last = [draw(batch, length, size, heads, dtype=dtype).transpose(2, 3) for _ in range(3)]
    backwards = [draw(length, heads, batch, size, dtype=dtype).permute(2, 0, 1, 3) for _ in range(3)]
    wide = [draw(batch, 2 * length, 2 * heads, size + 8, dtype=dtype)[:, 1::2, ::2, 3 : 3 + size] for _ in range(3)]
    same = [draw(1, length, 1, size, dtype=dtype).expand(shape) for _ in range(3)]
    pair = draw(batch, length, heads, 2, size, dtype=dtype).unbind(3)
    found = {
        "packed qkv": draw(batch, length, 3, heads, size, dtype=dtype).unbind(2),
        "packed per head": draw(batch, length, heads, 3 * size, dtype=dtype).chunk(3, -1),
        "packed kv": (draw(*shape, dtype=dtype), *pair),
        "heads first": first, "size not last": last, "permuted": backwards, "cut out": wide, "expanded": same,
    }  # fmt: skip
    return {name: (parts[0], parts[1], parts[2]) for name, parts in found.items()}


NAMES = ["packed qkv", "packed per head", "packed kv", "heads first", "size not last", "permuted", "cut out", "expanded"]


@dtypes
@pytest.mark.parametrize("name", NAMES)
def test_strides(name: str, dtype: torch.dtype, draw: Draw, agree: Agree) -> None:
    q, k, v = layouts(draw, dtype)[name]
    assert name == "packed kv" or not q.is_contiguous()
    check(agree, q, k, v)


BROADCASTS = list(product((False, True), repeat=4))


@pytest.mark.parametrize(
    "whole", BROADCASTS, ids=lambda whole: "".join("bhmn"[i] if on else "1" for i, on in enumerate(whole))
)
def test_every_shape_of_a_bias(whole: tuple[bool, ...], draw: Draw, agree: Agree) -> None:
    q, k, v = (draw(2, n, 3, 40, dtype=HALF) for n in (70, 90, 90))
    bias = draw(*(n if on else 1 for n, on in zip((2, 3, 70, 90), whole, strict=True)))
    check(agree, q, k, v, bias)
    bias = bias.masked_fill(draw(*bias.shape) > 0.5, NEVER)
    check(agree, q, k, v, bias)


@dtypes
def test_a_bias_of_other_dtypes_and_strides(dtype: torch.dtype, draw: Draw, agree: Agree) -> None:
    q, k, v = (draw(2, n, 3, 40, dtype=dtype) for n in (33, 90, 90))
    for bias in (
        draw(2, 3, 33, 90, dtype=HALF), draw(2, 3, 90, 33).transpose(2, 3), draw(2, 3, 66, 180)[:, :, ::2, 1::2],
        draw(90, 1, 1, 2).permute(3, 1, 2, 0), draw(1, 1, 33, 1).expand(2, 3, 33, 90),
    ):  # fmt: skip
        check(agree, q, k, v, bias)


@dtypes
@pytest.mark.parametrize("keys", [5, 130])
def test_a_query_that_is_left_no_key_comes_out_as_0(keys: int, dtype: torch.dtype, draw: Draw, agree: Agree) -> None:
    q, k, v = (draw(2, n, 2, 40, dtype=dtype).requires_grad_() for n in (33, keys, keys))
    bias = torch.zeros(2, 1, 33, keys, device=q.device)
    bias[0, :, 3:20] = NEVER  # rows of one picture
    bias[:, :, :, keys - 1] = NEVER  # and a key of all
    out = check(agree, q, k, v, bias)
    assert not out[0, 3:20].any()
    assert torch.equal(attention_with_lse(q, k, v, bias=bias, backend="triton")[1][0, :, 3:20], torch.full((2, 17), NEVER))
    out.backward(draw(*out.shape, dtype=dtype))  # type: ignore[no-untyped-call]
    gradients = [part.grad for part in (q, k, v)]
    assert all(g is not None and g.isfinite().all() and g.any() for g in gradients)
    assert not gradients[0][0, 3:20].any()  # type: ignore[index]
    assert not gradients[1][:, -1].any()  # type: ignore[index]
    assert not gradients[2][:, -1].any()  # type: ignore[index]


@pytest.mark.parametrize("backend", ["auto", "sdpa", "reference"])
def test_the_other_backends_leave_out_keys_likewise(backend: str, draw: Draw) -> None:
    q, k, v = (draw(1, n, 2, 16) for n in (5, 9, 9))
    bias = torch.zeros(1, 1, 5, 9, device=q.device)
    bias[:, :, 2] = NEVER
    bias[:, :, 3, 4:] = NEVER
    out = attention(q, k, v, bias=bias, backend=backend)  # type: ignore[arg-type]
    assert not out[:, 2].any()
    torch.testing.assert_close(out, attention(q, k, v, bias=bias, backend="triton"))


def test_leading_blocks_of_keys_may_all_be_left_out(draw: Draw, agree: Agree) -> None:
    q, k, v = (draw(1, n, 1, 64) for n in (9, 300, 300))
    bias = torch.full((1, 1, 9, 300), NEVER, device=q.device)
    bias[..., 290:] = 0
    check(agree, q, k, v, bias)


@pytest.mark.parametrize("size", [1e2, 1e4])
def test_large_scores_do_not_overflow(size: float, draw: Draw, agree: Agree) -> None:
    q, k, v = draw(1, 20, 2, 64) * size, draw(1, 90, 2, 64), draw(1, 90, 2, 64) * size
    out, lse = attention_with_lse(q, k, v, backend="triton")
    # Where scores are large, their rounding in float32 is what the result is off by.
    agree(out, exact(q, k, v)[0], times=size)
    torch.testing.assert_close(lse, exact(q, k, v)[1], rtol=1e-6, atol=0)
    low = attention(q, k, v, bias=torch.full((1, 1, 1, 1), -2e6 * size, device=q.device), backend="triton", scale=0.0)
    agree(low, v.double().mean(1, keepdim=True).expand_as(q))


@dtypes
@pytest.mark.parametrize("scale", [0.0, -0.3, 1.7])
def test_the_scale(scale: float, dtype: torch.dtype, draw: Draw, agree: Agree) -> None:
    q, k, v = (draw(1, n, 2, 40, dtype=dtype) for n in (20, 30, 30))
    check(agree, q, k, v, scale=scale)


def test_nan_is_not_hidden(draw: Draw) -> None:
    q, k, v = (draw(1, n, 1, 16) for n in (4, 9, 9))
    q[0, 1, 0, 3] = float("nan")
    out = attention(q, k, v, backend="triton")
    assert out[0, 1].isnan().all()
    assert out[0, [0, 2, 3]].isfinite().all()


def test_two_runs_are_the_same_bits(draw: Draw) -> None:
    q, k, v = (draw(2, n, 2, 80, dtype=HALF) for n in (77, 130, 130))
    runs = [attention_with_lse(q, k, v, backend="triton") for _ in range(2)]
    assert torch.equal(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1], runs[1][1])


def test_parts_of_the_keys_put_together_by_their_log_sum_exp(draw: Draw, agree: Agree) -> None:
    q, k, v = (draw(2, n, 2, 64) for n in (30, 100, 100))
    parts = [attention_with_lse(q, k[:, at], v[:, at], backend="triton") for at in (slice(0, 37), slice(37, 100))]
    share = torch.stack([lse for _, lse in parts]).softmax(0).transpose(2, 3)[..., None]
    agree(sum(share[i] * out for i, (out, _) in enumerate(parts)), exact(q, k, v)[0])


def test_the_backends_agree(draw: Draw, agree: Agree) -> None:
    q, k, v = (draw(2, n, 2, 40) for n in (30, 77, 77))
    bias = draw(2, 1, 1, 77)
    for backend in ("auto", "sdpa", "reference", "triton"):
        out = attention(q, k, v, bias=bias, scale=0.2, backend=backend)
        assert out.is_contiguous()
        agree(out, exact(q, k, v, bias, 0.2)[0])
    assert torch.equal(attention(q, k, v), attention(q, k, v, backend="sdpa"))
