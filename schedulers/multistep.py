"""Linear multistep methods: every one is a row of numbers, and this file adds it up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from torch import Tensor

from ..core.errors import BadInput
from ..core.prediction import Prediction
from ..core.solver import Draw, Evaluate, History, Past

Predicts = Literal["x0", "eps"]
"""Which estimate a method extrapolates."""


class Row(NamedTuple):
    """One step: ``x_next = x * row.x + sum(points[i] * f[i]) + row.noise * unit noise``, f newest first."""

    x: float
    points: tuple[float, ...]
    noise: float = 0.0


Weights = Callable[[tuple[float, ...], float, float], Row]
"""``(levels of the points, newest first, sigma, sigma_next) -> Row`` of the step from sigma to sigma_next.

For a predictor the newest point lies at sigma, for a corrector at sigma_next.
"""


def to_zero(predicts: Predicts, sigma: float, points: int) -> Row:
    """The step from ``sigma`` to 0 of a method that works in log sigma, where only one of first order can go: to x0."""
    rest = (0.0,) * (points - 1)
    return Row(0.0, (1.0, *rest)) if predicts == "x0" else Row(1.0, (-sigma, *rest))


def require_order(method: str, order: int, most: int) -> None:
    """Raise BadInput unless the order is 1 to ``most``."""
    if not 1 <= order <= most:
        raise BadInput(f"{method} has orders 1 to {most}, got {order}: take one of them.")


@dataclass(frozen=True, repr=False)
class Multistep:
    """A linear multistep method, with or without a corrector; one evaluation a step.

    The corrector of a step waits until the next one has evaluated where it ends, as UniPC's does, so that it
    costs nothing. Predictor and corrector of one step weigh ``x`` and the noise alike, so that correcting is
    adding the difference of their points' weights: an edit of ``x`` between two steps is kept.

    Args:
        weights: the predictor.
        order: how many points it takes.
        predicts: whether it extrapolates x0 or the noise.
        taper: the last levels of the whole run, where the order falls: a step that ends at the last one is of first
            order, one that ends at the last but one at most of second. Without it only steps are tapered whose method
            cannot end at 0 otherwise.
        corrector: its weights, and ``corrector_points`` how many points it takes.
        uncorrected: levels at which it is left out.
        name: for people.
    """

    weights: Weights
    order: int
    predicts: Predicts = "x0"
    taper: tuple[float, ...] = ()
    corrector: Weights | None = None
    corrector_points: int = 0
    uncorrected: tuple[float, ...] = ()
    name: str = field(default="Multistep", compare=False)

    def __repr__(self) -> str:
        return self.name

    def __call__(
        self, denoise: Evaluate, x: Tensor, sigma: float, sigma_next: float, history: History, noise: Draw, /
    ) -> tuple[Tensor, History]:
        """Next x; remembers as many points as predictor and corrector take."""
        here = denoise(x, sigma)
        if self.corrector is not None and history and sigma not in self.uncorrected:
            x = self._corrected(self.corrector, here, x, sigma, history)
        row, earlier = self._row(sigma, sigma_next, history)
        x_next = x * row.x
        points: tuple[Prediction | Past, ...] = (here, *earlier)
        for weight, point in zip(row.points, points, strict=True):
            x_next.add_(self._estimate(point), alpha=weight)
        if row.noise:
            x_next.add_(noise(sigma, sigma_next), alpha=row.noise)
        return x_next, self.remembering(history, sigma, here)

    def row(self, sigma: float, sigma_next: float, history: History) -> tuple[Row, tuple[Tensor, ...]] | None:
        """The step's numbers and the earlier estimates they are for, newest first; None with a corrector or noise."""
        row, earlier = self._row(sigma, sigma_next, history)
        return None if self.corrector is not None or row.noise else (row, tuple(map(self._estimate, earlier)))

    def remembering(self, history: History, sigma: float, here: Prediction) -> History:
        """What the next step takes of this one and those before."""
        # The corrector needs the predictor's points once more.
        kept = self.order - 1 if self.corrector is None else max(self.order, self.corrector_points - 1)
        return (*history, Past(sigma, here.x, here.x0))[-kept:] if kept else ()

    def _row(self, sigma: float, sigma_next: float, history: History) -> tuple[Row, tuple[Past, ...]]:
        # The last ones of the history, newest first.
        earlier = history[: -self._points(sigma_next, len(history) + 1) : -1]
        return self.weights((sigma, *(past.sigma for past in earlier)), sigma, sigma_next), earlier

    def _points(self, sigma_next: float, known: int, extra: int = 0) -> int:
        """How many points the step to ``sigma_next`` takes; ``extra`` ones beside the predictor's for a corrector."""
        points = min(self.corrector_points if extra else self.order, known)
        if not self.taper or sigma_next > self.taper[0]:
            return points
        return min(points, 1 + extra + sum(level < sigma_next for level in self.taper))

    def _corrected(self, corrector: Weights, here: Prediction, x: Tensor, sigma: float, history: History) -> Tensor:
        """``x``, which a predictor brought to ``sigma``, now that the estimate there is known."""
        before = history[-1].sigma
        past = history[::-1]
        predicted = past[: self._points(sigma, len(past))]
        corrected = past[: self._points(sigma, len(past) + 1, extra=1) - 1]
        first = self.weights(tuple(point.sigma for point in predicted), before, sigma).points
        new, *second = corrector((sigma, *(point.sigma for point in corrected)), before, sigma).points
        x = x.add(self._estimate(here), alpha=new)
        for i in range(max(len(first), len(second))):
            weight = (second[i] if i < len(second) else 0.0) - (first[i] if i < len(first) else 0.0)
            x.add_(self._estimate(past[i]), alpha=weight)
        return x

    def _estimate(self, point: Prediction | Past) -> Tensor:
        return point.x0 if self.predicts == "x0" else point.eps
