"""What a stage's prompts become: the conditioning and its opposite, as each system takes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..core.conditioning import Conditioning
from ..core.errors import BadInput
from ..core.loading import Model, Prior
from ..core.noise import NoiseSource
from ..stages.pictures import read_picture
from ..stages.prior import blank_image, blend, embed_image, imagine
from ..stages.size import with_size
from ..stages.text import encode_text
from .chain import Denoising, Ingredient, PriorOptions, SizeConditioning

Pair = tuple[Conditioning, Conditioning]
"""What to go towards, and what to go away from."""


def encode_prompts(
    model: Model,
    spec: Denoising,
    size: tuple[int, int],
    seeds: Sequence[int] = (0,),
    prior: Prior | None = None,
    folder: Path = Path(),
) -> Pair:
    """The conditioning of a stage's prompt and of its negative prompt.

    Args:
        size: (height, width) in pixels of what is painted, for SDXL.
        seeds: one per image, for Kandinsky's prior, which draws.
        prior: Kandinsky's.
        folder: what picture names are relative to.
    """
    if model.system == "kandinsky":
        if prior is None:
            raise BadInput(f"{model.name} takes image embeddings: give the prior that makes them of the prompt.")
        return imagined(prior, spec, seeds, folder)
    # Clip skip is the prompt's alone, as in diffusers.
    cond = encode_text(model, spec.prompt, prompts_2=spec.prompt_2, clip_skip=spec.clip_skip, chunks=spec.chunks)
    negative, negative_2 = spec.negative_prompt, spec.negative_prompt_2
    uncond = encode_text(model, negative, prompts_2=negative_2, chunks=spec.chunks)
    if model.system != "sdxl":
        return cond, uncond
    towards, away = spec.size or SizeConditioning(), spec.negative_size or spec.size or SizeConditioning()
    return _sized(model, cond, size, towards, 6.0), _sized(model, uncond, size, away, 2.5)


def imagined(
    prior: Prior, spec: Denoising, seeds: Sequence[int], folder: Path = Path(), source: NoiseSource | None = None
) -> Pair:
    """The image embeddings that Kandinsky's prior makes of the prompt, or of what is to be mixed."""
    options, negative = spec.prior or PriorOptions(), spec.negative_prompt

    def of_text(prompt: str) -> Conditioning:
        return imagine(
            prior,
            prompt,
            negative_prompt=negative,
            steps=options.steps,
            guidance_scale=options.guidance_scale,
            seeds=seeds,
            source=source,
        )

    def of(part: Ingredient) -> Conditioning:
        if part.image is not None:
            return embed_image(prior, read_picture(folder / part.image)).expand(len(seeds))
        return of_text(part.prompt or "")

    parts = options.mix or (Ingredient(prompt=spec.prompt),)
    cond = blend([of(part) for part in parts], [part.weight for part in parts])
    return cond, blank_image(prior, len(seeds)) if negative is None else of_text(negative)


def _sized(model: Model, text: Conditioning, size: tuple[int, int], told: SizeConditioning, usual: float) -> Conditioning:
    score = usual if told.aesthetic_score is None else told.aesthetic_score
    return with_size(model, text, *size, original=told.original, crop=told.crop, target=told.target, aesthetic_score=score)
