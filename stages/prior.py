"""Kandinsky's prior: prompts and pictures to the image embeddings that its decoders take."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from PIL import Image
from torch import Tensor

from ..core.conditioning import Conditioning
from ..core.errors import BadInput, BadModel
from ..core.guidance import GuidanceScale, classifier_free
from ..core.latents import Latents
from ..core.loading import Prior
from ..core.loop import Step, denoise
from ..core.noise import Noise, NoiseSource
from .pictures import clip_pixels
from .text import Prompts, encode_text


def sample_prior(
    prior: Prior,
    prompts: str | Sequence[str],
    *,
    negative_prompt: Prompts = None,
    steps: int = 25,
    guidance_scale: GuidanceScale = 4.0,
    seeds: Sequence[int] = (0,),
    stream: str = "",
    hooks: Iterable[Callable[[Step], object]] = (),
    source: NoiseSource | None = None,
) -> Conditioning:
    """Image embeddings of what prompts describe, one per seed, denoised from noise like latents of one pixel.

    (Ramesh et al., arXiv:2204.06125, sec. 2.2; Razzhigaev et al., arXiv:2310.03502, sec. 3.1.)

    What a decoder is guided away from is an embedding too. diffusers' is ``zero_image_embeds(prior)`` without a
    negative prompt; with one, the negative prompt prior_embeds with the same ``negative_prompt`` and seeds.

    Args:
        prompts: one for all seeds, or one per seed.
        negative_prompt: what the *prior* is guided away from, by default the empty prompt; one, or one per seed.
        guidance_scale: at 1 or below the negative prompt is not looked at.
        stream: another stream of the same seeds. The noise is never that of a decoder's run on them.
        hooks: see every step of the prior's run, as those of :func:`~unrolled.core.loop.denoise`.

    Returns:
        image_embeds of shape (seeds, width), in the image encoder's own coordinates.

    Raises:
        BadInput: prompts and seeds do not match; steps are out of range.
    """
    schedule, seeds, stream = prior.schedule(steps), tuple(seeds), f"{stream}/prior"
    cond, uncond = (_one_per_seed(encode_text(prior, told), len(seeds)) for told in (prompts, negative_prompt or ""))
    source = source or Noise(seeds, stream)
    unit = source((len(seeds), prior.space.channels, 1, 1), "latents").to(prior.device)
    start = Latents(unit * (schedule.start_std or schedule.sigmas[0]), prior.space, schedule.sigmas[0], seeds, stream)
    denoiser = classifier_free(prior.denoiser, cond, uncond, guidance_scale)
    end = denoise(denoiser, start, schedule, prior.solver(steps), hooks, source)
    # The prior works on embeddings that were centred and scaled to unit variance.
    mean, std = prior.prior.clip_mean.float(), prior.prior.clip_std.float()
    return Conditioning(image_embeds=end.clean.flatten(1) * std + mean)


def embed_image(prior: Prior, pictures: Image.Image | Sequence[Image.Image]) -> Conditioning:
    """The image encoder's embeddings of pictures of any size, resized, cropped and normalised as its checkpoint says.

    Returns:
        image_embeds of shape (pictures, width).

    Raises:
        BadInput: there is no picture; BadModel: ``preprocessor_config.json`` makes no sense.
    """
    several = [pictures] if isinstance(pictures, Image.Image) else list(pictures)
    if not several:
        raise BadInput("An image embedding needs at least one picture.")
    return Conditioning(image_embeds=_encoded(prior, _pixels(prior, several)))


def zero_image_embeds(prior: Prior, count: int = 1) -> Conditioning:
    """The embedding of nothing, which decoders are guided away from without a negative prompt.

    The encoder sees zeros *after* normalisation: not black, but the plain mean colour of CLIP's training pictures.

    Returns:
        image_embeds of shape (count, width).
    """
    side = prior.image_encoder.config.image_size
    return Conditioning(image_embeds=_encoded(prior, torch.zeros(1, 3, side, side)).expand(count, -1))


def blend(conditionings: Sequence[Conditioning], weights: Sequence[float]) -> Conditioning:
    """The weighted sum of image embeddings, of prompts and pictures alike; weights that add up to 1 interpolate.

    Args:
        conditionings: each with as many image_embeds as the others, or with one for all.

    Raises:
        BadInput: there are none, not as many as weights, or they are no image embeddings of one prior.
    """
    if not conditionings or len(conditionings) != len(weights):
        raise BadInput(f"A blend needs one weight per embedding, got {len(conditionings)} and {len(weights)}.")
    embeds = [c.image_embeds for c in conditionings if c.image_embeds is not None and c.names() == {"image_embeds"}]
    fit = len({e.shape[1] for e in embeds}) == 1 and len({len(e) for e in embeds} - {1}) <= 1
    if len(embeds) < len(conditionings) or not fit:
        raise BadInput(
            f"These cannot be blended: {', '.join(map(repr, conditionings))}; give image embeddings of one prior "
            "(sample_prior, embed_image, zero_image_embeds), equally many or one for all."
        )
    return Conditioning(image_embeds=sum((w * e for w, e in zip(weights, embeds, strict=True)), torch.zeros(())))


def _one_per_seed(prompts: Conditioning, seeds: int) -> Conditioning:
    if len(prompts) not in (1, seeds):
        raise BadInput(f"{len(prompts)} prompts were given with {seeds} seeds: give one prompt for all, or one per seed.")
    return prompts.expand(seeds)


def _pixels(prior: Prior, pictures: Sequence[Image.Image]) -> Tensor:
    try:
        return clip_pixels(prior.image_processor, pictures)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise BadModel(f"The preprocessor_config.json of {prior.name} cannot be followed ({error}).") from error


def _encoded(prior: Prior, pixels: Tensor) -> Tensor:
    with torch.no_grad():
        embeds: Tensor = prior.image_encoder(pixels.to(prior.device, prior.dtype)).image_embeds
    return embeds.float()
