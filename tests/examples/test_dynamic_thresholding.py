"""Dynamic thresholding beside that of diffusers' DPM-Solver++."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from torch import Tensor
from unrolled import Conditioning, Model, Prediction, classifier_free
from unrolled.examples.dynamic_thresholding import thresholded

THEIRS = {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1e6}
X0 = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.3, 1.0, 5.0]).view(-1, 1, 1, 1)


@pytest.mark.parametrize("bound", [1.0, 2.5])
def test_it_is_diffusers_formula(bound: float) -> None:
    changed = thresholded(lambda x, sigma, timestep: Prediction.from_x0(X0, x, sigma), bound, 0.9)(X0, 1.0, 0.0)
    theirs = bound * DPMSolverMultistepScheduler(**THEIRS)._threshold_sample(X0 / bound)
    torch.testing.assert_close(changed.x0, theirs)
    assert changed.x0.abs().amax() <= bound * (1 + 1e-6)
    torch.testing.assert_close(changed.x0[0], X0[0].clamp(-bound, bound))  # not brought up to the bound


def test_it_ends_where_diffusers_does(
    tiny: Model, texts: tuple[Conditioning, Conditioning], theirs: Callable[..., Tensor], ours: Callable[..., Tensor]
) -> None:
    scheduler = DPMSolverMultistepScheduler.from_config(tiny.scheduler, **THEIRS)
    expected = theirs(StableDiffusionPipeline, scheduler, guidance_scale=9.0)
    guided = classifier_free(tiny.denoiser, *texts, 9.0)
    bounded = ours(thresholded(guided, quantile=0.9), "dpm++2m")
    assert (bounded - expected).abs().max() < 1e-4 * expected.abs().max()
    assert (ours(guided, "dpm++2m") - expected).abs().max() > 1e-2 * expected.abs().max()
