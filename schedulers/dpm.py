"""DPM-Solver and DPM-Solver++, multistep, as ordinary and as stochastic differential equations."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

from ..core.errors import BadInput
from .euler import require_eta
from .multistep import Multistep, Predicts, Row, require_order, to_zero

SolverType = Literal["midpoint", "heun"]


class Taylor(NamedTuple):
    """A step by the derivatives of the estimate in ``log sigma``, each times the step's length to its power.

    ``x_next = x * self.x + value * estimate + slope * D1 + curve * D2 + noise * unit noise``.
    """

    x: float
    value: float
    slope: float
    curve: float
    noise: float


def taylor(sigma: float, sigma_next: float, predicts: Predicts, tau: float = 0.0, *, faithful: bool = False) -> Taylor:
    """The coefficients of DPM-Solver and DPM-Solver++ (Lu et al., arXiv:2206.00927, eq. 3.7; arXiv:2211.01095, eq. 4.1).

    Args:
        tau: how stochastic (Xue et al., arXiv:2309.05019, eq. 14): 0 is the ordinary equation, 1 the reverse SDE.
        faithful: diffusers' third order of the SDE, whose curve has 0.5 with the wrong sign.
    """
    if not sigma_next:
        row = to_zero(predicts, sigma, 1)
        return Taylor(row.x, row.points[0], 0.0, 0.0, 0.0)
    h, more = math.log(sigma / sigma_next), 1.0 + tau**2
    if predicts == "eps":
        fall = sigma - sigma_next
        slope = sigma_next - fall / h
        curve = 0.5 * sigma_next - (fall / h - sigma_next) / h
        return Taylor(1.0, -more * fall, more * slope, more * curve, tau * math.sqrt(sigma**2 - sigma_next**2))
    H = more * h  # noqa: N806
    value = -math.expm1(-H)
    curve = (value - H) / H**2 + (-0.5 if faithful and tau else 0.5)
    return Taylor(1.0 - value, value, 1.0 - value / H, curve, sigma_next * math.sqrt(-math.expm1(-2.0 * tau**2 * h)))


@dataclass(frozen=True)
class _Extrapolating:
    predicts: Predicts
    tau: float
    solver_type: SolverType
    faithful: bool

    def __call__(self, levels: tuple[float, ...], sigma: float, sigma_next: float) -> Row:
        if not sigma_next:
            return to_zero(self.predicts, sigma, len(levels))
        step = taylor(sigma, sigma_next, self.predicts, self.tau, faithful=self.faithful)
        logs, h = [math.log(level) for level in levels], math.log(sigma / sigma_next)
        if len(levels) == 1:
            points: tuple[float, ...] = (step.value,)
        elif len(levels) == 2:
            slope = 0.5 * step.value if self.solver_type == "midpoint" else step.slope
            difference = slope * h / (logs[1] - logs[0])
            points = (step.value + difference, -difference)
        else:
            points = _third_order(step, h, logs)
        return Row(step.x, points, step.noise)


def _third_order(step: Taylor, h: float, logs: list[float]) -> tuple[float, ...]:
    """D1 by the parabola through three points; D2 as published, which is half the second derivative that belongs there."""
    r0, r1 = (logs[1] - logs[0]) / h, (logs[2] - logs[1]) / h
    newer = (step.slope * (1.0 + r0 / (r0 + r1)) + step.curve / (r0 + r1)) / r0
    older = -(step.slope * r0 + step.curve) / (r0 + r1) / r1
    return step.value + newer, older - newer, -older


def DPMSolver(  # noqa: N802
    order: int = 2,
    *,
    predicts: Predicts = "x0",
    tau: float = 0.0,
    solver_type: SolverType = "midpoint",
    taper: tuple[float, ...] = (),
    faithful: bool = False,
) -> Multistep:
    """DPM-Solver++ multistep (Lu et al., arXiv:2211.01095, alg. 2), or DPM-Solver's (arXiv:2206.00927).

    In ``lambda = -log sigma`` the ordinary step is ``x_next = r x + (1 - r) D`` with ``r = sigma_next / sigma``, where D
    extrapolates x0 from the last points; the stochastic one goes further down (``r`` to the power ``1 + tau^2``)
    and adds noise. A step to 0 is of first order.

    Args:
        order: 1 (Euler's method, or DDPM's with tau = 1), 2 or 3. The third order has the weights of
            the authors' code and everybody's, which converge with order 2 (docs/solvers.md); ``SASolver(3, 0)`` has
            the exact ones.
        predicts: "x0" is DPM-Solver++, "eps" DPM-Solver.
        tau: 0 ordinary, 1 the reverse SDE (``SDE-DPM-Solver``); k-diffusion's ``eta`` is its square.
        solver_type: how the second order weighs the slope, "midpoint" as in the paper or "heun", the exact integral.
        taper: see :class:`Multistep`; diffusers' ``lower_order_final`` and ``euler_at_final``.
        faithful: repeat diffusers' wrong sign in the third order of the SDE.

    Raises:
        BadInput: the order is not one of these, or tau is below 0.
    """
    require_order("DPM-Solver", order, 3)
    if tau < 0:
        raise BadInput(f"tau is 0 (no noise) or more, 1 the reverse SDE, got {tau:g}.")
    name = f"DPMSolver({order}, {predicts}, tau={tau:g}, {solver_type})"
    return Multistep(_Extrapolating(predicts, tau, solver_type, faithful), order, predicts, taper, name=name)


def _tau(eta: float) -> float:
    require_eta(eta)
    return math.sqrt(eta)


def DPMpp2M(solver_type: SolverType = "midpoint", taper: tuple[float, ...] = ()) -> Multistep:  # noqa: N802
    """DPM-Solver++(2M)."""
    return DPMSolver(2, solver_type=solver_type, taper=taper)


def DPMpp3M(taper: tuple[float, ...] = ()) -> Multistep:  # noqa: N802
    """DPM-Solver++(3M)."""
    return DPMSolver(3, taper=taper)


def DPMpp2MSDE(eta: float = 1.0, solver_type: SolverType = "midpoint") -> Multistep:  # noqa: N802
    """DPM-Solver++(2M) SDE; ``eta`` as in k-diffusion, 0 (ordinary) to 1 (the reverse SDE)."""
    return DPMSolver(2, tau=_tau(eta), solver_type=solver_type)


def DPMpp3MSDE(eta: float = 1.0) -> Multistep:  # noqa: N802
    """DPM-Solver++(3M) SDE (k-diffusion's ``sample_dpmpp_3m_sde``)."""
    return DPMSolver(3, tau=_tau(eta), solver_type="heun")
