"""Runs a chain: a thin reader over the stage functions, that loses nothing already made."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from PIL import Image, ImageOps

from ..core.errors import BadInput, Note, OutOfMemory, UnrolledError
from ..core.files import claim, require_writable, write_atomically
from ..core.latents import Latents
from ..core.loading import Model, Shelf
from ..core.loop import Step
from ..stages import finish
from ..stages.decode import decode
from ..stages.image import encode_image
from ..stages.inpaint import composite
from ..stages.pictures import read_mask, read_picture
from . import jobs
from .chain import Chain, Denoising, ImageToImage, Inpaint, Resize, Sharpen, Stage, TextToImage
from .plan import plan
from .record import encode, manifest, parameters

Watch = Callable[[Stage, Step], object]
"""Called after every step; a progress bar, say."""


@dataclass
class Output:
    """What a stage made: latents, or pictures, or both; pictures are decoded when first asked for."""

    model: Model | None = None
    latents: Latents | None = None
    made: list[Image.Image] = field(default_factory=list)
    tiled: bool | None = None

    @property
    def is_picture(self) -> bool:
        """Whether there is a picture to see: not for a run that was stopped while still noisy."""
        return bool(self.made) or (self.latents is not None and self.latents.is_clean)

    def pictures(self) -> list[Image.Image]:
        """As many as there are seeds."""
        if not self.made and self.model is not None and self.latents is not None:
            self.made = decode(self.model, self.latents, tiled=self.tiled)
        return self.made


@dataclass
class Result:
    """A finished run: the pictures of each stage, and the files written."""

    outputs: dict[str, Output] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def pictures(self) -> list[Image.Image]:
        """The last stage's, one per seed."""
        return list(self.outputs.values())[-1].pictures()


def run(chain: Chain, shelf: Shelf, folder: Path | None = None, watch: Watch | None = None) -> Result:
    """Run every stage and write what the chain asks for into ``folder`` (nothing is written without one).

    When a stage fails or is interrupted, the pictures of the stages before it are written, and an
    interrupted run's latents too, so that it can be taken up again. A batch that does not fit into
    memory is tried again in halves.

    Raises:
        UnrolledError: what went wrong, with the stage's name.
    """
    plan(chain, shelf)
    if folder is not None:
        require_writable(folder)
    result, last = Result(), list[Step]()
    try:
        return _run(chain, shelf, folder, watch, result, last)
    except OutOfMemory:
        if chain.batch == 1:
            _rescue(chain, result, last, folder)
            raise
    except (UnrolledError, KeyboardInterrupt):
        _rescue(chain, result, last, folder)
        raise
    half = chain.batch // 2
    first = run(chain.model_copy(update={"batch": half}), shelf, folder, watch)
    rest = chain.model_copy(update={"seed": chain.seed + half, "batch": chain.batch - half})
    second = run(rest, shelf, folder, watch)
    for name, output in second.outputs.items():
        if output.is_picture:
            first.outputs[name] = Output(made=first.outputs[name].pictures() + output.pictures())
    first.files += second.files
    first.notes += [f"The batch did not fit into memory and was run in parts of {half}.", *second.notes]
    return first


def _run(chain: Chain, shelf: Shelf, folder: Path | None, watch: Watch | None, result: Result, last: list[Step]) -> Result:
    """Fill ``result`` stage by stage; ``last`` holds the newest step of the stage under way."""
    film: list[Image.Image] = []
    with _noted(result.notes):
        for index, stage in enumerate(chain.stages):
            before = chain.before(index)
            began = time.perf_counter()
            with _named(stage):
                hooks = _hooks(chain, stage, shelf, watch, last, film)
                output = _stage(chain, index, shelf, result.outputs[before.name] if before else None, hooks)
                if output.is_picture and (chain.grid or index == len(chain.stages) - 1):
                    output.pictures()
            last.clear()
            result.outputs[stage.name] = output
            result.seconds[stage.name] = time.perf_counter() - began
        if folder is not None:
            _write(chain, result, folder, film)
    return result


def _stage(chain: Chain, index: int, shelf: Shelf, before: Output | None, hooks: list[jobs.Hook]) -> Output:
    stage, stream = chain.stages[index], _stream(chain, index)
    if isinstance(stage, Sharpen):
        return Output(made=[finish.sharpen(p, stage.percent, stage.radius) for p in _pictures(before)])
    if isinstance(stage, Resize):
        return Output(made=[finish.resize(p, stage.factor) for p in _pictures(before)])
    model = shelf.load(stage.model)
    if isinstance(stage, TextToImage):
        latents = jobs.text_to_image(model, stage, chain.seeds(), stream, hooks)
    elif isinstance(stage, ImageToImage):
        start = _start(chain, stage, model, before, stream)
        latents = jobs.image_to_image(model, stage, start, hooks)
    else:
        return _inpaint(chain, stage, model, before, stream, hooks)
    return Output(model, latents, tiled=stage.tiled)


def _stream(chain: Chain, index: int) -> str:
    """Every denoising stage draws its own noise; the first one what a script draws by default."""
    first = next((i for i, stage in enumerate(chain.stages) if isinstance(stage, Denoising)), 0)
    return "" if index == first else chain.stages[index].name


def _start(chain: Chain, stage: ImageToImage, model: Model, before: Output | None, stream: str) -> Latents:
    if stage.start == "handoff" and before is not None and before.latents is not None:
        # The same run goes on with its stream of noise; its solver's memory is good for the same weights only.
        same = before.model is not None and before.model.fingerprints["unet"] == model.fingerprints["unet"]
        return before.latents if same else replace(before.latents, history=())
    return _clean_latents(chain, stage, model, before, stream)


def _clean_latents(chain: Chain, stage: ImageToImage, model: Model, before: Output | None, stream: str) -> Latents:
    if stage.image is None and stage.via is None and before is not None and before.latents is not None:
        return replace(before.latents, stream=stream, history=())
    pictures = [_file(chain, stage, model)] if stage.image is not None else _pictures(before)
    return encode_image(model, pictures, seeds=chain.seeds(), stream=stream, posterior=stage.posterior)


def _inpaint(
    chain: Chain, stage: Inpaint, model: Model, before: Output | None, stream: str, hooks: list[jobs.Hook]
) -> Output:
    originals = [_file(chain, stage, model)] if stage.image is not None else _pictures(before)
    mask = read_mask(chain.folder / stage.mask)
    if stage.fit:
        mask = ImageOps.fit(mask, originals[0].size, Image.Resampling.LANCZOS)
    latents = jobs.inpaint(model, stage, originals, mask, chain.seeds(), stream, hooks)
    if not stage.composite or not latents.is_clean:
        return Output(model, latents, tiled=stage.tiled)
    painted = decode(model, latents, tiled=stage.tiled)
    kept = [composite(originals[i % len(originals)], p, mask, stage.mask_blur) for i, p in enumerate(painted)]
    return Output(model, made=kept)


def _file(chain: Chain, stage: ImageToImage | Inpaint, model: Model) -> Image.Image:
    picture = read_picture(chain.folder / str(stage.image))
    side = model.native_size
    return ImageOps.fit(picture, (side, side), Image.Resampling.LANCZOS) if stage.fit else picture


def _pictures(before: Output | None) -> list[Image.Image]:
    if before is None:
        raise BadInput("there is no picture to work on.")
    return before.pictures()


def _hooks(
    chain: Chain, stage: Stage, shelf: Shelf, watch: Watch | None, last: list[Step], film: list[Image.Image]
) -> list[jobs.Hook]:
    def remember(step: Step) -> None:
        last[:] = [step]

    hooks: list[jobs.Hook] = [remember]
    if watch is not None:
        hooks.append(lambda step: watch(stage, step))
    if chain.gif and isinstance(stage, Denoising):
        model = shelf.load(stage.model)
        hooks.append(lambda step: film.append(decode(model, step.preview[:1])[0]))
    return hooks


def _write(chain: Chain, result: Result, folder: Path, film: list[Image.Image], stem: str = "output") -> None:
    models = {output.model.name: output.model for output in result.outputs.values() if output.model is not None}
    for index, (seed, picture) in enumerate(zip(chain.seeds(), result.pictures, strict=True)):
        name = claim(folder, stem, ".json")
        facts = manifest(chain, seed, models, result.notes, result.seconds)
        text = parameters(chain, seed, picture.size, models)
        try:
            for ending in chain.formats:
                result.files.append(write_atomically(f"{name}.{ending}", encode(picture, ending, text, facts)))
            if chain.grid:
                seen = {name: output.pictures()[index] for name, output in result.outputs.items() if output.is_picture}
                sheet = finish.grid(list(seen.values()), columns=len(seen), labels=list(seen))
                result.files.append(write_atomically(f"{name}-grid.png", encode(sheet, "png", text, facts)))
            if chain.gif and index == 0:
                frames = [finish.resize(frame, size=picture.size) for frame in film]
                result.files.append(write_atomically(f"{name}.gif", finish.gif([*frames, picture])))
            write_atomically(f"{name}.json", json.dumps(facts, indent=1, ensure_ascii=False).encode())
        except BaseException:
            if not Path(f"{name}.json").stat().st_size:
                Path(f"{name}.json").unlink()
            raise


def _rescue(chain: Chain, result: Result, last: list[Step], folder: Path | None) -> None:
    """Write what is there before an error goes on up; a further error must not hide the first."""
    if folder is None:
        return
    finished = [output for output in result.outputs.values() if output.is_picture]
    if finished and finished[-1] is list(result.outputs.values())[-1]:
        with suppress(UnrolledError):
            _write(chain.model_copy(update={"grid": False, "gif": False}), result, folder, [], "unfinished")
    if last:
        with suppress(UnrolledError):
            path = claim(folder, "interrupted", ".safetensors").with_suffix(".safetensors")
            try:
                last[0].latents.save(path)
            except UnrolledError:
                path.unlink(missing_ok=True)
                raise
            result.files.append(path)


@contextmanager
def _named(stage: Stage) -> Iterator[None]:
    """Name the stage in whatever goes wrong in it."""
    try:
        yield
    except UnrolledError as error:
        raise type(error)(f"Stage {stage.name!r}: {error}") from error
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise OutOfMemory(_memory_sentence(stage)) from error
    except RuntimeError as error:
        if "alloc" in str(error) and "memory" in str(error):
            raise OutOfMemory(_memory_sentence(stage)) from error
        raise


def _memory_sentence(stage: Stage) -> str:
    return f"Stage {stage.name!r} ran out of memory: make the batch or the picture smaller, or use --dtype float16 on a GPU."


@contextmanager
def _noted(notes: list[str]) -> Iterator[None]:
    """Collect notes, and let every other warning through."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", Note)
        show = warnings.showwarning

        def collect(message: Warning | str, category: type[Warning], *rest: object, **more: object) -> None:
            if issubclass(category, Note):
                notes.append(str(message))
            else:
                show(message, category, *rest, **more)  # type: ignore[arg-type]

        warnings.showwarning = collect
        yield
