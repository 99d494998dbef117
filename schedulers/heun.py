"""Heun's second-order method."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..core.solver import Draw, Evaluate, History


@dataclass(frozen=True)
class Heun:
    """The mean of the slope here and there (Karras et al., arXiv:2206.00364, alg. 1).

    Both evaluations lie inside one step, so that no split can fall between them. The last step, to
    sigma 0, is Euler's.
    """

    def __call__(
        self, denoise: Evaluate, x: Tensor, sigma: float, sigma_next: float, history: History, noise: Draw, /
    ) -> tuple[Tensor, History]:
        """Next x; keeps no history."""
        here = denoise(x, sigma)
        euler = here.x0.add(here.eps, alpha=sigma_next)
        if not sigma_next:
            return euler, ()
        # The slope dx/dsigma is (x - x0) / sigma, which is eps unless x0 was edited; a wrapper of the
        # denoiser may have edited the x it saw too (inpainting does).
        there = denoise(euler, sigma_next)
        slope = ((here.x - here.x0) / sigma + (there.x - there.x0) / sigma_next) / 2
        return x.add(slope, alpha=sigma_next - sigma), ()
