"""Churn: a little new noise before every step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from ..core.errors import BadInput
from ..core.solver import Draw, Evaluate, History, Solver


@dataclass(frozen=True)
class Churned:
    """``solver`` from a level raised by new noise (Karras et al., arXiv:2206.00364, alg. 2, lines 4–6).

    Args:
        gamma: by how much of itself the level is raised, 0 to sqrt(2) - 1; the paper's
            ``min(S_churn / steps, sqrt(2) - 1)``.
        low, high: the levels at which to do so, the paper's S_tmin and S_tmax.
        scale: of the new noise, the paper's S_noise.

    Raises:
        BadInput: gamma is out of range.
    """

    solver: Solver
    gamma: float
    low: float = 0.0
    high: float = math.inf
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.gamma <= math.sqrt(2.0) - 1.0:
            raise BadInput(f"Churn's gamma goes from 0 to sqrt(2) - 1 = 0.414, got {self.gamma:g}.")

    def __call__(
        self, denoise: Evaluate, x: Tensor, sigma: float, sigma_next: float, history: History, noise: Draw, /
    ) -> tuple[Tensor, History]:
        """Next x by the inner solver."""
        if self.gamma and self.low <= sigma <= self.high:
            raised = sigma * (1.0 + self.gamma)
            x = x.add(noise(sigma, raised), alpha=self.scale * math.sqrt(raised**2 - sigma**2))
            sigma = raised
        return self.solver(denoise, x, sigma, sigma_next, history, noise)
