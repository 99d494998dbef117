"""Where random numbers come from."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from .errors import BadInput

Levels = tuple[float, float]
"""Two noise levels."""


class NoiseSource(Protocol):
    """Draws unit normal noise of ``shape`` (batch first) on the CPU in float32."""

    def __call__(
        self, shape: Sequence[int], purpose: str, step: int = 0, draw: int = 0, levels: Levels | None = None
    ) -> Tensor:
        """``purpose`` says what for ("latents", "posterior", "low resolution", "step").

        ``draw`` counts within a step, ``levels`` are the noise levels between which a solver adds it.
        """
        ...


@dataclass(frozen=True)
class Noise:
    """One stream of noise per image, keyed by (seed, stream, purpose, step, draw).

    An image does not change when the batch, a split or an unused draw changes.
    """

    seeds: tuple[int, ...]
    stream: str = ""

    def __call__(
        self, shape: Sequence[int], purpose: str, step: int = 0, draw: int = 0, levels: Levels | None = None
    ) -> Tensor:
        """Raises BadInput unless there is one seed per image of ``shape``."""
        if shape[0] != len(self.seeds):
            raise BadInput(f"Noise for {shape[0]} images was asked of {len(self.seeds)} seeds: give one seed per image.")
        return torch.stack([self._draw(seed, shape[1:], f"{purpose}/{step}/{draw}") for seed in self.seeds])

    def _draw(self, seed: int, shape: Sequence[int], place: str) -> Tensor:
        key = hashlib.blake2b(f"{seed}/{self.stream}/{place}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key, "big"))
        return torch.randn(list(shape), generator=generator)


@dataclass(frozen=True)
class Brownian:
    """Noise for steps from one Brownian path over sigma per image, so that refining the steps does not change the picture.

    What a solver adds between two levels is the path's increment there. The path is a virtual Brownian tree (Li et al.,
    arXiv:2001.01328, sect. 4): every midpoint is keyed by where it lies, so that a batch, a split or the order of questions
    changes nothing. A level costs about 13 draws where :class:`Noise` takes one; the last few levels are remembered.
    Noise that leads up (churn) is new, and so is what other purposes draw: :class:`Noise`'s.
    """

    seeds: tuple[int, ...]
    stream: str = ""
    _known: dict[float, Tensor] = field(default_factory=dict, init=False, compare=False, repr=False)

    def __call__(
        self, shape: Sequence[int], purpose: str, step: int = 0, draw: int = 0, levels: Levels | None = None
    ) -> Tensor:
        """Raises BadInput unless there is one seed per image of ``shape``."""
        if levels is None or levels[0] < levels[1]:
            return Noise(self.seeds, self.stream)(shape, purpose, step, draw)
        high, low = levels
        return ((self._at(shape, high) - self._at(shape, low)) / math.sqrt(high - low)).float()

    def _at(self, shape: Sequence[int], sigma: float) -> Tensor:
        if sigma not in self._known or self._known[sigma].shape != torch.Size(shape):
            while len(self._known) > 3:
                del self._known[next(iter(self._known))]
            self._known[sigma] = self._path(shape, sigma)
        return self._known[sigma]

    def _path(self, shape: Sequence[int], sigma: float) -> Tensor:
        def unit(place: str) -> Tensor:
            return Noise(self.seeds, self.stream)(shape, f"path {place}").double()

        below, above = 0.0, 1.0
        at_below, at_above = torch.zeros(*shape, dtype=torch.float64), unit("1.0")
        while above < sigma:  # doubled until it holds sigma, then halved around it to a fortieth of a percent
            below, above, at_below = above, 2 * above, at_above
            at_above = at_below + unit(repr(above)) * math.sqrt(above - below)
        while above - below > sigma / 4096 and sigma:
            middle = (below + above) / 2
            half = (at_below + at_above) / 2 + unit(f"{middle!r} of {above - below!r}") * (math.sqrt(above - below) / 2)
            if sigma >= middle:
                below, at_below = middle, half
            else:
                above, at_above = middle, half
        along = (sigma - below) / (above - below)
        bridge = unit(f"at {sigma!r}") * math.sqrt((above - below) * along * (1 - along))
        return torch.lerp(at_below, at_above, along) + bridge


@dataclass(frozen=True)
class DiffusersNoise:
    """Draws in diffusers' order: one generator for the batch, or one per image. For comparisons.

    Not reproducible by place: every draw moves the generator on.
    """

    generator: torch.Generator | Sequence[torch.Generator]

    @classmethod
    def seeded(cls, *seeds: int) -> DiffusersNoise:
        """One generator for one seed, else one per image."""
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return cls(generators[0] if len(generators) == 1 else generators)

    def __call__(
        self, shape: Sequence[int], purpose: str, step: int = 0, draw: int = 0, levels: Levels | None = None
    ) -> Tensor:
        """The next ``shape`` numbers, whatever they are for."""
        if isinstance(self.generator, torch.Generator):
            return torch.randn(list(shape), generator=self.generator)
        return torch.cat([torch.randn([1, *shape[1:]], generator=g) for g in self.generator])
