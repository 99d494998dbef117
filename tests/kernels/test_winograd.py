"""Winograd's filtering is the convolution; an optimised network uses it where it was asked to and where it may."""

from __future__ import annotations

from typing import cast

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from unrolled.core.errors import BadInput
from unrolled.kernels import winograd as module
from unrolled.kernels.fast import convolutions, optimise
from unrolled.kernels.winograd import winograd, winograd_weights


@pytest.mark.parametrize("shape", [(1, 5, 2, 2), (2, 3, 8, 12), (1, 4, 22, 6)], ids=str)
@pytest.mark.parametrize("cells", [8, 1024])
@pytest.mark.parametrize("with_bias", [False, True])
def test_it_is_the_convolution(shape: tuple[int, ...], cells: int, with_bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CELLS", cells)
    torch.manual_seed(0)
    x, weight, bias = torch.randn(shape), torch.randn(7, shape[1], 3, 3), torch.randn(7) if with_bias else None
    out = winograd(x, winograd_weights(weight), bias)
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, F.conv2d(x, weight, bias, padding=1), rtol=1e-4, atol=1e-4)


def test_its_rounding_in_bfloat16() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(1, 64, 16, 16).bfloat16(), (torch.randn(32, 64, 3, 3) / 24).bfloat16()
    wanted = F.conv2d(x.double(), weight.double(), padding=1)
    error = (winograd(x, winograd_weights(weight)).double() - wanted).norm() / wanted.norm()
    assert 1e-3 < error < 6e-3


def test_what_does_not_go_together() -> None:
    with pytest.raises(BadInput, match=r"is for weights \(out, in, 3, 3\), but was given \(2, 3, 1, 1\)"):
        winograd_weights(torch.zeros(2, 3, 1, 1))
    weights = winograd_weights(torch.zeros(2, 3, 3, 3))
    for shape in ((1, 3, 4, 5), (1, 3, 5, 4), (1, 2, 4, 4)):
        with pytest.raises(BadInput) as raised:
            winograd(torch.zeros(shape), weights)
        assert str(raised.value) == (
            "Winograd's filtering takes pictures of even height and width and weights (16, out, in) of as many channels, "
            f"but was given {shape} and (16, 2, 3)."
        )


class Net(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(4, 4, 3, padding=1),
            nn.Conv2d(4, 4, 3, padding=1, stride=2),
            nn.Conv2d(4, 4, 1),
            nn.Conv2d(4, 2, 3, padding=1),
        )


@torch.no_grad()
def test_optimised_with_it_and_as_it_was_after(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convolutions, "WIDTH", 4)
    torch.manual_seed(0)
    net, x = Net().bfloat16(), torch.randn(1, 4, 32, 32).bfloat16()
    first = cast(nn.Conv2d, net[0])
    with optimise(net):
        plain = net(x)
    made = optimise(net, winograd=True)
    near = net(x)
    assert list(made.shared.filtered) == [first]
    assert made.shared.filtered[first][1].shape == (16, 4, 4)
    assert not near.equal(plain)
    torch.testing.assert_close(near, plain, rtol=0.05, atol=0.02)
    for parameter in first.parameters():
        parameter.mul_(2.0)  # a change is seen
    torch.testing.assert_close(first(x), F.conv2d(x, first.weight, first.bias, padding=1), rtol=0.05, atol=0.02)
    first.weight.data *= 0.5  # as peft fuses a LoRA: torch keeps no count of it
    torch.testing.assert_close(first(x), F.conv2d(x, first.weight, first.bias, padding=1), rtol=0.05, atol=0.02)
    made.undo()
    assert not made.shared.filtered
    assert "forward" not in vars(first)
    assert first(x).equal(F.conv2d(x, first.weight, first.bias, padding=1))


@pytest.mark.parametrize(
    ("shape", "dtype", "gradients"),
    [
        ((1, 4, 32, 32), torch.float32, False),
        ((1, 4, 15, 32), torch.bfloat16, False),
        ((1, 4, 14, 16), torch.bfloat16, False),
        ((1, 4, 32, 32), torch.bfloat16, True),
    ],
)
def test_where_it_is_left_alone(
    shape: tuple[int, ...], dtype: torch.dtype, gradients: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convolutions, "WIDTH", 4)
    net, x = Net().to(dtype), torch.randn(shape, dtype=dtype)
    with optimise(net, winograd=True) as made, torch.set_grad_enabled(gradients):
        net(x)
        assert not made.shared.filtered
