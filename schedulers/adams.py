"""Adams methods: the estimate is a polynomial through the last points, integrated exactly.

What differs is the estimate (x0 or the noise), the variable its polynomial is in, and the weight it is integrated
with; :func:`integrals` is all of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from .multistep import Multistep, Row, require_order, to_zero

ADAMS_BASHFORTH = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}
"""The weights of 1 to 4 points on an even grid, newest first."""

_NODES, _NODE_WEIGHTS = np.polynomial.legendre.leggauss(32)


@lru_cache(maxsize=4096)
def integrals(points: tuple[float, ...], start: float, end: float, rate: float = 0.0) -> tuple[float, ...]:
    """``∫ exp(rate (u - end)) l_i(u) du`` from start to end, ``l_i`` the Lagrange polynomials through ``points``.

    By Gauss–Legendre quadrature, which is exact without the exponential and to double rounding with it.
    """
    u = (start + end) / 2 + (end - start) / 2 * _NODES
    weight = (end - start) / 2 * _NODE_WEIGHTS * np.exp(rate * (u - end))
    basis = (np.prod([(u - other) / (point - other) for other in points if other != point], axis=0) for point in points)
    return tuple(float(np.sum(weight * values)) for values in basis)


@dataclass(frozen=True)
class _InSigma:
    def __call__(self, levels: tuple[float, ...], sigma: float, sigma_next: float) -> Row:
        return Row(1.0, integrals(levels, sigma, sigma_next))


@dataclass(frozen=True)
class _EvenGrid:
    def __call__(self, levels: tuple[float, ...], sigma: float, sigma_next: float) -> Row:
        return Row(1.0, tuple((sigma_next - sigma) * weight for weight in ADAMS_BASHFORTH[len(levels)]))


@dataclass(frozen=True)
class _InLogSigma:
    def __call__(self, levels: tuple[float, ...], sigma: float, sigma_next: float) -> Row:
        if not sigma_next:
            return to_zero("eps", sigma, len(levels))
        logs = tuple(math.log(level) for level in levels)
        # d sigma = sigma d log sigma, counted from the upper end so that nothing overflows.
        return Row(1.0, tuple(sigma_next * w for w in integrals(logs, logs[0], math.log(sigma_next), rate=1.0)))


def LMS(order: int = 4) -> Multistep:  # noqa: N802
    """Linear multistep (k-diffusion's ``sample_lms``, by Katherine Crowson): the noise, a polynomial in sigma.

    On an even grid of sigmas this is Adams–Bashforth. Orders 1 to 4; 1 is Euler's method.

    Raises:
        BadInput: the order is out of range.
    """
    require_order("LMS", order, 4)
    return Multistep(_InSigma(), order, "eps", name=f"LMS({order})")


def IPNDM(order: int = 4) -> Multistep:  # noqa: N802
    """Improved pseudo-numerical method (Zhang & Chen, arXiv:2204.13902, app. H.2): Adams–Bashforth on the noise as if the
    grid were even, with lower orders for a start, where :class:`PLMS` evaluates once more. Orders 1 to 4.

    Raises:
        BadInput: the order is out of range.
    """
    require_order("IPNDM", order, 4)
    return Multistep(_EvenGrid(), order, "eps", name=f"IPNDM({order})")


def DEIS(order: int = 2, taper: tuple[float, ...] = ()) -> Multistep:  # noqa: N802
    """Diffusion exponential integrator (Zhang & Chen, arXiv:2204.13902, eq. 14–15), log-rho: the noise, a polynomial in
    log sigma. Orders 1 to 4; 1 is Euler's method. A step to 0 is of first order.

    Raises:
        BadInput: the order is out of range.
    """
    require_order("DEIS", order, 4)
    return Multistep(_InLogSigma(), order, "eps", taper, name=f"DEIS({order})")
