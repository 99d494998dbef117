"""Where random numbers come from."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
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
    arXiv:2001.01328, sect. 4): halved from ``sigma_max`` down to 1e-4, every midpoint keyed by where it lies, so that
    nothing is stored, and a batch, a split or the order of questions changes nothing. Other purposes are :class:`Noise`'s.

    Args:
        sigma_max: where the path begins, the first level of the whole run.
    """

    seeds: tuple[int, ...]
    sigma_max: float
    stream: str = ""

    def __call__(
        self, shape: Sequence[int], purpose: str, step: int = 0, draw: int = 0, levels: Levels | None = None
    ) -> Tensor:
        """Raises BadInput for levels above ``sigma_max``, or unless there is one seed per image of ``shape``."""
        if levels is None:
            return Noise(self.seeds, self.stream)(shape, purpose, step, draw)
        high, low = levels
        if high > self.sigma_max * (1 + 1e-6):
            raise BadInput(f"A Brownian path from sigma {self.sigma_max:.4g} was asked at {high:.4g}: begin it there.")
        return ((self._path(shape, high) - self._path(shape, low)) / math.sqrt(high - low)).float()

    def _path(self, shape: Sequence[int], sigma: float) -> Tensor:
        def unit(place: str) -> Tensor:
            return Noise(self.seeds, self.stream)(shape, f"path {place}").double()

        below, above = 0.0, max(self.sigma_max, sigma)
        at_below, at_above = torch.zeros(*shape, dtype=torch.float64), unit("end") * math.sqrt(above)
        for depth in range(math.ceil(math.log2(above / 1e-4))):
            middle = (below + above) / 2
            half = (at_below + at_above) / 2 + unit(f"{depth} {middle!r}") * (math.sqrt(above - below) / 2)
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
