"""DPM-Solver++ multistep of second order."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..core.solver import Draw, Evaluate, History, Past


@dataclass(frozen=True)
class DPMpp2M:
    """DPM-Solver++(2M) (Lu et al., arXiv:2211.01095, alg. 2): exponential integrator, one evaluation.

    With ``lambda = -log sigma`` the step is ``x_next = (sigma_next / sigma) x + (1 - sigma_next / sigma) D``
    where ``D`` extrapolates x0 from this point and the last; the first step takes ``D = x0``.

    Args:
        solver_type: how D is weighted, "midpoint" as in the paper or diffusers' "heun".
        first_order_to: also take ``D = x0`` in the step that ends at this sigma (diffusers'
            ``lower_order_final`` in short runs and ``euler_at_final``); a step to 0 always does.
    """

    solver_type: Literal["midpoint", "heun"] = "midpoint"
    first_order_to: float = 0.0

    def __call__(
        self, denoise: Evaluate, x: Tensor, sigma: float, sigma_next: float, history: History, noise: Draw, /
    ) -> tuple[Tensor, History]:
        """Next x; remembers one point."""
        prediction = denoise(x, sigma)
        x0 = prediction.x0
        remember = (Past(sigma, prediction.x, x0),)
        if not history or sigma_next <= self.first_order_to:
            return torch.lerp(x0, x, sigma_next / sigma), remember
        before = history[-1]
        h, h_before = math.log(sigma / sigma_next), math.log(before.sigma / sigma)
        weight = 0.5 * h / h_before
        if self.solver_type == "heun":
            # -(e^-h - 1)/2 becomes (e^-h - 1)/h + 1, relative to the factor 1 - e^-h that D carries.
            weight *= 2.0 * ((math.exp(-h) - 1.0) / h + 1.0) / (1.0 - math.exp(-h))
        D = torch.add(x0, x0 - before.x0, alpha=weight)  # noqa: N806
        return torch.lerp(D, x, sigma_next / sigma), remember
