"""What one denoising stage of a chain does with what it is handed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypedDict

from PIL import Image, ImageOps

from ..core.errors import BadInput
from ..core.latents import Latents
from ..core.loading import Model
from ..core.loop import Point
from ..core.noise import NoiseSource
from ..core.source import enlarges
from ..stages.decode import decode
from ..stages.image import encode_image
from ..stages.inpaint import composite
from ..stages.pictures import read_mask, read_picture
from . import jobs
from .chain import FromPicture, ImageToImage, Inpaint, TextToImage, Upscale
from .companions import Beside
from .outputs import Output
from .plan import StagePlan
from .prompts import Pair


@dataclass(frozen=True)
class Task:
    """One denoising stage and everything it works with.

    Args:
        folder: what file names are relative to.
        before: what the stage it comes after made.
        stream: of the seeds' noise; ``source`` gives other numbers in its place.
        prompts: ready-made conditioning, Kandinsky's.
        inputs: is filled with the picture files that were read.
        frame: called with what every repetition but the last has made.
        pictures: decodes latents of this stage, at any step of it and after it.
        since: where the stage was left, to go on from there.
        beside: its ControlNets and its IP-Adapter.
    """

    plan: StagePlan
    model: Model
    folder: Path
    before: Output | None
    seeds: Sequence[int]
    stream: str
    source: NoiseSource | None
    prompts: Pair | None
    hooks: Sequence[jobs.Hook]
    inputs: dict[str, Image.Image]
    frame: Callable[[Latents], object]
    pictures: Callable[[Latents], list[Image.Image]]
    since: Point | None = None
    beside: Beside | None = None


def perform(task: Task) -> Latents | list[Image.Image]:
    """Latents, or the pictures of an inpainting whose kept pixels were put back."""
    stage = task.plan.stage
    if isinstance(stage, TextToImage):
        return jobs.text_to_image(task.model, stage, task.seeds, task.stream, beside=task.beside, **_common(task))
    if isinstance(stage, ImageToImage):
        return _image_to_image(task, stage)
    if isinstance(stage, Inpaint):
        return _inpaint(task, stage)
    assert isinstance(stage, Upscale)
    small = _pictures(task, stage) if task.model.system == "x4" else _clean(task, stage)
    return jobs.upscale(task.model, stage, small, task.seeds, task.stream, **_common(task))


class _Common(TypedDict):
    hooks: Sequence[jobs.Hook]
    source: NoiseSource | None
    prompts: Pair | None
    since: Point | None


def _common(task: Task) -> _Common:
    """What every kind of stage takes."""
    return {"hooks": task.hooks, "source": task.source, "prompts": task.prompts, "since": task.since}


def _image_to_image(task: Task, stage: ImageToImage) -> Latents:
    if task.since is not None and stage.start == "strength":
        latents = task.since.latents
        if stage.image is not None:
            _pictures(task, stage)  # it went in all the same, and the manifest tells of it
    else:
        latents = _clean(task, stage) if stage.start == "strength" else _noisy(task, stage)
    streams = [task.stream, *(f"{task.stream}/{count}" for count in range(1, stage.repeat))]
    if stage.repeat > 1 and task.since is not None:  # each repetition draws from a stream of its own
        streams = streams[streams.index(task.since.latents.stream) :]
    for count, stream in enumerate(streams):
        if count:
            task.frame(latents)
            task = replace(task, since=None)
            latents = latents.handed_on(stream)
        latents = jobs.image_to_image(task.model, stage, latents, beside=task.beside, **_common(task))
    return latents


def _inpaint(task: Task, stage: Inpaint) -> Latents | list[Image.Image]:
    originals = _pictures(task, stage)
    mask = read_mask(task.folder / stage.mask)
    if stage.fit:
        mask = ImageOps.fit(mask, originals[0].size, Image.Resampling.LANCZOS)
    task.inputs[stage.mask] = mask
    latents = jobs.inpaint(task.model, stage, originals, mask, task.seeds, task.stream, beside=task.beside, **_common(task))
    if not stage.composite or not latents.is_clean:
        return latents
    painted = task.pictures(latents)
    return [composite(originals[i % len(originals)], p, mask, stage.mask_blur) for i, p in enumerate(painted)]


def _noisy(task: Task, stage: ImageToImage) -> Latents:
    """The latents a stopped run left; its noise and its solver's memory go on only in the same run."""
    latents = _read_latents(task, stage) if stage.latents is not None else task.before.latents if task.before else None
    if latents is None:
        raise BadInput("there are no latents to go on from.")
    return latents if task.plan.continues else latents.handed_on(task.stream)


def _clean(task: Task, stage: FromPicture) -> Latents:
    """Clean latents to start from: handed on, read, or encoded."""
    held = _read_latents(task, stage) if stage.latents is not None else None
    if stage.image is None and stage.via is None and task.before is not None:
        held = held or task.before.latents
    if held is not None:
        return held.handed_on(task.stream)
    pictures = _pictures(task, stage)
    return encode_image(
        task.model, pictures, seeds=task.seeds, stream=task.stream, posterior=stage.posterior, source=task.source
    )


def _read_latents(task: Task, stage: FromPicture) -> Latents:
    """A latents file, of as many images as there are seeds, or of one for all."""
    latents, count = Latents.load(task.folder / str(stage.latents), task.model.device), len(task.seeds)
    if len(latents) == count:
        return replace(latents, seeds=tuple(task.seeds))
    return replace(latents, x=latents.x.expand(count, -1, -1, -1), seeds=tuple(task.seeds), history=())


def _pictures(task: Task, stage: FromPicture) -> list[Image.Image]:
    """The pictures a stage starts from."""
    if stage.latents is not None:
        return decode(task.model, _read_latents(task, stage), tiled=stage.tiled)
    if stage.image is None:
        return task.before.pictures() if task.before is not None else []
    picture = read_picture(task.folder / stage.image)
    if stage.fit:
        side = task.model.native_size // enlarges(task.model.system)
        picture = ImageOps.fit(picture, (side, side), Image.Resampling.LANCZOS)
    task.inputs[stage.image] = picture
    return [picture]
