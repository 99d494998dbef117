"""Adaptive projected guidance beside diffusers' guider."""

from __future__ import annotations

import pytest
import torch
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance
from torch import Tensor
from unrolled import Prediction
from unrolled.examples.adaptive_projected_guidance import projected


@pytest.mark.parametrize("norm", [2.0, 1e6])
@pytest.mark.parametrize("momentum", [0.0, -0.5])
@pytest.mark.parametrize("eta", [0.0, 0.3])
def test_it_is_diffusers_formula_on_clean_estimates(norm: float, momentum: float, eta: float) -> None:
    given = iter(torch.randn(3, 3, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0)))
    x, sigma, buffer, seen = torch.zeros(2, 4, 8, 8), 2.0, MomentumBuffer(momentum), list[tuple[Tensor, Tensor]]()

    def guided(x: Tensor, sigma: float, timestep: float) -> Prediction:
        out, cond, uncond = next(given)
        seen.append((x - sigma * cond, x - sigma * uncond))  # the two clean estimates
        return Prediction(out, x, sigma, "epsilon", cond, uncond)

    denoiser = projected(guided, 7.0, eta=eta, norm=norm, momentum=momentum)
    for _ in range(3):
        changed = denoiser(x, sigma, 100.0)
        theirs = normalized_guidance(*seen[-1], 6.0, buffer, eta, norm, use_original_formulation=True)
        torch.testing.assert_close(changed.x0, theirs, rtol=1e-4, atol=1e-4)


def test_with_everything_off_it_is_classifier_free_guidance() -> None:
    cond, uncond, x = torch.randn(3, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).unbind()
    guided = Prediction(uncond + 7 * (cond - uncond), x, 2.0, "epsilon", cond, uncond)
    denoiser = projected(lambda *_: guided, 7.0, eta=1.0, norm=1e6, momentum=0.0)
    torch.testing.assert_close(denoiser(x, 2.0, 100.0).eps, guided.eps, rtol=1e-4, atol=1e-4)


def test_without_guidance_nothing_changes() -> None:
    plain = Prediction(torch.ones(1, 4, 2, 2), torch.zeros(1, 4, 2, 2), 2.0)
    assert projected(lambda *_: plain, 7.0)(plain.x, 2.0, 100.0) is plain
