"""Gradients of fused attention, maps of chosen tokens, and both as operators of torch."""

from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from unrolled.kernels import tuning
from unrolled.kernels.attention import attention, attention_with_lse, fused, fused_backward, reference
from unrolled.kernels.attention_maps import attention_maps, maps

pytest.importorskip("triton")

Draw = Callable[..., Tensor]
Agree = Callable[..., None]
HALF, SINGLE = torch.float16, torch.float32
NEVER = float("-inf")
Triple = tuple[Tensor, Tensor, Tensor]


def inputs(draw: Draw, size: int = 40, dtype: torch.dtype = SINGLE, queries: int = 33, keys: int = 50) -> Triple:
    q, k, v = (draw(2, n, 2, size, dtype=dtype) for n in (queries, keys, keys))
    return q, k, v


def gradients(grad: Tensor, qkv: Triple, bias: Tensor | None = None) -> tuple[Tensor, ...]:
    """Ours."""
    leaves = [part.detach().requires_grad_() for part in qkv]
    return torch.autograd.grad(attention(*leaves, bias=bias, backend="triton"), leaves, grad)


def exact_gradients(grad: Tensor, qkv: Triple, bias: Tensor | None = None) -> tuple[Tensor, ...]:
    q, k, v = (part.detach().double().requires_grad_() for part in qkv)
    return torch.autograd.grad(reference(q, k, v, bias, q.shape[-1] ** -0.5)[0], (q, k, v), grad.double())


def check(agree: Agree, draw: Draw, qkv: Triple, bias: Tensor | None = None, grad: Tensor | None = None) -> None:
    grad = draw(*qkv[0].shape, dtype=qkv[0].dtype) if grad is None else grad
    for ours, theirs, part in zip(gradients(grad, qkv, bias), exact_gradients(grad, qkv, bias), qkv, strict=True):
        assert ours.dtype == part.dtype
        # In half precision the probabilities and their gradients are rounded before the products.
        agree(ours, theirs, times=1.0 if part.dtype == SINGLE else 2.0)


@pytest.mark.parametrize("dtype", [HALF, SINGLE], ids=["half", "single"])
@pytest.mark.parametrize("size", [16, 40, 64, 80, 128, 160, 512])
def test_every_head_size(size: int, dtype: torch.dtype, draw: Draw, agree: Agree) -> None:
    check(agree, draw, inputs(draw, size, dtype))


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (7, 1), (1, 77), (64, 64), (65, 130), (130, 7)])
def test_every_length(queries: int, keys: int, draw: Draw, agree: Agree) -> None:
    q, k, v = inputs(draw, queries=queries, keys=keys)
    if keys == 1:  # the only probability is 1, whatever q and k: their gradients are 0
        dq, dk, dv = gradients(draw(*q.shape), (q, k, v))
        assert max(dq.abs().max(), dk.abs().max()) < 1e-5
        assert dv.isfinite().all()
        return
    check(agree, draw, (q, k, v))


def test_what_is_kept_shorter_than_what_is_passed(draw: Draw, agree: Agree, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "room", lambda device: 101_376)
    assert tuning.backward_passes(draw(1, 1, 1, 512))[:2] == (8, 16)
    check(agree, draw, inputs(draw, 512))


def test_strides(draw: Draw, agree: Agree) -> None:
    packed = draw(2, 40, 3, 2, 40).unbind(2)
    check(agree, draw, (packed[0], packed[1], packed[2]))
    last = [draw(2, 40, 40, 2).transpose(2, 3) for _ in range(3)]
    check(agree, draw, (last[0], last[1], last[2]), grad=draw(2, 2, 40, 40).permute(0, 2, 1, 3))
    qkv = inputs(draw)
    check(agree, draw, qkv, grad=draw(1, 1, 1, 1).expand(qkv[0].shape))  # as out.sum().backward() hands it in


@pytest.mark.parametrize("whole", list(product((False, True), repeat=4)), ids=str)
def test_every_shape_of_a_bias(whole: tuple[bool, ...], draw: Draw, agree: Agree) -> None:
    bias = draw(*(n if on else 1 for n, on in zip((2, 2, 33, 50), whole, strict=True)))
    check(agree, draw, inputs(draw), bias)
    check(agree, draw, inputs(draw), bias.masked_fill(draw(*bias.shape) > 0.5, NEVER))


@pytest.mark.filterwarnings("ignore:Input #. requires gradient and is not a double precision")
def test_gradcheck(draw: Draw) -> None:
    # Our kernels calculate in float32, so that the differences have to be large and the tolerance is theirs.
    leaves = [part.requires_grad_() for part in (draw(1, n, 1, 16) for n in (3, 5, 5))]
    bias = draw(1, 1, 3, 5)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, bias=bias, backend="triton")

    assert torch.autograd.gradcheck(ours, leaves, eps=3e-2, atol=5e-3, rtol=5e-3, fast_mode=True)


def test_only_what_is_asked_for(draw: Draw, agree: Agree) -> None:
    q, k, v = inputs(draw)
    q.requires_grad_()
    out, lse = attention_with_lse(q, k, v, backend="triton")
    assert not lse.requires_grad
    (dq,) = torch.autograd.grad(out.square().sum(), q)
    agree(dq, exact_gradients(2 * out.detach(), (q, k, v))[0])
    assert k.grad is None


# --- maps


def whole_matrix(q: Tensor, k: Tensor, bias: Tensor | None = None, scale: float | None = None) -> Tensor:
    """(batch, queries, keys): the mean over the heads of all probabilities."""
    scores = torch.einsum("bmhd,bnhd->bhmn", q.double(), k.double()) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores if bias is None else scores + bias
    return scores.softmax(-1).nan_to_num(0.0).mean(1)


TOKENS = {"one": [3], "some": [2, 0, 49], "again": [7, 7], "many": [*range(0, 50, 2)], "none": []}


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("dtype", [HALF, SINGLE], ids=["half", "single"])
@pytest.mark.parametrize("name", TOKENS)
def test_maps_are_columns_of_the_matrix(backend: str, dtype: torch.dtype, name: str, draw: Draw) -> None:
    q, k, _ = inputs(draw, 80, dtype, queries=70)
    tokens = torch.tensor(TOKENS[name], dtype=torch.int64, device=q.device)
    ours = attention_maps(q, k, tokens, backend=backend)  # type: ignore[arg-type]
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, whole_matrix(q, k)[..., tokens].float(), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("size", [16, 40, 160, 512])
def test_maps_of_head_sizes_and_strides(size: int, draw: Draw) -> None:
    q, k = draw(2, 30, 2, 3, size).unbind(2)
    many = torch.arange(60, device=q.device)
    for tokens in (many[:20:3], many[:20:3].int(), many[:20:3].cpu()):
        ours = attention_maps(q, k, tokens, scale=0.1, backend="triton")
        torch.testing.assert_close(
            ours, whole_matrix(q, k, scale=0.1)[..., [*range(0, 20, 3)]].float(), rtol=2e-5, atol=1e-6
        )


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("whole", list(product((False, True), repeat=4)), ids=str)
def test_maps_with_a_bias(backend: str, whole: tuple[bool, ...], draw: Draw) -> None:
    q, k, v = inputs(draw)
    bias = draw(*(n if on else 1 for n, on in zip((2, 2, 33, 50), whole, strict=True)))
    bias = bias.masked_fill(draw(*bias.shape) > 0.5, NEVER)
    _, lse = attention_with_lse(q, k, v, bias=bias, backend="triton")
    tokens = torch.tensor([4, 1, 48], device=q.device)
    wanted = whole_matrix(q, k, bias)[..., tokens].float()
    for known in (lse, lse.transpose(1, 2).contiguous().transpose(1, 2), None):
        ours = attention_maps(q, k, tokens, lse=known, bias=bias, backend=backend)  # type: ignore[arg-type]
        torch.testing.assert_close(ours, wanted, rtol=2e-5, atol=1e-6)


# --- as operators of torch


@pytest.mark.parametrize("with_bias", [False, True])
def test_opcheck(with_bias: bool, draw: Draw) -> None:
    q, k, v = inputs(draw, 16, queries=5, keys=9)
    bias = draw(2, 1, 1, 9) if with_bias else None
    out, lse = fused(q, k, v, bias, 0.25)
    torch.library.opcheck(fused, (q, k, v, bias, 0.25))
    torch.library.opcheck(fused, (*(part.clone().requires_grad_() for part in (q, k, v)), bias, 0.25))
    torch.library.opcheck(fused_backward, (out, q, k, v, bias, out, lse, 0.25))
    tokens = torch.tensor([1, 4], device=q.device)
    torch.library.opcheck(maps, (q, k, tokens, lse, None if bias is None else bias[..., tokens], 0.25))


def test_compile_sees_one_graph(draw: Draw) -> None:
    q, k, v = inputs(draw)

    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q * 2, k, v, backend="triton") + 1

    for backend in ("eager", "aot_eager"):
        compiled = torch.compile(step, backend=backend, fullgraph=True)
        leaves = [part.clone().requires_grad_() for part in (q, k, v)]
        out = compiled(*leaves)
        assert torch.equal(out, step(q, k, v))
        out.sum().backward()  # type: ignore[no-untyped-call]
        wanted = gradients(torch.ones_like(q), (q * 2, k, v))
        torch.testing.assert_close([leaf.grad for leaf in leaves], [wanted[0] * 2, *wanted[1:]])


def test_export_keeps_the_operator(draw: Draw) -> None:
    class Layer(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attention(q, k, v, backend="triton")

    qkv = inputs(draw)
    exported = torch.export.export(Layer(), qkv)
    assert "unrolled.attention" in str(exported.graph)
    assert torch.equal(exported.module()(*qkv), Layer()(*qkv))


def test_fake_tensors_have_the_shapes_of_real_ones(draw: Draw) -> None:
    q, k, v = layout = draw(2, 9, 3, 2, 16).unbind(2)
    real = (*fused(q, k, v, None, 1.0), *fused_backward(q, q, k, v, None, *fused(q, k, v, None, 1.0), 1.0))
    with FakeTensorMode() as mode:
        q, k, v = (mode.from_tensor(part) for part in layout)
        out, lse = fused(q, k, v, None, 1.0)
        fake = (out, lse, *fused_backward(out, q, k, v, None, out, lse, 1.0))
    for a, b in zip(real, fake, strict=True):
        assert (a.shape, a.stride(), a.dtype, a.device) == (b.shape, b.stride(), b.dtype, b.device)


def test_the_flop_counter_sees_what_it_does(draw: Draw) -> None:
    q, k, v = (part.requires_grad_() for part in inputs(draw, 16, queries=5, keys=9))
    products = 2 * 2 * 5 * 9 * 16  # batch, heads, queries, keys, head size
    with FlopCounterMode(display=False) as counter:
        out = attention(q, k, v, backend="triton")
    assert counter.get_total_flops() == 2 * 2 * products
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()  # type: ignore[no-untyped-call]
    assert counter.get_total_flops() == 5 * 2 * products, "the scores and four products of gradients"
    with FlopCounterMode(display=False) as counter:
        reference(q, k, v, None, 1.0)
    assert counter.get_total_flops() == 2 * 2 * products, "torch counts our reference likewise"
    lse, tokens = attention_with_lse(q, k, v)[1], torch.tensor([1, 4], device=q.device)
    with FlopCounterMode(display=False) as counter:
        attention_maps(q, k, tokens, lse=lse, backend="triton")
    assert counter.get_total_flops() == 2 * products * 2 // 9, "two of nine keys"
