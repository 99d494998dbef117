"""3x3 convolutions by Winograd's filtering, where it was measured to pay."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..winograd import winograd, winograd_weights
from .attention_layer import Forward
from .shared import Shared
from .untouched import keepable, version, watching_gradients

WIDTH = 320
"""Channels in and out from which it pays: below, the sums take longer than the products saved."""
TILES = 64
"""Of four outputs, from which it pays: a picture of 16x16. Below, reading the weights is what takes long."""


def convolution_forward(shared: Shared) -> Forward:
    """The forward of one Conv2d: its filtered weights are made at the first call, and anew when the weight has changed."""

    def forward(self: Any, input: Tensor) -> Tensor:
        # Compiled code could not ask whether the weight has changed.
        if watching_gradients() or torch.compiler.is_compiling() or not pays(input) or not keepable(self.weight):
            return type(self).forward(self, input)  # type: ignore[no-any-return]
        now = version(self.weight), _sample(self.weight)
        then, weights = shared.filtered.get(self, (None, self.weight))
        if now != then:
            weights = winograd_weights(self.weight)
            shared.filtered[self] = now, weights
        return winograd(input, weights, self.bias)

    return forward


def _sample(weight: Tensor) -> float:
    """Of a few hundred of its numbers: a LoRA that is fused writes through ``.data``, of which torch keeps no count."""
    return float(weight[::31, ::37].sum(dtype=torch.float64))


def supported(layer: nn.Module) -> bool:
    """Whether this is a 3x3 convolution without any speciality, wide enough."""
    return (
        type(layer) is nn.Conv2d
        and (layer.kernel_size, layer.stride, layer.padding, layer.dilation) == ((3, 3), (1, 1), (1, 1), (1, 1))
        and layer.groups == 1
        and layer.padding_mode == "zeros"
        and min(layer.in_channels, layer.out_channels) >= WIDTH
    )


def pays(x: Tensor) -> bool:
    """Whether it was measured to be faster for such a picture (benchmarks/results/cpu_convolution.json)."""
    height, width = x.shape[-2:]
    even = height % 2 == 0 and width % 2 == 0
    return x.device.type == "cpu" and x.dtype == torch.bfloat16 and even and len(x) * height * width >= 4 * TILES
