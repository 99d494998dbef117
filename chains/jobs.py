"""One function per kind of denoising stage: the stages wired, from text and latents to latents.

Everything here is made of public functions, in the order one would write them by hand; copy one to
change it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from PIL import Image

from ..core.conditioning import Conditioning
from ..core.denoiser import Denoiser, UNetDenoiser, conditioned
from ..core.errors import BadInput
from ..core.guidance import GuidanceScale, classifier_free, per_step, within
from ..core.latents import Latents
from ..core.loading import Model
from ..core.loop import Step, denoise
from ..core.noise import Noise, NoiseSource
from ..core.schedule import Schedule
from ..core.solver import Solver
from ..schedulers.classes import SchedulerConfig
from ..schedulers.config import read_scheduler
from ..schedulers.faithful import DiffusersPLMS
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
from ..stages.noise import add_noise, noise, start_step, unit_noise
from ..stages.text import encode_text
from .chain import Denoising, ImageToImage, Inpaint, TextToImage

Hook = Callable[[Step], object]


@dataclass(frozen=True)
class Run:
    """The schedule and solver of one stage, cut to the steps it runs; ``whole`` is uncut."""

    whole: Schedule
    schedule: Schedule
    solver: Solver
    config: SchedulerConfig


def text_to_image(
    model: Model,
    spec: TextToImage,
    seeds: Sequence[int],
    stream: str = "",
    hooks: Sequence[Hook] = (),
    source: NoiseSource | None = None,
) -> Latents:
    """Pure noise to latents of what the prompt says."""
    run = plan_run(spec, model.scheduler)
    latents = noise(model, run.whole, spec.height, spec.width, seeds, stream=stream, source=source)
    cond, uncond = encode_prompts(model, spec)
    denoiser = guided(model, spec, run, cond, uncond)
    return denoise(denoiser, latents, run.schedule, run.solver, hooks, source)


def image_to_image(
    model: Model, spec: ImageToImage, start: Latents, hooks: Sequence[Hook] = (), source: NoiseSource | None = None
) -> Latents:
    """Noise clean latents to the strength's level and denoise them; or go on from a handoff's level."""
    model.space.require(start.space, f"The model {model.name}")
    run = plan_run(spec, model.scheduler, start.sigma if spec.start == "handoff" else None)
    latents = start if spec.start == "handoff" else add_noise(start, run.schedule, unit_noise(start, source))
    cond, uncond = encode_prompts(model, spec)
    denoiser = guided(model, spec, run, cond, uncond)
    return denoise(denoiser, latents, run.schedule, run.solver, hooks, source)


def inpaint(
    model: Model,
    spec: Inpaint,
    pictures: Sequence[Image.Image],
    mask: Image.Image,
    seeds: Sequence[int],
    stream: str = "",
    hooks: Sequence[Hook] = (),
    source: NoiseSource | None = None,
) -> Latents:
    """Repaint where the mask is white, with a UNet of 9 channels or, blending every step, of 4.

    One picture serves all seeds, or there is one per seed.
    """
    run = plan_run(spec, model.scheduler)
    source = source or Noise(tuple(seeds), stream)
    cond, uncond = encode_prompts(model, spec)
    for picture in pictures:
        require_same_size(picture, mask)
    start = noise(model, run.whole, mask.height, mask.width, seeds, stream=stream, source=source)
    if run.schedule.first or not model.inpaints:
        clean = encode_image(model, pictures, seeds=seeds, stream=stream, posterior=spec.posterior, source=source)
        unit = unit_noise(clean, source)
    if run.schedule.first:  # else all of it is repainted, and nothing of the picture may shine through
        start = add_noise(clean, run.schedule, unit)
    if model.inpaints:
        channels = inpaint_channels(model, pictures, mask, seeds=seeds, stream=stream,
            posterior=spec.posterior, downsample=spec.downsample, source=source,
        )  # fmt: skip
        cond, uncond = with_channels(cond, channels), with_channels(uncond, channels)
        return denoise(guided(model, spec, run, cond, uncond), start, run.schedule, run.solver, hooks, source)
    cells = latent_mask(mask, model.space, spec.downsample)
    known_at = known(clean, unit, run.schedule)
    pure = math.inf if run.schedule.first else run.schedule.sigmas[0]
    denoiser = keeping_known(guided(model, spec, run, cond, uncond), cells, known_at, pure)
    return denoise(denoiser, start, run.schedule, run.solver, [keep_known(cells, known_at), *hooks], source)


def plan_run(spec: Denoising, scheduler: Mapping[str, object], handoff_sigma: float | None = None) -> Run:
    """What a stage will run, from its options and the checkpoint's scheduler config alone.

    Raises:
        BadInput: strength, cuts or steps leave nothing to run; BadModel: options not honoured.
    """
    config = read_scheduler(scheduler, spec.solver, **spec.scheduler)
    whole = config.schedule(spec.steps)
    solver = config.solver(spec.steps, eta=spec.eta, faithful=spec.faithful)
    first, schedule = first_step(spec, whole, handoff_sigma), whole
    if first and spec.faithful and isinstance(solver, DiffusersPLMS) and handoff_sigma is None:
        schedule, solver = solver.started_at(whole, first)
    elif first:
        schedule = whole[first:]
    if spec.stop is not None:
        schedule = schedule[: max(0, whole.index(**spec.stop.given()) - first)]  # type: ignore[arg-type]
    if not len(schedule):
        raise BadInput(f"Stage {spec.name!r} has no step to run: it would start at step {first} and stop before it.")
    return Run(whole, schedule, solver, config)


def first_step(spec: Denoising, whole: Schedule, handoff_sigma: float | None = None) -> int:
    """The first step a stage runs: by its strength, its first_step, or where the handoff left off."""
    if handoff_sigma is not None:
        matches = [i for i, sigma in enumerate(whole.sigmas[:-1]) if abs(sigma - handoff_sigma) <= 1e-4 * sigma]
        if not matches:
            raise BadInput(
                f"Stage {spec.name!r} is handed latents at sigma {handoff_sigma:.4g}, which is no level of its schedule "
                f"({whole}): give both stages the same steps and solver."
            )
        return matches[0]
    if isinstance(spec, (ImageToImage, Inpaint)):
        if spec.first_step is not None:
            if spec.first_step >= len(whole):
                raise BadInput(f"first_step goes from 0 to {len(whole) - 1} here, got {spec.first_step}.")
            return spec.first_step
        default = 1.0 if isinstance(spec, Inpaint) else 0.8
        return start_step(len(whole), default if spec.strength is None else spec.strength, faithful=spec.faithful)
    return 0


def encode_prompts(model: Model, spec: Denoising) -> tuple[Conditioning, Conditioning]:
    """The prompt's and the negative prompt's conditioning; clip skip is the prompt's alone, as in diffusers."""
    cond = encode_text(model, spec.prompt, clip_skip=spec.clip_skip, chunks=spec.chunks)
    return cond, encode_text(model, spec.negative_prompt, chunks=spec.chunks)


def guided(model: Model, spec: Denoising, run: Run, cond: Conditioning, uncond: Conditioning) -> Denoiser:
    """The model's UNet under the stage's guidance."""
    network = UNetDenoiser(model.unet, run.config.kind)
    scale = guidance_scale(spec, run.whole)
    if not callable(scale) and scale <= 1.0:
        return conditioned(network, cond)
    return classifier_free(network, cond, uncond, scale, rescale=spec.guidance_rescale, batched=spec.guidance_batched)


def guidance_scale(spec: Denoising, whole: Schedule) -> GuidanceScale:
    """One scale, or one per step of the whole schedule."""
    if spec.guidance_interval is None and not isinstance(spec.guidance_scale, list):
        return spec.guidance_scale
    scales = spec.guidance_scale if isinstance(spec.guidance_scale, list) else [spec.guidance_scale] * len(whole)
    at = per_step(whole, scales)
    if spec.guidance_interval is None:
        return at
    inside = within(whole, *spec.guidance_interval, guidance_scale=math.inf)
    return lambda sigma: min(at(sigma), inside(sigma))
