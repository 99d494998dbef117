"""Where random numbers come from."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .errors import BadInput


class NoiseSource(Protocol):
    """Draws unit normal noise of ``shape`` (batch first) on the CPU in float32."""

    def __call__(self, shape: Sequence[int], purpose: str, step: int = 0, draw: int = 0) -> Tensor:
        """``purpose`` says what for ("latents", "posterior", "low resolution", "step"); ``draw`` counts within a step."""
        ...


@dataclass(frozen=True)
class Noise:
    """One stream of noise per image, keyed by (seed, stream, purpose, step, draw).

    An image does not change when the batch, a split or an unused draw changes.
    """

    seeds: tuple[int, ...]
    stream: str = ""

    def __call__(self, shape: Sequence[int], purpose: str, step: int = 0, draw: int = 0) -> Tensor:
        """Raises BadInput unless there is one seed per image of ``shape``."""
        if shape[0] != len(self.seeds):
            raise BadInput(f"Noise for {shape[0]} images was asked of {len(self.seeds)} seeds: give one seed per image.")
        return torch.stack([self._draw(seed, shape[1:], f"{purpose}/{step}/{draw}") for seed in self.seeds])

    def _draw(self, seed: int, shape: Sequence[int], place: str) -> Tensor:
        key = hashlib.blake2b(f"{seed}/{self.stream}/{place}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key, "big"))
        return torch.randn(list(shape), generator=generator)


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

    def __call__(self, shape: Sequence[int], purpose: str, step: int = 0, draw: int = 0) -> Tensor:
        """The next ``shape`` numbers, whatever they are for."""
        if isinstance(self.generator, torch.Generator):
            return torch.randn(list(shape), generator=self.generator)
        return torch.cat([torch.randn([1, *shape[1:]], generator=g) for g in self.generator])
