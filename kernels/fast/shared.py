"""What the layers of one optimised network share."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from ...core.errors import Note
from ..backends import Backend, Choice
from ..group_norm_silu import group_norm_silu
from .projections import Fused


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
        said: the reasons for which a layer was left to diffusers, each said once.
    """

    attention: Backend = "auto"
    norms: Choice = "auto"
    channels_last: bool = True
    fused: dict[nn.Linear, Fused] = field(default_factory=dict)
    names: dict[nn.Module, str] = field(default_factory=dict)
    forwards: dict[nn.Module, Any] = field(default_factory=dict)
    kept: Keeper | None = None
    said: set[str] = field(default_factory=set)

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

    def say(self, layer: nn.Module, why: str) -> None:
        """Note, once for each reason, that a layer runs as diffusers wrote it."""
        if why in self.said:
            return
        self.said.add(why)
        name = self.names.get(layer, type(layer).__name__)
        warnings.warn(
            f"{name}, and every layer like it, runs as diffusers wrote it and not fused, because {why}.", Note, stacklevel=3
        )
