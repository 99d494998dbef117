"""Perturbed-attention guidance beside diffusers' pipeline."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from diffusers import StableDiffusionPAGPipeline
from torch import Tensor
from unrolled import Conditioning, Model, classifier_free
from unrolled.examples.perturbed_attention_guidance import perturbed


@pytest.mark.parametrize("layers", ["mid_block", "up_blocks.0"])
@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_it_ends_where_diffusers_does(
    tiny: Model,
    texts: tuple[Conditioning, Conditioning],
    theirs: Callable[..., Tensor],
    ours: Callable[..., Tensor],
    layers: str,
    guidance_scale: float,
) -> None:
    expected = theirs(
        StableDiffusionPAGPipeline, made_with={"pag_applied_layers": layers}, guidance_scale=guidance_scale, pag_scale=3.0
    )
    plain = classifier_free(tiny.denoiser, *texts, guidance_scale)
    both = ours(perturbed(plain, tiny, texts[0], 3.0, layers))
    assert (both - expected).abs().max() < 1e-4 * expected.abs().max()
    assert (ours(plain) - expected).abs().max() > 1e-3 * expected.abs().max()
