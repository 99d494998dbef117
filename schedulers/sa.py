"""SA-Solver: stochastic Adams, with as much noise as one likes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from ..core.errors import BadInput
from .adams import integrals
from .multistep import Multistep, Predicts, Row, to_zero

Tau = float | Callable[[float], float]
"""How stochastic, or how stochastic at a noise level: 0 is the ordinary equation, 1 the reverse SDE."""


@dataclass(frozen=True)
class TauBetween:
    """tau at noise levels from ``low`` to ``high``, 0 elsewhere (sect. 6.1 of the paper)."""

    low: float
    high: float
    tau: float = 1.0

    def __call__(self, sigma: float) -> float:
        """tau at ``sigma``."""
        return self.tau if self.low <= sigma <= self.high else 0.0


def SASolver(  # noqa: N802
    predictor_order: int = 2,
    corrector_order: int = 2,
    *,
    tau: Tau = 0.0,
    predicts: Predicts = "x0",
    taper: tuple[float, ...] = (),
) -> Multistep:
    """Stochastic Adams–Bashforth and Adams–Moulton (Xue et al., arXiv:2309.05019, alg. 1).

    With ``tau = 0`` this is an exponential Adams method with exact weights (but for the slope of two points of x0):
    of x0, or of the noise, which is :func:`DEIS`. A step to 0 is of first order.

    Args:
        predictor_order: how many points the predictor takes, 1 to 4.
        corrector_order: how many the corrector takes with the new one, 1 to 4, or 0 for none.
        tau: how stochastic, or a function of sigma.
        predicts: "x0" or "eps".
        taper: see :class:`Multistep`.

    Raises:
        BadInput: an order is out of range.
    """
    for name, order, least in (("predictor", predictor_order, 1), ("corrector", corrector_order, 0)):
        if not least <= order <= 4:
            raise BadInput(f"SA-Solver's {name} takes {least} to 4 points, got {order}.")
    if not callable(tau) and tau < 0:
        raise BadInput(f"tau is 0 (no noise) or more, 1 the reverse SDE, got {tau:g}.")
    weights = _StochasticAdams(tau, predicts)
    corrector = weights if corrector_order else None
    name = f"SASolver({predictor_order}, {corrector_order}, tau={tau}, {predicts})"
    return Multistep(weights, predictor_order, predicts, taper, corrector, corrector_order, name=name)


@dataclass(frozen=True)
class _StochasticAdams:
    """Eq. 16–18 there; the predictor's newest point lies at sigma, the corrector's at sigma_next."""

    tau: Tau
    predicts: Predicts

    def __call__(self, levels: tuple[float, ...], sigma: float, sigma_next: float) -> Row:
        if not sigma_next:
            return to_zero(self.predicts, sigma, len(levels))
        tau = self.tau(sigma) if callable(self.tau) else self.tau
        more, h = 1.0 + tau**2, math.log(sigma / sigma_next)
        places = tuple(-math.log(level) for level in levels)
        start, end = -math.log(sigma), -math.log(sigma_next)
        if self.predicts == "eps":
            points = tuple(-more * sigma_next * w for w in integrals(places, start, end, rate=-1.0))
            return Row(1.0, points, tau * math.sqrt(sigma**2 - sigma_next**2))
        weights = [more * w for w in integrals(places, start, end, rate=more)]
        if len(weights) == 2:
            # The slope of two points is weighed by the first term of its integral, as the authors' code does.
            extra = more * (h**2 / 2 - (h * more + math.expm1(-more * h)) / more**2) / (places[0] - places[1])
            weights = [weights[0] + extra, weights[1] - extra]
        return Row(math.exp(-more * h), tuple(weights), sigma_next * math.sqrt(-math.expm1(-2.0 * tau**2 * h)))
