"""What conditions a UNet, typed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import BadInput


@dataclass(frozen=True, repr=False)
class Conditioning:
    """Whatever one UNet family takes beside ``x`` and the timestep; batch first in every tensor.

    Args:
        context: (batch, tokens, width), for cross attention.
        context_mask: (batch, tokens), true where a token is one of the prompt's, for networks that look.
        pooled: (batch, width), one vector for the whole prompt.
        time_ids: (batch, n), sizes, crops or scores that are embedded like timesteps.
        image_embeds: (batch, width), from an image encoder or a prior.
        class_labels: (batch,), e.g. a noise level.
        channels: (batch, c, height, width), concatenated to the scaled ``x``: mask and masked image
            of an inpainting UNet, the low-resolution picture of an upscaler.
        image_tokens: (batch, pictures, tokens, width), attended to beside the context by an IP-Adapter.
        control: (batch, networks, 3, height, width) in pixels and [0, 1], a picture for each ControlNet.
    """

    context: Tensor | None = None
    context_mask: Tensor | None = None
    pooled: Tensor | None = None
    time_ids: Tensor | None = None
    image_embeds: Tensor | None = None
    class_labels: Tensor | None = None
    channels: Tensor | None = None
    image_tokens: Tensor | None = None
    control: Tensor | None = None

    def __len__(self) -> int:
        return max((len(t) for t in self._tensors().values()), default=0)

    def __repr__(self) -> str:
        parts = (f"{name}={'x'.join(map(str, t.shape))}" for name, t in self._tensors().items())
        return f"Conditioning({', '.join(parts)})"

    def names(self) -> set[str]:
        """Which of the tensors it holds."""
        return set(self._tensors())

    def expand(self, size: int) -> Conditioning:
        """The same for ``size`` images: a batch of one is repeated.

        Raises:
            BadInput: the batch is neither 1 nor ``size``.
        """
        sizes = {len(t) for t in self._tensors().values()}
        if sizes <= {size}:
            return self
        if not sizes <= {1, size}:
            raise BadInput(f"{self} cannot condition {size} images: its batch must be 1 or {size}.")
        return self._map(lambda t: t if len(t) == size else t.expand(size, *t.shape[1:]))

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Conditioning:
        """Moved and cast (integers keep their type)."""
        return self._map(lambda t: t.to(device, dtype if t.is_floating_point() else None))

    def edits(self) -> tuple[int, ...]:
        """Changes when one of its tensors is written to in place; of those made in inference mode nobody counts."""
        return tuple(0 if t.is_inference() else t._version for t in self._tensors().values())

    def stackable(self, other: Conditioning) -> bool:
        """Whether the two can go through the UNet as one batch."""
        mine, others = self._tensors(), other._tensors()
        return mine.keys() == others.keys() and all(mine[n].shape[1:] == others[n].shape[1:] for n in mine)

    def _tensors(self) -> dict[str, Tensor]:
        return {name: t for name, t in vars(self).items() if t is not None}

    def _map(self, change: Callable[[Tensor], Tensor]) -> Conditioning:
        return Conditioning(**{name: change(t) for name, t in self._tensors().items()})


def stack(parts: Sequence[Conditioning]) -> Conditioning:
    """Several as one batch, in order.

    Raises:
        BadInput: they do not hold the same tensors.
    """
    if any(not parts[0].stackable(part) for part in parts[1:]):
        raise BadInput(f"These cannot be one batch: {', '.join(map(repr, parts))}.")
    tensors = [part._tensors() for part in parts]
    return Conditioning(**{name: torch.cat([t[name] for t in tensors]) for name in tensors[0]})
