"""Solvers that clip the clean estimate, for pixel models and configs that ask for it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..core.prediction import Prediction
from ..core.solver import Draw, Evaluate, History
from .euler import Euler
from .heun import Heun


@dataclass(frozen=True)
class Clipped:
    """``solver`` with x0 clamped to ``±limit`` in every prediction it sees.

    ``keep_eps`` leaves the noise estimate as predicted (DDIM) instead of the one the clamped x0 implies.
    """

    solver: Euler | Heun
    limit: float
    keep_eps: bool = False

    def __call__(
        self, denoise: Evaluate, x: Tensor, sigma: float, sigma_next: float, history: History, noise: Draw, /
    ) -> tuple[Tensor, History]:
        """Next x by the inner solver."""

        def clipped(x: Tensor, sigma: float) -> Prediction:
            return clip(denoise(x, sigma), self.limit, keep_eps=self.keep_eps)

        return self.solver(clipped, x, sigma, sigma_next, history, noise)


def clip(prediction: Prediction, limit: float, *, keep_eps: bool) -> Prediction:
    """The prediction with x0 clamped."""
    return prediction.with_x0(prediction.x0.clamp(-limit, limit), keep_eps=keep_eps)
