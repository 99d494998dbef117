"""GroupNorm with its modulation and SiLU against float64: sizes, strides, statistics, gradients, errors."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from unrolled.core.errors import BadInput
from unrolled.kernels.group_norm_silu import fused, group_norm_silu, reference
from unrolled.kernels.measured_table import Strips

pytest.importorskip("triton")

Draw = Callable[..., Tensor]
Agree = Callable[..., None]
HALF, SINGLE = torch.float16, torch.float32
dtypes = pytest.mark.parametrize("dtype", [HALF, SINGLE], ids=["half", "single"])
Options = dict[str, Any]
STRIPS = "unrolled.kernels.group_norm_kernel.group_norm_strips"  # imported only where the interpreter is on


def options(draw: Draw, x: Tensor, modulated: bool = False) -> Options:
    weight, bias = draw(x.shape[1], dtype=x.dtype), draw(x.shape[1], dtype=x.dtype)
    parts = {"scale": draw(*x.shape[:2], dtype=x.dtype), "shift": draw(*x.shape[:2], dtype=x.dtype)} if modulated else {}
    return {"weight": weight, "bias": bias, **parts}


def exact(x: Tensor, groups: int, silu: bool = True, eps: float = 1e-5, **parts: Tensor) -> Tensor:
    """By torch's own group norm in float64."""
    wide = {name: part.double() for name, part in parts.items()}
    out = F.group_norm(x.double(), groups, wide.get("weight"), wide.get("bias"), eps)
    if "scale" in wide:
        batch_and_channels = (*x.shape[:2], *[1] * (x.ndim - 2))
        out = out * (1 + wide["scale"].reshape(batch_and_channels)) + wide["shift"].reshape(batch_and_channels)
    return F.silu(out) if silu else out


def check(agree: Agree, x: Tensor, groups: int, times: float = 1.0, **rest: Any) -> Tensor:
    out = group_norm_silu(x, groups, backend="triton", **rest)
    assert out.dtype == x.dtype
    agree(out, exact(x, groups, **rest), times)
    return out


SIZES = [
    ((2, 32, 8, 8), 4), ((1, 1, 1, 2), 1), ((2, 3, 7, 5), 3), ((3, 96, 13, 9), 3), ((1, 320, 4, 4), 32), ((2, 40, 1, 1), 4),
    ((1, 6, 65, 33), 1), ((2, 320, 70), 4), ((2, 12), 3), ((1, 6, 3, 4, 5), 6),
]  # fmt: skip


@dtypes
@pytest.mark.parametrize("last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize(("shape", "groups"), SIZES, ids=str)
def test_every_size(shape: tuple[int, ...], groups: int, last: bool, dtype: torch.dtype, draw: Draw, agree: Agree) -> None:
    wanted = torch.channels_last if last and len(shape) == 4 else torch.contiguous_format
    x = draw(*shape, dtype=dtype).contiguous(memory_format=wanted)
    for modulated in (False, True):
        assert check(agree, x, groups, **options(draw, x, modulated)).is_contiguous(memory_format=wanted)


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("names", [(), ("weight",), ("bias",), ("scale", "shift"), ("weight", "scale", "shift")])
def test_every_part_may_be_left_out(silu: bool, names: tuple[str, ...], draw: Draw, agree: Agree) -> None:
    x = draw(2, 24, 6, 5)
    parts = {name: part for name, part in options(draw, x, True).items() if name in names}
    check(agree, x, 4, silu=silu, eps=0.1, **parts)


def layouts(draw: Draw, dtype: torch.dtype) -> dict[str, tuple[Tensor, torch.memory_format]]:
    """(2, 24, 10, 6) with other strides, and in which format the result is to come."""
    first, last = torch.contiguous_format, torch.channels_last
    return {
        "channels cut out": (draw(2, 40, 10, 6, dtype=dtype)[:, 8:32], first),
        "channels cut out, last": (draw(2, 10, 6, 40, dtype=dtype)[..., 8:32].permute(0, 3, 1, 2), last),
        "a picture of two": (draw(4, 24, 10, 6, dtype=dtype)[::2], first),
        "columns left out": (draw(2, 24, 10, 12, dtype=dtype)[..., ::2], first),
        "every other row": (draw(2, 24, 20, 6, dtype=dtype)[:, :, ::2], first),
        "every other row, last": (draw(2, 20, 6, 24, dtype=dtype)[:, ::2].permute(0, 3, 1, 2), last),
        "turned": (draw(2, 24, 6, 10, dtype=dtype).transpose(2, 3), first),
        "expanded": (draw(1, 24, 10, 6, dtype=dtype).expand(2, 24, 10, 6), first),
    }


LAYOUTS = [
    "channels cut out", "channels cut out, last", "a picture of two", "columns left out", "every other row",
    "every other row, last", "turned", "expanded",
]  # fmt: skip


@dtypes
@pytest.mark.parametrize("name", LAYOUTS)
def test_strides(name: str, dtype: torch.dtype, draw: Draw, agree: Agree) -> None:
    x, wanted = layouts(draw, dtype)[name]
    assert x.shape == (2, 24, 10, 6)
    out = check(agree, x, 3, **options(draw, x, True))
    assert out.is_contiguous(memory_format=wanted)


def test_parts_that_are_not_contiguous(draw: Draw, agree: Agree) -> None:
    x = draw(2, 24, 5, 5)
    scale, shift = draw(2, 48).chunk(2, 1)  # as a network's time embedding is cut
    check(agree, x, 4, weight=draw(48)[::2], bias=draw(24, 2)[:, 1], scale=scale, shift=shift)


@dtypes
@pytest.mark.parametrize("last", [False, True], ids=["nchw", "nhwc"])
def test_stretches_of_unequal_length(last: bool, dtype: torch.dtype, draw: Draw, agree: Agree, monkeypatch: Any) -> None:
    x = draw(1, 6, 37, 11, dtype=dtype)
    x = x.to(memory_format=torch.channels_last) if last else x
    for places, stretch in ((16, 48), (64, 64), (128, 384)):
        strips = Strips(places, 4, stretch, 4)
        monkeypatch.setattr(STRIPS, lambda *_, s=strips, **__: s)
        check(agree, x, 2, **options(draw, x))


def test_more_stretches_than_are_put_together_at_once(draw: Draw, agree: Agree, monkeypatch: Any) -> None:
    monkeypatch.setattr(STRIPS, lambda *_, **__: Strips(4, 2, 4, 4))
    x = draw(1, 2, 300) + torch.linspace(0, 9, 300, device=draw(1).device)
    check(agree, x, 1)


@pytest.mark.parametrize("last", [False, True], ids=["nchw", "nhwc"])
def test_a_large_mean_with_a_small_variance(last: bool, draw: Draw, agree: Agree) -> None:
    x = 1000 + draw(2, 4, 40, 30)
    x = x.to(memory_format=torch.channels_last) if last else x
    # What is left of 1000 +- 1 in float32 is 6e-5: the kernel may not lose more. E[x^2] - E[x]^2 would be off by 6e-2.
    naive = (x.square().mean() - x.mean().square() - x.double().var(correction=0)).abs()
    assert naive > 1e-3
    check(agree, x, 2, times=20, silu=False)
    check(agree, (1000 + 40 * draw(2, 4, 40, 30)).half(), 2, times=3)


def test_one_value_everywhere(draw: Draw) -> None:
    x = torch.full((1, 8, 5, 5), 3.0, device=draw(1).device)
    out = group_norm_silu(x, 2, bias=torch.ones_like(x[0, :, 0, 0]), silu=False, backend="triton")
    # No variance: what is left is the bias.
    torch.testing.assert_close(out, torch.ones_like(x))


def test_extremes_of_half_precision(draw: Draw, agree: Agree) -> None:
    check(agree, draw(1, 8, 16, 16, dtype=HALF) * 15000, 2, times=2)  # the sum of squares is 1e11, beyond float16
    check(agree, (draw(1, 8, 16, 16) * 1e-4).half(), 2, eps=1e-12, times=2)
    out = group_norm_silu(torch.full((1, 2, 4), 1.0, device=draw(1).device), 1, bias=draw(2) * 0 - 200, backend="triton")
    assert torch.equal(out, torch.zeros_like(out)), "SiLU of -200 is 0"


def test_nothing_to_do(draw: Draw) -> None:
    for shape in ((0, 8, 4, 4), (2, 8, 0, 4)):
        assert group_norm_silu(draw(*shape), 2, backend="triton").shape == shape


def test_the_backends_agree(draw: Draw, agree: Agree) -> None:
    x = draw(2, 24, 6, 5).to(memory_format=torch.channels_last)
    rest = options(draw, x, True)
    for backend in ("auto", "reference", "triton"):
        out = group_norm_silu(x, 3, backend=backend, **rest)
        agree(out, exact(x, 3, **rest))
        assert out.stride() == x.stride()
    runs = [group_norm_silu(x, 3, backend="triton", **rest) for _ in range(2)]
    assert torch.equal(*runs)


@dtypes
@pytest.mark.parametrize("last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize("silu", [False, True])
def test_gradients(dtype: torch.dtype, last: bool, modulated: bool, silu: bool, draw: Draw, agree: Agree) -> None:
    x = draw(2, 24, 6, 5, dtype=dtype)
    x = x.to(memory_format=torch.channels_last) if last else x
    leaves = {"x": x, **options(draw, x, modulated)}
    ours = {name: part.clone().requires_grad_() for name, part in leaves.items()}
    wide = {name: part.double().requires_grad_() for name, part in leaves.items()}
    grad = draw(*x.shape, dtype=dtype)
    out = group_norm_silu(groups=3, silu=silu, backend="triton", **ours)
    wanted = torch.autograd.grad(exact(groups=3, silu=silu, **wide), list(wide.values()), grad.double())
    for mine, theirs in zip(torch.autograd.grad(out, list(ours.values()), grad), wanted, strict=True):
        agree(mine, theirs, times=2)


def test_gradcheck_of_the_formula(draw: Draw) -> None:
    x = draw(2, 4, 3, 2, dtype=torch.float64).requires_grad_()
    rest = {k: v.double().requires_grad_() for k, v in options(draw, x, True).items()}

    def ours(x: Tensor, *parts: Tensor) -> Tensor:
        return _Formula.apply(x, 2, *parts, 1e-5, True)  # type: ignore[no-any-return, no-untyped-call]

    assert torch.autograd.gradcheck(ours, (x, *rest.values()))


class _Formula(torch.autograd.Function):
    """The operator's backward around the reference, which there is in float64."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        from unrolled.kernels.group_norm_silu import _keep

        out = reference(*inputs)
        _keep(ctx, inputs, out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        from unrolled.kernels.group_norm_silu import _backward

        return _backward(ctx, *grads)


def test_opcheck(draw: Draw) -> None:
    x = draw(2, 8, 3, 5).requires_grad_()
    rest = [part.requires_grad_() for part in options(draw, x, True).values()]
    torch.library.opcheck(fused, (x, 2, *rest, 1e-5, True))
    torch.library.opcheck(fused, (x.detach().to(memory_format=torch.channels_last), 2, None, None, None, None, 1e-5, False))


def test_compile_sees_one_graph(draw: Draw) -> None:
    x = draw(2, 8, 6, 5).to(memory_format=torch.channels_last)

    def block(x: Tensor) -> Tensor:
        return group_norm_silu(x * 2, 2, backend="triton") + 1

    out = torch.compile(block, backend="aot_eager", fullgraph=True)(x)
    assert torch.equal(out, block(x))
    assert out.stride() == x.stride()


@pytest.mark.parametrize(
    ("shape", "rest", "message"),
    [
        ((2, 9, 4, 4), {}, "A group norm of 4 groups takes .* a multiple of that, but was given (2, 9, 4, 4)."),
        ((8,), {}, "A group norm of 4 groups takes (batch, channels, …)"),
        ((2, 8, 4), {"weight": (4,)}, "The weight of this norm is (8,), but was given as (4,)."),
        ((2, 8, 4), {"bias": (2, 8)}, "The bias of this norm is (8,), but was given as (2, 8)."),
        ((2, 8, 4), {"scale": (2, 8)}, "A modulation has a scale and a shift, but one was given without the other."),
        ((2, 8, 4), {"scale": (2, 8), "shift": (8,)}, "The shift of this norm is (2, 8), but was given as (8,)."),
    ],
)
def test_errors(shape: tuple[int, ...], rest: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(BadInput) as raised:
        group_norm_silu(torch.zeros(shape), 4, **{name: torch.zeros(part) for name, part in rest.items()})  # type: ignore[arg-type]
    for part in message.split(" .* "):
        assert part in str(raised.value)


def test_backends_that_cannot_be() -> None:
    x = torch.zeros(1, 4, 4)
    with pytest.raises(BadInput, match="There is no group_norm_silu 'sdpa': use auto, triton, torch, reference"):
        group_norm_silu(x, 2, backend="sdpa")  # type: ignore[arg-type]
    with pytest.raises(
        BadInput, match=r"Our kernel of group_norm_silu cannot run on cpu \(our kernels take .* not float64\)"
    ):
        group_norm_silu(x.double(), 2, backend="triton")
