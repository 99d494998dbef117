"""UniPC: a unified predictor and corrector of any order."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from .multistep import Multistep, Predicts, Row, require_order, to_zero

UniPCType = Literal["bh1", "bh2"]


def UniPC(  # noqa: N802
    order: int = 2,
    *,
    solver_type: UniPCType = "bh2",
    predicts: Predicts = "x0",
    taper: tuple[float, ...] = (),
    uncorrected: tuple[float, ...] = (),
) -> Multistep:
    """UniPC of that order (Zhao et al., arXiv:2302.04867, alg. 1–3); the corrector raises it by one.

    A step to 0 is of first order.

    Args:
        solver_type: B(h), "bh1" (h) or "bh2" (exp(h) - 1), sect. 3.4 there.
        predicts: "x0" or "eps".
        taper: see :class:`Multistep`.
        uncorrected: levels at which the corrector is left out (diffusers' ``disable_corrector``).

    Raises:
        BadInput: the order is not one of these.
    """
    require_order("UniPC", order, 3)
    return Multistep(
        _Unified(solver_type, predicts, corrects=False),
        order,
        predicts,
        taper,
        _Unified(solver_type, predicts, corrects=True),
        order + 1,
        uncorrected,
        name=f"UniPC({order}, {solver_type}, {predicts})",
    )


@dataclass(frozen=True)
class _Unified:
    """Predictor (eq. 8 there) or corrector (eq. 9), which takes the new point too."""

    solver_type: UniPCType
    predicts: Predicts
    corrects: bool

    def __call__(self, levels: tuple[float, ...], sigma: float, sigma_next: float) -> Row:
        if not sigma_next:
            return to_zero(self.predicts, sigma, len(levels))
        h = math.log(sigma / sigma_next)
        new = levels[:1] if self.corrects else ()
        before = levels[len(new) + 1 :]
        places = tuple(math.log(sigma / level) / h for level in (*before, *new))
        hh = -h if self.predicts == "x0" else h
        scale = -(hh if self.solver_type == "bh1" else math.expm1(hh)) * (1.0 if self.predicts == "x0" else sigma_next)
        weights = [scale * rho / place for rho, place in zip(_rhos(places, hh, self.solver_type), places, strict=True)]
        here = (1.0 if self.predicts == "x0" else sigma_next) * -math.expm1(hh) - sum(weights)
        x = sigma_next / sigma if self.predicts == "x0" else 1.0
        return Row(x, (*weights[len(before) :], here, *weights[: len(before)]))


@lru_cache(maxsize=4096)
def _rhos(places: tuple[float, ...], hh: float, solver_type: UniPCType) -> tuple[float, ...]:
    """The weights of the differences to points at ``places`` (1 is the new one), eq. 10 there."""
    if not places:
        return ()
    if len(places) == 1:
        return (0.5,)
    b, factorial, phi = [], 1.0, math.expm1(hh) / hh - 1.0
    for k in range(1, len(places) + 1):
        b.append(phi * factorial / (hh if solver_type == "bh1" else math.expm1(hh)))
        factorial *= k + 1
        phi = phi / hh - 1.0 / factorial
    vandermonde = np.vander(np.array(places), increasing=True).T
    return tuple(float(rho) for rho in np.linalg.solve(vandermonde, np.array(b)))
