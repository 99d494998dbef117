"""Self-attention guidance beside diffusers' pipeline."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from diffusers import StableDiffusionSAGPipeline
from torch import Tensor
from unrolled import Conditioning, Model, classifier_free, conditioned
from unrolled.examples.self_attention_guidance import self_attentive


def test_with_guidance_it_ends_where_diffusers_does(
    tiny: Model, texts: tuple[Conditioning, Conditioning], theirs: Callable[..., Tensor], ours: Callable[..., Tensor]
) -> None:
    expected = theirs(StableDiffusionSAGPipeline, guidance_scale=5.0, sag_scale=0.75)
    guided = classifier_free(tiny.denoiser, *texts, 5.0)
    one_batch = ours(self_attentive(guided, tiny, texts[1]))
    two_calls = ours(self_attentive(classifier_free(tiny.denoiser, *texts, 5.0, batched=False), tiny, texts[1]))
    assert (one_batch - expected).abs().max() < 1e-4 * expected.abs().max()
    assert (two_calls - expected).abs().max() < 1e-4 * expected.abs().max()
    assert (ours(guided) - expected).abs().max() > 1e-3 * expected.abs().max()


@pytest.mark.parametrize("size", [{}, {"height": 64, "width": 128}], ids=["square", "wide"])
def test_without_guidance_it_ends_where_diffusers_does(
    tiny: Model,
    texts: tuple[Conditioning, Conditioning],
    theirs: Callable[..., Tensor],
    ours: Callable[..., Tensor],
    size: dict[str, int],
) -> None:
    expected = theirs(StableDiffusionSAGPipeline, guidance_scale=1.0, sag_scale=0.75, **size)
    plain = conditioned(tiny.denoiser, texts[0])
    assert (ours(self_attentive(plain, tiny, texts[0]), **size) - expected).abs().max() < 1e-4 * expected.abs().max()
    assert (ours(plain, **size) - expected).abs().max() > 1e-3 * expected.abs().max()
