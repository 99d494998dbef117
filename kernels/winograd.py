"""3x3 convolutions by Winograd's minimal filtering, F(2x2, 3x3) of Lavin and Gray (arXiv:1509.09308).

Sixteen products for every four outputs, where a convolution as it is written does thirty-six. The sums before and after
the products are taken in float32, yet three roundings stand where there was one: in bfloat16 the error of a convolution
is three times that of torch's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from ..core.errors import BadInput

FILTERS = ((1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.0, 0.0, 1.0))
"""How the three weights of a row become four: G of the paper."""
CELLS = 1024
"""Of one row of tiles, twice as many as there are tiles: so much of a picture at a time stays in the cache."""


def winograd_weights(weight: Tensor) -> Tensor:
    """What :func:`winograd` multiplies with, (16, out, in): 16/9 of the memory of ``weight``, (out, in, 3, 3)."""
    if weight.shape[2:] != (3, 3):
        raise BadInput(f"Winograd's filtering is for weights (out, in, 3, 3), but was given {tuple(weight.shape)}.")
    filters = torch.tensor(FILTERS, device=weight.device)
    whole = torch.einsum("ai,ocij,bj->aboc", filters, weight.float(), filters)
    return whole.flatten(0, 1).to(weight.dtype).contiguous()


def winograd(x: Tensor, weights: Tensor, bias: Tensor | None = None) -> Tensor:
    """``conv2d(x, weight, bias, padding=1)``.

    Args:
        x: (batch, in, height, width), height and width even; fastest in channels-last memory.
        weights: (16, out, in) of :func:`winograd_weights`.
        bias: (out,).

    Returns:
        (batch, out, height, width), channels-last.

    Raises:
        BadInput: the shapes do not go together.
    """
    batch, channels, height, width = x.shape
    if height % 2 or width % 2 or weights.shape[::2] != (16, channels):
        raise BadInput(
            f"Winograd's filtering takes pictures of even height and width and weights (16, out, in) of as many channels, "
            f"but was given {tuple(x.shape)} and {tuple(weights.shape)}."
        )
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
    out = x.new_empty(batch, height, width, weights.shape[1])
    few = 2 * max(1, CELLS // (batch * width))
    for top in range(0, height, few):
        band = padded[:, top : top + few + 2].float()
        high, into = band.shape[1] - 2, out[:, top : top + few]
        tiles = x.new_empty(4, 4, batch, high // 2, width // 2, channels)
        for i, rows in enumerate(_four([band[:, r : r + high : 2] for r in range(4)])):
            for j, cells in enumerate(_four([rows[:, :, c : c + width : 2] for c in range(4)])):
                tiles[i, j] = cells
        products = torch.bmm(tiles.view(16, -1, channels), weights.transpose(1, 2)).view(*tiles.shape[:-1], -1)
        for i, rows in enumerate(_two(products)):
            for j, cells in enumerate(_two(rows)):
                into[:, i::2, j::2] = cells if bias is None else cells.add_(bias)
    return out.permute(0, 3, 1, 2)


def _four(parts: Sequence[Tensor]) -> Iterator[Tensor]:
    """Of the four neighbouring inputs that make two outputs, what the four products take: B of the paper."""
    a, b, c, d = parts
    yield a - c
    yield b + c
    yield c - b
    yield b - d


def _two(products: Sequence[Tensor] | Tensor) -> Iterator[Tensor]:
    """The two outputs of four products, in float32: A of the paper."""
    a, b, c, d = (part.float() for part in products)
    yield (b + c).add_(a)
    yield (b - c).sub_(d)
