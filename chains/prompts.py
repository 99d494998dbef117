"""What a stage's prompts become: the conditioning and its opposite, as each system takes them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from ..core.conditioning import Conditioning
from ..core.loading import Model, Prior
from ..core.noise import NoiseSource
from ..stages.pictures import read_picture
from ..stages.prior import blend, embed_image, sample_prior, zero_image_embeds
from ..stages.size import with_size
from ..stages.text import encode_text
from .chain import Denoising, Ingredient, PriorOptions, SizeConditioning

Pair = tuple[Conditioning, Conditioning]
"""What to go towards, and what to go away from."""


def encode_prompts(model: Model, spec: Denoising, size: tuple[int, int]) -> Pair:
    """The conditioning of a stage's prompt and of its negative prompt.

    Args:
        size: (height, width) in pixels of what is painted, for SDXL.

    Raises:
        BadInput: the model is Kandinsky's, whose prompts go through its prior (:func:`prior_embeds`).
    """
    # Clip skip is the prompt's alone, as in diffusers.
    encode = partial(encode_text, model, chunks=spec.chunks, weights=spec.prompt_weights)
    cond = encode(spec.prompt, prompts_2=spec.prompt_2, clip_skip=spec.clip_skip)
    uncond = encode(spec.negative_prompt, prompts_2=spec.negative_prompt_2)
    if model.system != "sdxl":
        return cond, uncond
    towards = spec.size or SizeConditioning()
    away = spec.negative_size or towards.model_copy(update={"aesthetic_score": None})
    return _sized(model, cond, size, towards, 6.0), _sized(model, uncond, size, away, 2.5)


def prior_embeds(
    prior: Prior,
    spec: Denoising,
    seeds: Sequence[int],
    stream: str = "",
    folder: Path = Path(),
    source: NoiseSource | None = None,
) -> Pair:
    """The image embeddings that Kandinsky's prior makes of the prompt, or of what is to be mixed.

    Args:
        stream: of the seeds' noise.
        folder: what picture names are relative to.
    """
    options, negative = spec.prior or PriorOptions(), spec.negative_prompt

    def of_text(prompt: str) -> Conditioning:
        return sample_prior(
            prior,
            prompt,
            negative_prompt=negative,
            steps=options.steps,
            guidance_scale=options.guidance_scale,
            seeds=seeds,
            stream=stream,
            source=source,
        )

    def of(part: Ingredient) -> Conditioning:
        if part.image is not None:
            return embed_image(prior, read_picture(folder / part.image)).expand(len(seeds))
        return of_text(part.prompt or "")

    parts = options.mix or (Ingredient(prompt=spec.prompt),)
    cond = blend([of(part) for part in parts], [part.weight for part in parts])
    return cond, zero_image_embeds(prior, len(seeds)) if negative is None else of_text(negative)


def _sized(model: Model, text: Conditioning, size: tuple[int, int], told: SizeConditioning, usual: float) -> Conditioning:
    score = usual if told.aesthetic_score is None else told.aesthetic_score
    return with_size(model, text, *size, original=told.original, crop=told.crop, target=told.target, aesthetic_score=score)
