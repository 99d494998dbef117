"""Rescaled guidance beside diffusers' and the library's own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from torch import Tensor
from unrolled import Conditioning, Model, Prediction, classifier_free, conditioned
from unrolled.examples.cfg_rescale import rescaled


@pytest.mark.parametrize("amount", [0.0, 0.7, 1.0])
def test_it_is_diffusers_formula(amount: float) -> None:
    x, cond, out = torch.randn(3, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).unbind()
    changed = rescaled(lambda x, sigma, timestep: Prediction(3 * out, x, sigma, cond=cond), amount)(x, 2.0, 100.0)
    torch.testing.assert_close(changed.out, rescale_noise_cfg(3 * out, cond, guidance_rescale=amount))


def test_it_ends_where_diffusers_and_the_library_do(
    tiny: Model, texts: tuple[Conditioning, Conditioning], theirs: Callable[..., Tensor], ours: Callable[..., Tensor]
) -> None:
    expected = theirs(StableDiffusionPipeline, guidance_scale=9.0, guidance_rescale=0.7)
    guided = classifier_free(tiny.denoiser, *texts, 9.0)
    by_hand, built_in = ours(rescaled(guided, 0.7)), ours(classifier_free(tiny.denoiser, *texts, 9.0, rescale=0.7))
    torch.testing.assert_close(by_hand, built_in)
    assert (by_hand - expected).abs().max() < 1e-4 * expected.abs().max()
    assert (ours(guided) - expected).abs().max() > 1e-2 * expected.abs().max()


def test_without_guidance_nothing_changes(tiny: Model, texts: tuple[Conditioning, Conditioning]) -> None:
    plain, x = conditioned(tiny.denoiser, texts[0]), torch.ones(1, 4, 8, 8)
    assert torch.equal(rescaled(plain, 0.7)(x, 2.0, 100.0).out, plain(x, 2.0, 100.0).out)
