"""What the layers of one optimised network share."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ...core.errors import Note
from ..backends import Backend, Choice
from ..group_norm_silu import group_norm_silu
from .projections import Fused
from .untouched import Version


class Keeper(Protocol):
    """What a denoiser keeps of one conditioning for one run; see :mod:`.kept`."""

    def embedding(self, unet: Any, timestep: Any, given: dict[str, Any]) -> Tensor | None:
        """The embedding of this timestep, if it is the one computed ahead for just these arguments."""
        ...

    def projected(self, projection: nn.Linear, embedding: Tensor) -> Tensor | None:
        """What a layer makes of that embedding, if it was computed ahead."""
        ...

    def context(self, unet: Any, given: dict[str, Any]) -> Tensor | None:
        """The context as the layers see it, if it was computed before for just these arguments."""
        ...

    def keys_values(self, layer: Any, context: Tensor) -> tuple[Tensor, Tensor] | None:
        """A layer's keys and values of that context, if they were computed before."""
        ...

    def keep(self, layer: Any, context: Tensor, keys: Tensor, values: Tensor) -> None:
        """Keep them, if this is that context."""
        ...


@dataclass
class Shared:
    """Settings, and what is passed around the layers of one network rather than through them.

    Args:
        attention, norms: the backends.
        fused: projections laid out as one, by their first layer.
        names: of the modules whose forward is ours; ``forwards`` are these.
        kept: what the denoiser that is running keeps; set around its call only.
        said: the reasons for which a layer was left to its library, each said once.
        biases: of attention that looks back only, by length.
        filtered: the weights of convolutions as Winograd's filtering takes them, and of which state of the layer they are.
    """

    attention: Backend = "auto"
    norms: Choice = "auto"
    channels_last: bool = True
    fused: dict[nn.Linear, Fused] = field(default_factory=dict)
    names: dict[nn.Module, str] = field(default_factory=dict)
    forwards: dict[nn.Module, Any] = field(default_factory=dict)
    kept: Keeper | None = None
    said: set[str] = field(default_factory=set)
    biases: dict[tuple[int, torch.dtype, torch.device], Tensor] = field(default_factory=dict)
    filtered: dict[nn.Module, tuple[tuple[Version, float], Tensor]] = field(default_factory=dict)

    def __deepcopy__(self, memo: dict[int, Any]) -> Shared:
        """A copy of a network shares it: its layers find nothing of theirs here and do without."""
        return self

    def group_norm(
        self, x: Tensor, norm: nn.GroupNorm, *, silu: bool = False, told: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """A GroupNorm layer's output, modulated by ``told`` (scale and shift) and through SiLU if asked."""
        scale, shift = told or (None, None)
        return group_norm_silu(
            x, norm.num_groups, norm.weight, norm.bias, eps=norm.eps, silu=silu, scale=scale, shift=shift, backend=self.norms
        )

    def looking_back(self, tokens: Tensor) -> Tensor:
        """(1, 1, length, length): a bias that leaves every one of (batch, length, …) itself and those before it."""
        key = tokens.shape[1], tokens.dtype, tokens.device
        if key not in self.biases:
            whole = torch.full((1, 1, key[0], key[0]), -math.inf, dtype=tokens.dtype, device=tokens.device)
            self.biases[key] = whole.triu(1)
        return self.biases[key]

    def say(self, layer: nn.Module, why: str) -> None:
        """Note, once for each reason, that a layer runs as its library wrote it."""
        if why in self.said:
            return
        self.said.add(why)
        name, library = self.names.get(layer, type(layer).__name__), type(layer).__module__.split(".")[0]
        warnings.warn(
            f"{name}, and every layer like it, runs as {library} wrote it and not fused, because {why}.", Note, stacklevel=3
        )
