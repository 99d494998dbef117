"""The guidance interval beside diffusers' pipeline, whose guidance scale a callback sets before every step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from diffusers import StableDiffusionPipeline
from torch import Tensor
from unrolled import Conditioning, Model, classifier_free
from unrolled.examples.guidance_interval import between

LOW, HIGH, SCALE = 0.5, 3.0, 7.5


def test_it_ends_where_diffusers_does(
    tiny: Model, texts: tuple[Conditioning, Conditioning], theirs: Callable[..., Tensor], ours: Callable[..., Tensor]
) -> None:
    def before_the_next(pipeline: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        if step + 1 < len(pipeline.scheduler.timesteps):
            alpha = pipeline.scheduler.alphas_cumprod[pipeline.scheduler.timesteps[step + 1]]
            pipeline._guidance_scale = SCALE if LOW < ((1 - alpha) / alpha) ** 0.5 <= HIGH else barely
        return given

    barely = 1 + 1e-9  # at 1 the pipeline would not take the pair of embeddings it has made
    expected = theirs(StableDiffusionPipeline, guidance_scale=barely, callback_on_step_end=before_the_next)
    within = ours(classifier_free(tiny.denoiser, *texts, between(LOW, HIGH, SCALE)))
    everywhere = ours(classifier_free(tiny.denoiser, *texts, SCALE))
    assert (within - expected).abs().max() < 1e-4 * expected.abs().max()
    assert (everywhere - expected).abs().max() > 1e-2 * expected.abs().max()


@pytest.mark.parametrize(("sigma", "scale"), [(0.4, 1), (LOW, 1), (0.51, SCALE), (HIGH, SCALE), (3.01, 1)])
def test_the_interval_is_open_below_and_closed_above(sigma: float, scale: float) -> None:
    assert between(LOW, HIGH, SCALE)(sigma) == scale
