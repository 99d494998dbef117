"""Whether a stage and its model go together, and whether every option it was given has an effect."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ..core.errors import BadInput
from ..core.source import Source
from ..schedulers.config import read_scheduler
from ..stages.pictures import read_picture
from ..stages.weights import parse_weights
from .chain import Denoising, Inpaint, PriorOptions, Upscale


def require_fit(stage: Denoising, source: Source) -> None:
    """Raise BadInput where the model cannot do what the stage is to do, or an option would have no effect."""
    for wrong in _unfit(stage, source):
        raise BadInput(wrong)
    for option in _idle(stage, source):
        raise BadInput(f"{option} has no effect with {stage.model}: leave it out, or take another model.")
    for prompt in stage.prompts if stage.prompt_weights else ():
        parse_weights(prompt)


def require_prior(stage: Denoising, prior: Source | None, folder: Path) -> None:
    """Raise unless Kandinsky's prior, where there is to be one, is one and can do what it is to do."""
    if prior is None:
        return
    if prior.system != "prior":
        raise BadInput(f"{prior.name} is no prior: use kandinsky-2.2-prior, or a folder with a prior in it.")
    options = stage.prior or PriorOptions()
    read_scheduler(prior.scheduler).schedule(options.steps)
    for part in options.mix:
        if part.image is not None:
            read_picture(folder / part.image)


def _unfit(stage: Denoising, source: Source) -> Iterator[str]:
    upscaler = source.system in ("x2", "x4")
    if source.system == "prior":
        yield f"{stage.model} is a prior, which makes no picture: name a Kandinsky decoder as the model."
    elif isinstance(stage, Upscale) and not upscaler:
        yield f"{stage.model} is no upscaler: use x2-latent-upscaler or x4-upscaler."
    elif upscaler and not isinstance(stage, Upscale):
        yield f'{stage.model} is an upscaler, which cannot do {stage.do}: say do = "upscale".'  # type: ignore[attr-defined]
    elif source.system == "x4" and isinstance(stage, Upscale) and (stage.noise_level or 0) > _most_noise(source):
        yield f"noise_level goes from 0 to {_most_noise(source)} with {stage.model}, got {stage.noise_level}."
    elif stage.clip_skip >= (layers := _layers(source)) > 0:
        yield f"clip_skip goes from 0 to {layers - 1} with the text encoder of {stage.model}, got {stage.clip_skip}."
    elif not isinstance(stage, Inpaint | Upscale) and source.config("unet").get("in_channels", 4) == 9:
        yield f'{stage.model} is an inpainting model: say do = "inpaint", or take another one.'


def _idle(stage: Denoising, source: Source) -> Iterator[str]:
    """Options given that this system does not look at."""
    two = "text_encoder" in source.parts and "text_encoder_2" in source.parts
    given = {
        "prior": (stage.prior, source.system == "kandinsky"),
        "size": (stage.size, source.system == "sdxl"),
        "negative_size": (stage.negative_size, source.system == "sdxl"),
        "prompt_2": (stage.prompt_2, two),
        "negative_prompt_2": (stage.negative_prompt_2, two),
        "clip_skip": (stage.clip_skip, source.system != "kandinsky"),
        "chunks": (stage.chunks, source.system != "kandinsky"),
        "prompt_weights": (stage.prompt_weights, source.system != "kandinsky"),
        "embeddings": (stage.embeddings, source.system != "kandinsky"),
        "control": (stage.control, source.system in ("sd", "sdxl")),
        "image_prompt": (stage.image_prompt, source.system in ("sd", "sdxl")),
    }
    if isinstance(stage, Upscale):
        given["noise_level"] = (stage.noise_level, source.system == "x4")
    yield from (name for name, (value, heeded) in given.items() if value and not heeded)


def _most_noise(source: Source) -> int:
    return int(source.index.get("max_noise_level", 350))


def _layers(source: Source) -> int:
    """How many of its text encoders' layers can be left out, and one more; 0 without a text encoder."""
    counts = [
        source.config(part)["num_hidden_layers"] for part in ("text_encoder", "text_encoder_2") if part in source.parts
    ]
    return min(counts, default=0) - (source.system == "sdxl")
