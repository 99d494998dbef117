"""Where in the picture the words of a prompt are attended to (Tang et al., arXiv:2210.04885)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from ...kernels.attending import Attend, Place
from ...kernels.attention_maps import attention_maps


class Heat:
    """Looks at a UNet's cross-attention while it runs, and says after each step what the words got of it.

    Args:
        words: for each, which tokens of the context are its.
        images: of the batch; the first one's attention is looked at.
    """

    def __init__(self, words: Mapping[str, list[int]], images: int = 1) -> None:
        self.words, self.images = words, images
        self.calls, self.keys = list[tuple[int, dict[str, Tensor]]](), 0

    def edit(self, place: Place, q: Tensor, k: Tensor, v: Tensor, attend: Attend) -> Tensor:
        """For :func:`unrolled.kernels.attending.attending`: changes nothing."""
        self.keys = self.keys or k.shape[1]
        if k.shape[1] == self.keys:  # else an adapter's picture
            if not self.calls or place.name in self.calls[-1][1]:
                self.calls.append((len(q), {}))
            row = len(q) - self.images  # of guidance's one batch, the prompt has the second half
            self.calls[-1][1][place.name] = torch.stack(
                [attention_maps(q[row, None], k[row, None], torch.tensor(at, device=k.device)).sum(-1)[0]
                 for at in self.words.values()]
            )  # fmt: skip
        return attend(q, k, v)

    def taken(self, size: tuple[int, int], guided: bool) -> dict[str, Tensor]:
        """Each word's share of the attention, the mean over heads and layers, in the step's first prediction.

        Args:
            size: (height, width) of the latents.
            guided: whether that prediction was made of two.

        Returns:
            (height, width) of the finest layer for each word, on the CPU; nothing if no cross-attention ran.
        """
        calls, self.calls = self.calls, []
        if not calls:
            return {}
        apart = guided and calls[0][0] == self.images  # two passes, one after the other: the prompt's is the second
        maps = [_grid(shares, size) for shares in calls[apart][1].values()]
        finest = max((one.shape[-2:] for one in maps), key=lambda shape: shape.numel())
        whole = [F.interpolate(one[None], finest, mode="bilinear", antialias=True)[0] for one in maps]
        return dict(zip(self.words, torch.stack(whole).mean(0).cpu(), strict=True))


def _grid(shares: Tensor, size: tuple[int, int]) -> Tensor:
    """(words, queries) as (words, height, width): layers lie at the latents' size, its half, its quarter, …"""
    height, width = size
    while height * width > shares.shape[-1]:
        height, width = -(-height // 2), -(-width // 2)
    return shares.view(len(shares), height, width)
