"""A solver with noise of its own."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..core.noise import Brownian
from ..core.solver import Draw, Evaluate, History, Solver


@dataclass(frozen=True)
class Seeded:
    """``solver`` with the noise of one Brownian path per image, whatever the run's seeds (``noise_sampler_seed``).

    As in diffusers an image of a batch is known by its place: run alone, all but the first come out otherwise.

    Args:
        seed: of the first image of a batch; the others count on.
    """

    solver: Solver
    seed: int

    def __call__(
        self, denoise: Evaluate, x: Tensor, sigma: float, sigma_next: float, history: History, noise: Draw, /
    ) -> tuple[Tensor, History]:
        """Next x by the inner solver."""
        path = Brownian(tuple(self.seed + i for i in range(len(x))))

        def draw(high: float, low: float) -> Tensor:
            return path(x.shape, "step", levels=(high, low)).to(x)

        return self.solver(denoise, x, sigma, sigma_next, history, draw)
