"""One function per kind of denoising stage: the stages wired, from conditioning and latents to latents.

Everything here is made of public functions, in the order one would write them by hand; copy one to
change it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from PIL import Image

from ..core.conditioning import Conditioning
from ..core.denoiser import Denoiser, conditioned
from ..core.guidance import classifier_free
from ..core.latents import Latents
from ..core.loading import Model
from ..core.loop import Point, Step, denoise
from ..core.noise import Brownian, Noise, NoiseSource
from ..stages.image import encode_image
from ..stages.inpaint import (
    inpaint_channels,
    keep_known,
    keeping_known,
    known,
    latent_mask,
    require_same_size,
    with_channels,
)
from ..stages.noise import add_noise, noise, unit_noise
from ..stages.size import sizes_in_turn
from ..stages.upscale import enlarged_size, with_latents, with_low_res
from .chain import Denoising, ImageToImage, Inpaint, TextToImage, Upscale
from .companions import Beside
from .defaults import filled
from .prompts import Pair, encode_prompts
from .runs import Run, guidance_scale, plan_run

Hook = Callable[[Step], object]


def text_to_image(
    model: Model,
    spec: TextToImage,
    seeds: Sequence[int],
    stream: str = "",
    hooks: Sequence[Hook] = (),
    source: NoiseSource | None = None,
    prompts: Pair | None = None,
    since: Point | None = None,
    beside: Beside | None = None,
) -> Latents:
    """Pure noise to latents of what the prompt says.

    Args:
        prompts: ready-made conditioning in place of the stage's prompts; Kandinsky's needs its prior.
        since: where the stage was left, to go on from there.
        beside: its ControlNets and its IP-Adapter, which is on the model already (``beside.on(model)``).
    """
    spec = filled(spec, model.system)
    run = plan_run(spec, model.scheduler)
    latents = noise(model, run.whole, spec.height, spec.width, seeds, stream=stream, source=source)
    cond, uncond = prompts or encode_prompts(model, spec, latents.size)
    if spec.faithful and model.system == "sdxl":
        cond, uncond = sizes_in_turn(cond, uncond, len(latents))
    return _denoised(run, guided(model, spec, run, cond, uncond, beside), latents, hooks, source, since)


def image_to_image(
    model: Model,
    spec: ImageToImage,
    start: Latents,
    hooks: Sequence[Hook] = (),
    source: NoiseSource | None = None,
    prompts: Pair | None = None,
    since: Point | None = None,
    beside: Beside | None = None,
) -> Latents:
    """Noise clean latents to the strength's level and denoise them; or go on from noisy ones."""
    model.space.require(start.space, f"The model {model.name}")
    spec = filled(spec, model.system)
    run = plan_run(spec, model.scheduler, None if spec.start == "strength" else start.sigma)
    if spec.start == "strength" and since is None:
        start = add_noise(start, run.schedule, unit_noise(start, source))
    cond, uncond = prompts or encode_prompts(model, spec, start.size)
    return _denoised(run, guided(model, spec, run, cond, uncond, beside), start, hooks, source, since)


def inpaint(
    model: Model,
    spec: Inpaint,
    pictures: Sequence[Image.Image],
    mask: Image.Image,
    seeds: Sequence[int],
    stream: str = "",
    hooks: Sequence[Hook] = (),
    source: NoiseSource | None = None,
    prompts: Pair | None = None,
    since: Point | None = None,
    beside: Beside | None = None,
) -> Latents:
    """Repaint where the mask is white, with a UNet of 9 channels or, blending every step, of 4.

    One picture serves all seeds, or there is one per seed.
    """
    spec = filled(spec, model.system)
    run = plan_run(spec, model.scheduler)
    cond, uncond = prompts or encode_prompts(model, spec, (mask.height, mask.width))
    for picture in pictures:
        require_same_size(picture, mask)
    blends = not model.inpaints or model.system == "kandinsky"  # whose UNet of 9 channels was meant for both
    clean = None
    if run.schedule.first or blends:
        clean = encode_image(model, pictures, seeds=seeds, stream=stream, posterior=spec.posterior, source=source)
    cells = latent_mask(mask, model.space, spec.downsample).to(model.device)
    draw = source or Noise(tuple(seeds), stream)
    unit = draw((len(seeds), model.space.channels, *cells.shape[-2:]), "latents").to(model.device)
    start = noise(model, run.whole, mask.height, mask.width, seeds, stream=stream, source=lambda *_: unit)
    if clean is not None and run.schedule.first:  # else all of it is repainted, and nothing of the picture may shine through
        start = add_noise(clean, run.schedule, unit)
    if model.inpaints:
        channels = inpaint_channels(model, pictures, mask, seeds=seeds, stream=stream,
            posterior=spec.posterior, downsample=spec.downsample, source=source, clean=clean,
        )  # fmt: skip
        cond, uncond = with_channels(cond, channels), with_channels(uncond, channels)
    denoiser = guided(model, spec, run, cond, uncond, beside)
    if clean is None or not blends:
        return _denoised(run, denoiser, start, hooks, source, since)
    # diffusers' Kandinsky keeps the latents it starts from for the unit noise they were made of.
    known_at = known(clean, start.x if _unscaled(model, spec, run) else unit, run.schedule)
    pure = math.inf if run.schedule.first else run.schedule.sigmas[0]
    denoiser = keeping_known(denoiser, cells, known_at, pure)
    return _denoised(run, denoiser, start, [keep_known(cells, known_at), *hooks], source, since)


def upscale(
    model: Model,
    spec: Upscale,
    small: Latents | Sequence[Image.Image],
    seeds: Sequence[int],
    stream: str = "",
    hooks: Sequence[Hook] = (),
    source: NoiseSource | None = None,
    prompts: Pair | None = None,
    since: Point | None = None,
) -> Latents:
    """Latents to those of a picture twice as large, or pictures to latents of one four times as large."""
    spec = filled(spec, model.system)
    run = plan_run(spec, model.scheduler)
    size = small.size if isinstance(small, Latents) else (small[0].height, small[0].width)
    height, width = enlarged_size(model, size)
    cond, uncond = prompts or encode_prompts(model, spec, (height, width))

    if isinstance(small, Latents):
        cond = with_latents(model, cond, small)
    else:
        level = 20 if spec.noise_level is None else spec.noise_level
        cond = with_low_res(model, cond, small, noise_level=level, seeds=seeds, stream=stream, source=source)
    uncond = replace(uncond.expand(len(cond)), channels=cond.channels, class_labels=cond.class_labels)
    denoiser = guided(model, spec, run, cond, uncond)
    latents = noise(model, run.whole, height, width, seeds, stream=stream, source=source)
    return _denoised(run, denoiser, latents, hooks, source, since)


def _denoised(
    run: Run, denoiser: Denoiser, start: Latents, hooks: Sequence[Hook], source: NoiseSource | None, since: Point | None
) -> Latents:
    """The run, or the rest of it; noise from the latents' own seeds, step by step or along one path as the solver has it."""
    start, schedule = (start, run.schedule) if since is None else (since.latents, since.rest(run.schedule))
    if source is None and run.config.brownian:
        source = Brownian(start.seeds, start.stream)
    return denoise(denoiser, start, schedule, run.solver, hooks, source)


def guided(
    model: Model, spec: Denoising, run: Run, cond: Conditioning, uncond: Conditioning, beside: Beside | None = None
) -> Denoiser:
    """The model's network under the stage's ControlNets and guidance.

    Raises:
        BadInput: the stage has ControlNets or an image prompt, and they are not here.
    """
    from ..kernels.fast import prepared  # which needs diffusers, as the model that is there by now did

    scale, beside = guidance_scale(spec, run.whole), beside or Beside()
    beside.require(spec)
    cond, uncond = beside.conditioned(model, (cond, uncond))
    network = model.denoiser_of(run.config.kind, scale_input=not _unscaled(model, spec, run))
    network = prepared(beside.steered(network, run), run.schedule)
    if not callable(scale) and scale <= 1.0:
        return conditioned(network, cond)
    return classifier_free(network, cond, uncond, scale, rescale=spec.guidance_rescale, batched=spec.guidance_batched)


def _unscaled(model: Model, spec: Denoising, run: Run) -> bool:
    """Whether to do as diffusers' Kandinsky pipelines, which never scale the input, whatever the scheduler expects."""
    return spec.faithful and model.system == "kandinsky" and run.config.scales_input
