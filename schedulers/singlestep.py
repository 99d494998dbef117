"""Single-step DPM-Solver: every evaluation of a step lies inside it, so that no split can fall between them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch import Tensor

from ..core.prediction import Prediction
from ..core.solver import Draw, Evaluate, History
from .dpm import SolverType, Taylor, taylor
from .multistep import Predicts, require_order
from .renoise import Renoised, ancestral


@dataclass(frozen=True)
class Singlestep:
    """DPM-Solver-1, -2 and -3, or DPM-Solver++'s (Lu et al., arXiv:2206.00927, alg. 1–2; arXiv:2211.01095, alg. 1).

    A step to 0 is Euler's.

    Args:
        order: 1 to 3, which is the number of evaluations.
        levels: where to evaluate inside a step: at those that lie strictly between its ends, with the order that their
            number makes (diffusers' ``DPMSolverSinglestepScheduler``). Without them, in even parts of log sigma.
        predicts: "x0" (DPM-Solver++) or "eps" (DPM-Solver).
        tau: 0 ordinary, 1 the SDE; every evaluation but the first is then at a point with noise of its own.
        solver_type: "midpoint" or "heun", which weighs the derivatives by their exact integrals.
        faithful: repeat diffusers' wrong sign in the third order of the SDE.
    """

    order: int = 2
    levels: tuple[float, ...] = field(default=(), repr=False)
    predicts: Predicts = "x0"
    tau: float = 0.0
    solver_type: SolverType = "midpoint"
    faithful: bool = False

    def __post_init__(self) -> None:
        require_order("Single-step DPM-Solver", self.order, 3)

    def __call__(
        self, denoise: Evaluate, x: Tensor, sigma: float, sigma_next: float, history: History, noise: Draw, /
    ) -> tuple[Tensor, History]:
        """Next x; keeps no history."""
        known: list[Prediction] = []
        at, now = x, sigma
        for level in (*self._inside(sigma, sigma_next), sigma_next):
            known.append(denoise(at, now))
            at, now = self._step(x, sigma, level, known, noise), level
        return at, ()

    def _inside(self, sigma: float, sigma_next: float) -> tuple[float, ...]:
        if not sigma_next:
            return ()
        if self.levels:
            return tuple(level for level in self.levels if sigma_next < level < sigma)[: self.order - 1]
        return tuple(sigma * (sigma_next / sigma) ** (i / self.order) for i in range(1, self.order))

    def _step(self, x: Tensor, sigma: float, sigma_next: float, known: list[Prediction], noise: Draw) -> Tensor:
        """From sigma to sigma_next by the estimates known so far, the first of which is at sigma."""
        step = taylor(sigma, sigma_next, self.predicts, self.tau, faithful=self.faithful)
        first, *others = (point.x0 if self.predicts == "x0" else point.eps for point in known)
        x = (x * step.x).add_(first, alpha=step.value)
        if others and sigma_next:
            h = math.log(sigma / sigma_next)
            places = [math.log(sigma / point.sigma) / h for point in known[1:]]
            for weight, other in zip(self._weights(step, places), others, strict=True):
                x.add_(other - first, alpha=weight)
        return x.add_(noise(sigma, sigma_next), alpha=step.noise) if step.noise else x

    def _weights(self, step: Taylor, places: list[float]) -> tuple[float, ...]:
        """Of the differences to the first estimate, for points that far along the step."""
        if len(places) == 1:
            # On its way to third order the paper weighs the slope exactly, diffusers as in a step of second order.
            half = self.solver_type == "midpoint" and (self.order == 2 or bool(self.levels))
            return ((0.5 * step.value if half else step.slope) / places[0],)
        near, far = places
        if self.solver_type == "midpoint":
            return 0.0, step.slope / far
        # D1 = (far d1 - near d2) / (far - near) and D2 = 2 (d2 - d1) / (far - near), of the divided differences d.
        d1 = (far * step.slope - 2.0 * step.curve) / (far - near)
        d2 = (2.0 * step.curve - near * step.slope) / (far - near)
        return d1 / near, d2 / far


def DPM2(eta: float = 0.0) -> Singlestep | Renoised:  # noqa: N802
    """DPM-Solver-2, the midpoint method in log sigma (k-diffusion's ``sample_dpm_2``, diffusers' ``KDPM2``).

    Args:
        eta: 0 deterministic, 1 ancestral (``sample_dpm_2_ancestral``).
    """
    return ancestral(Singlestep(2, predicts="eps"), eta)


def DPMpp2S(eta: float = 0.0) -> Singlestep | Renoised:  # noqa: N802
    """DPM-Solver++(2S) (Lu et al., arXiv:2211.01095, alg. 1); ``eta`` 1 is k-diffusion's ``sample_dpmpp_2s_ancestral``."""
    return ancestral(Singlestep(2), eta)
