"""Solvers that bound the clean estimate, for pixel models and configs that ask for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.errors import BadInput
from ..core.prediction import Prediction
from ..core.solver import Draw, Evaluate, History, Solver


@dataclass(frozen=True)
class Clipped:
    """``solver`` with x0 clamped to ``±limit`` in every prediction it sees.

    ``keep_eps`` leaves the noise estimate as predicted (DDIM) instead of the one the clamped x0 implies.
    """

    solver: Solver
    limit: float
    keep_eps: bool = False

    def __post_init__(self) -> None:
        if not self.limit > 0.0:
            raise BadInput(f"x0 is clipped to a limit above 0, got {self.limit:g}.")

    def __call__(
        self, denoise: Evaluate, x: Tensor, sigma: float, sigma_next: float, history: History, noise: Draw, /
    ) -> tuple[Tensor, History]:
        """Next x by the inner solver."""
        seen = _edited(denoise, lambda x0: x0.clamp(-self.limit, self.limit), self.keep_eps)
        return self.solver(seen, x, sigma, sigma_next, history, noise)


@dataclass(frozen=True)
class Thresholded:
    """``solver`` with x0 thresholded dynamically (Saharia et al., arXiv:2205.11487, sect. 2.3): clamped to a quantile of
    its own magnitude, image by image, and divided by it.

    Args:
        ratio: the quantile.
        maximum: the largest the threshold may be; it is at least 1.
        keep_eps: as for :class:`Clipped`.
    """

    solver: Solver
    ratio: float = 0.995
    maximum: float = 1.0
    keep_eps: bool = False

    def __post_init__(self) -> None:
        if not 0.0 <= self.ratio <= 1.0 or self.maximum < 1.0:
            raise BadInput(
                f"x0 is thresholded at a quantile of 0 to 1, of at most 1 or more, got {self.ratio:g} and {self.maximum:g}."
            )

    def __call__(
        self, denoise: Evaluate, x: Tensor, sigma: float, sigma_next: float, history: History, noise: Draw, /
    ) -> tuple[Tensor, History]:
        """Next x by the inner solver."""
        seen = _edited(denoise, lambda x0: thresholded(x0, self.ratio, self.maximum), self.keep_eps)
        return self.solver(seen, x, sigma, sigma_next, history, noise)


def thresholded(x0: Tensor, ratio: float = 0.995, maximum: float = 1.0) -> Tensor:
    """``x0`` clamped to the ``ratio`` quantile of its magnitude (1 to ``maximum``) and divided by it, per image."""
    limit = torch.quantile(x0.abs().flatten(1), ratio, dim=1).clamp(1.0, maximum).view(-1, *[1] * (x0.ndim - 1))
    return torch.minimum(torch.maximum(x0, -limit), limit) / limit


def clip(prediction: Prediction, limit: float, *, keep_eps: bool) -> Prediction:
    """The prediction with x0 clamped."""
    return prediction.with_x0(prediction.x0.clamp(-limit, limit), keep_eps=keep_eps)


def _edited(denoise: Evaluate, edit: Callable[[Tensor], Tensor], keep_eps: bool) -> Evaluate:
    def edited(x: Tensor, sigma: float) -> Prediction:
        prediction = denoise(x, sigma)
        return prediction.with_x0(edit(prediction.x0), keep_eps=keep_eps)

    return edited
