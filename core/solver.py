"""What the loop and a solver agree on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from .prediction import Prediction

Evaluate = Callable[[Tensor, float], Prediction]
"""``(x, sigma) -> Prediction``: the denoiser as a solver sees it."""

Draw = Callable[[float, float], Tensor]
"""``(sigma, sigma_next) -> unit noise like x``: the increment of a Brownian motion between two noise levels, brought to
unit variance. Draws over levels that do not overlap are independent of one another, and so is one that leads up."""


@dataclass(frozen=True, repr=False)
class Past:
    """One earlier point of a run, as multistep solvers remember it: ``x`` at ``sigma`` and its ``x0``."""

    sigma: float
    x: Tensor
    x0: Tensor

    @property
    def eps(self) -> Tensor:
        """The noise estimate at that point."""
        return (self.x - self.x0) / self.sigma


History = tuple[Past, ...]


class Solver(Protocol):
    """Turns ``(x, sigma, sigma_next)`` and a denoiser into the next ``x``.

    Any function of this form will do. ``denoise`` may be called as often as the order wants; the
    history that comes back with the next ``x`` is handed in again at the next step. State goes in
    and comes out: a solver holds none.
    """

    def __call__(
        self, denoise: Evaluate, x: Tensor, sigma: float, sigma_next: float, history: History, noise: Draw, /
    ) -> tuple[Tensor, History]:
        """The next ``x`` and what to remember."""
        ...
