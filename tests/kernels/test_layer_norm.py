"""LayerNorm, the residual sum before it, and GEGLU against float64: sizes, strides, gradients, errors."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from unrolled.core.errors import BadInput
from unrolled.kernels import geglu as geglu_module
from unrolled.kernels import layer_norm as module
from unrolled.kernels.geglu import geglu
from unrolled.kernels.layer_norm import add_layer_norm, layer_norm

pytest.importorskip("triton")

Draw = Callable[..., Tensor]
Agree = Callable[..., None]
HALF, SINGLE = torch.float16, torch.float32
NONE: Any = "x"
dtypes = pytest.mark.parametrize("dtype", [HALF, SINGLE], ids=["half", "single"])
SHAPES = [(3, 5, 320), (1, 1), (7, 2), (77, 768), (2, 9, 640), (33, 1280), (5, 2047), (2, 3, 4, 65), (1, 3000), (64,)]


def exact(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    weight, bias = (None if part is None else part.double() for part in (weight, bias))
    return F.layer_norm(x.double(), x.shape[-1:], weight, bias, eps)


def rows(draw: Draw, dtype: torch.dtype) -> dict[str, Tensor]:
    """(2, 9, 40) with other strides."""
    return {
        "cut out": draw(2, 9, 60, dtype=dtype)[..., 3:43],
        "every other": draw(2, 18, 40, dtype=dtype)[:, ::2],
        "size first": draw(2, 40, 9, dtype=dtype).transpose(1, 2),
        "length first": draw(9, 2, 40, dtype=dtype).transpose(0, 1),
        "channels of a picture": draw(2, 40, 3, 3, dtype=dtype).flatten(2).transpose(1, 2),
        "every other number": draw(2, 9, 80, dtype=dtype)[..., ::2],
        "expanded": draw(1, 1, 40, dtype=dtype).expand(2, 9, 40),
    }


NAMES = ["cut out", "every other", "size first", "length first", "channels of a picture", "every other number", "expanded"]


@dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_size(shape: tuple[int, ...], dtype: torch.dtype, draw: Draw, agree: Agree) -> None:
    x, more, weight, bias = (draw(*s, dtype=dtype) for s in (shape, shape, shape[-1:], shape[-1:]))
    for parts in ((weight, bias), (weight, None), (None, bias), (None, None)):
        out = layer_norm(x, *parts, backend="triton")
        assert out.dtype == dtype
        assert out.is_contiguous()
        agree(out, exact(x, *parts))
    total, out = add_layer_norm(x, more, weight, bias, eps=0.1, backend="triton")
    assert torch.equal(total, x + more)
    agree(out, exact(total, weight, bias, 0.1))


@dtypes
@pytest.mark.parametrize("name", NAMES)
def test_strides(name: str, dtype: torch.dtype, draw: Draw, agree: Agree) -> None:
    x, weight, bias = rows(draw, dtype)[name], draw(80, dtype=dtype)[::2], draw(40, 2, dtype=dtype)[:, 0]
    agree(layer_norm(x, weight, bias, backend="triton"), exact(x, weight, bias))
    for more in list(rows(draw, dtype).values())[::3]:
        total, out = add_layer_norm(x, more, weight, bias, backend="triton")
        assert torch.equal(total, x + more)
        assert total.is_contiguous()
        agree(out, exact(total, weight, bias))


def test_a_large_mean_and_extremes(draw: Draw, agree: Agree) -> None:
    x = 1000 + draw(4, 1280)
    agree(layer_norm(x, backend="triton"), exact(x), times=20)
    x = draw(4, 1280, dtype=HALF) * 15000
    agree(layer_norm(x, backend="triton"), exact(x))
    total, out = add_layer_norm(x, -x, torch.ones_like(x[0]), torch.ones_like(x[0]), backend="triton")
    assert not total.any()
    assert torch.equal(out, torch.ones_like(out)), "nothing is left but the bias"


def test_nothing_to_do(draw: Draw) -> None:
    assert layer_norm(draw(0, 8), backend="triton").shape == (0, 8)
    assert add_layer_norm(draw(2, 0, 8), draw(2, 0, 8), backend="triton")[1].shape == (2, 0, 8)
    assert geglu(draw(0, 8), backend="triton").shape == (0, 4)
    assert geglu(draw(3, 0), backend="triton").shape == (3, 0)


def test_the_backends_agree(draw: Draw, agree: Agree) -> None:
    x, more, weight, bias = draw(2, 9, 40), draw(2, 9, 40), draw(40), draw(40)
    for backend in ("auto", "reference", "triton"):
        agree(layer_norm(x, weight, bias, backend=backend), exact(x, weight, bias))
        total, out = add_layer_norm(x, more, weight, bias, backend=backend)
        agree(total, x.double() + more.double())
        agree(out, exact(total, weight, bias))
        agree(geglu(x, backend=backend), exact_geglu(x))


@dtypes
def test_gradients(dtype: torch.dtype, draw: Draw, agree: Agree) -> None:
    leaves = [draw(2, 9, 40, dtype=dtype), draw(2, 9, 40, dtype=dtype), draw(40, dtype=dtype), draw(40, dtype=dtype)]
    x, more, weight, bias = (part.clone().requires_grad_() for part in leaves)
    wide = [part.double().requires_grad_() for part in leaves]
    grad, grad_total = draw(2, 9, 40, dtype=dtype), draw(2, 9, 40, dtype=dtype)
    got = torch.autograd.grad(layer_norm(x, weight, bias, backend="triton"), (x, weight, bias), grad)
    parts = (wide[0], wide[2], wide[3])
    for ours, theirs in zip(got, torch.autograd.grad(exact(*parts), parts, grad.double()), strict=True):
        agree(ours, theirs, times=2)
    got = torch.autograd.grad(
        add_layer_norm(x, more, weight, bias, backend="triton"), (x, more, weight, bias), (grad_total, grad)
    )
    total = wide[0] + wide[1]
    wanted = torch.autograd.grad((total, exact(total, wide[2], wide[3])), wide, (grad_total.double(), grad.double()))
    for ours, theirs in zip(got, wanted, strict=True):
        agree(ours, theirs, times=2)
    (only,) = torch.autograd.grad(add_layer_norm(x, more, weight, bias, backend="triton")[1], x, grad)
    total = wide[0] + wide[1]
    agree(only, torch.autograd.grad(exact(total, wide[2], wide[3]), wide[0], grad.double())[0], times=2)


# --- GEGLU


def exact_geglu(x: Tensor) -> Tensor:
    value, gate = x.double().chunk(2, -1)
    return value * F.gelu(gate)


@dtypes
@pytest.mark.parametrize(
    "shape", [(3, 5, 640), (1, 2), (7, 6), (77, 2560), (2, 9, 1026), (2, 10240), (4, 3, 2, 130), (8,)], ids=str
)
def test_geglu_of_every_size(shape: tuple[int, ...], dtype: torch.dtype, draw: Draw, agree: Agree) -> None:
    x = draw(*shape, dtype=dtype)
    out = geglu(x, backend="triton")
    assert out.dtype == dtype
    assert out.is_contiguous()
    agree(out, exact_geglu(x))


@dtypes
@pytest.mark.parametrize("name", NAMES)
def test_geglu_of_strides(name: str, dtype: torch.dtype, draw: Draw, agree: Agree) -> None:
    x = rows(draw, dtype)[name]
    agree(geglu(x, backend="triton"), exact_geglu(x))


def test_geglu_is_the_exact_one(draw: Draw) -> None:
    gate = torch.linspace(-6, 6, 1001, device=draw(1).device)
    out = geglu(torch.cat([torch.ones_like(gate), gate]), backend="triton")
    assert (out - F.gelu(gate)).abs().max() < 1e-6
    assert (out - F.gelu(gate, approximate="tanh")).abs().max() > 4e-4, "the other form differs by this much"


@dtypes
def test_gradient_of_geglu(dtype: torch.dtype, draw: Draw, agree: Agree) -> None:
    x, grad = draw(3, 5, 64, dtype=dtype).requires_grad_(), draw(3, 5, 32, dtype=dtype)
    wide = x.detach().double().requires_grad_()
    (got,) = torch.autograd.grad(geglu(x, backend="triton"), x, grad)
    agree(got, torch.autograd.grad(exact_geglu(wide), wide, grad.double())[0])


# --- as operators of torch


def test_opcheck(draw: Draw) -> None:
    x, more, weight, bias = (draw(*s).requires_grad_() for s in ((2, 3, 16), (2, 3, 16), (16,), (16,)))
    torch.library.opcheck(module.fused, (x, weight, bias, 1e-5))
    torch.library.opcheck(module.fused, (x.detach().transpose(0, 1), None, None, 1e-5))
    torch.library.opcheck(module.fused_add, (x, more, weight, bias, 1e-5))
    torch.library.opcheck(geglu_module.fused, (x,))
    torch.library.opcheck(geglu_module.fused, (x.detach().transpose(0, 1),))


def test_compile_sees_one_graph(draw: Draw) -> None:
    def block(x: Tensor, more: Tensor) -> Tensor:
        total, normed = add_layer_norm(x, more, backend="triton")
        return geglu(layer_norm(total + normed, backend="triton"), backend="triton")

    x, more = draw(2, 5, 16), draw(2, 5, 16)
    assert torch.equal(torch.compile(block, backend="aot_eager", fullgraph=True)(x, more), block(x, more))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: layer_norm(x, torch.zeros(4)), "The weight of this norm is (8,), but was given as (4,)."),
        (lambda x: add_layer_norm(x, x, None, torch.zeros(2, 8)), "The bias of this norm is (8,), but was given as (2, 8)."),
        (lambda x: layer_norm(x[0, 0]), "A layer norm takes rows of up to 16384 numbers by our kernel, but was given ()."),
        (
            lambda x: layer_norm(torch.zeros(1, 16385), backend="triton"),
            "A layer norm takes rows of up to 16384 numbers by our kernel, but was given (1, 16385).",
        ),
        (
            lambda x: add_layer_norm(x, x.half()),
            "A residual sum adds two of one kind, but was given (2, 8) in torch.float32 and (2, 8) in torch.float16.",
        ),
        (lambda x: layer_norm(x, backend=NONE), "There is no layer_norm 'x': use auto, triton, torch, reference."),
        (
            lambda x: add_layer_norm(x, x, backend=NONE),
            "There is no add_layer_norm 'x': use auto, triton, torch, reference.",
        ),
        (lambda x: geglu(x, backend=NONE), "There is no geglu 'x': use auto, triton, torch, reference."),
        (lambda x: geglu(x[:, :7]), "GEGLU takes values and gates side by side, (…, 2 n), but was given (2, 7)."),
        (
            lambda x: geglu(x.double(), backend="triton"),
            "Our kernel of geglu cannot run on cpu (our kernels take float16, bfloat16 and float32, not float64): use auto, "
            "or see unrolled doctor.",
        ),
    ],
)
def test_errors(call: Callable[[Tensor], Any], message: str) -> None:
    with pytest.raises(BadInput) as raised:
        call(torch.zeros(2, 8))
    assert str(raised.value) == message
