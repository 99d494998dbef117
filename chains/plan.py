"""What a chain will run, and every mistake in it, before a model is loaded."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..core.checkpoint import encoder_fingerprint, weight_files
from ..core.errors import BadChain, BadInput, BadModel, Note, UnrolledError
from ..core.latents import Latents, LatentSpace
from ..core.loading import Shelf
from ..core.loop import denoise
from ..core.prediction import Prediction
from ..core.schedule import Schedule
from ..core.solver import Solver
from ..core.source import Source, check_classes
from ..stages.pictures import read_mask, read_picture, require_size
from .chain import Chain, Denoising, ImageToImage, Inpaint, Resize, Sharpen, Stage, TextToImage
from .jobs import Run, guidance_scale, plan_run


@dataclass(frozen=True)
class StagePlan:
    """One stage of a plan.

    Args:
        takes: what it is handed, in words.
        size: width and height in pixels of what comes out.
        run: schedule and solver, for stages that denoise.
    """

    stage: Stage
    takes: str
    size: tuple[int, int]
    run: Run | None = None
    notes: tuple[str, ...] = field(default=())

    @property
    def evaluations(self) -> int:
        """Calls of the UNet for one image (a guided one counts once), counted by running the solver on nothing."""
        return count_evaluations(self.run.solver, self.run.schedule) if self.run else 0

    @property
    def left_noisy(self) -> bool:
        """Whether what comes out still holds noise."""
        return self.run is not None and self.run.schedule.sigmas[-1] > self.run.whole.sigmas[-1]


def count_evaluations(solver: Solver, schedule: Schedule) -> int:
    """How often a solver, anybody's, calls the denoiser along a schedule."""
    calls: list[float] = []

    def nothing(x: Tensor, sigma: float, timestep: float) -> Prediction:
        calls.append(sigma)
        return Prediction.from_x0(torch.zeros_like(x), x, sigma)

    pixel = LatentSpace("none", channels=1, downscale=1, scaling=1.0, fingerprint="")
    start = Latents(torch.zeros(1, 1, 1, 1), pixel, schedule.sigmas[0], seeds=(0,))
    denoise(nothing, start, schedule, solver)
    return len(calls)


def plan(chain: Chain, shelf: Shelf) -> list[StagePlan]:
    """Check a chain and say what each stage will run; reads configs and picture headers, no weights.

    Raises:
        BadChain: naming the stage and what is wrong with it.
    """
    plans: dict[str, StagePlan] = {}
    for index, stage in enumerate(chain.stages):
        before = chain.before(index)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Note)  # the run tells
                plans[stage.name] = _plan_stage(chain, stage, plans[before.name] if before else None, shelf)
        except UnrolledError as error:
            wrong = type(error) if isinstance(error, BadModel) else BadChain
            raise wrong(f"Stage {stage.name!r}: {error}") from error
    last = plans[chain.stages[-1].name]
    if last.left_noisy:
        raise BadChain(
            f"Stage {last.stage.name!r} is the last but stops at sigma {_end(last):.3g}, which is still noise: "
            'let a stage with start = "handoff" go on, or leave stop out.'
        )
    return list(plans.values())


def _plan_stage(chain: Chain, stage: Stage, before: StagePlan | None, shelf: Shelf) -> StagePlan:
    if isinstance(stage, Sharpen | Resize):
        size = _pixels_of(stage.name, before)
        factor = stage.factor if isinstance(stage, Resize) else 1.0
        return StagePlan(stage, "pixels", (round(size[0] * factor), round(size[1] * factor)))
    source = shelf.find(stage.model, weights=False)
    check_classes(source)
    native, cell = source.sizes()
    if isinstance(stage, TextToImage):
        size = (stage.width or native, stage.height or native)
        require_size(size, cell, "The size")
        return _denoising(stage, source, "noise", size)
    size, takes, sigma = _input(chain, stage, before, source, native, shelf)
    require_size(size, cell, "The size")
    return _denoising(stage, source, takes, size, sigma)


def _denoising(stage: Denoising, source: Source, takes: str, size: tuple[int, int], sigma: float | None = None) -> StagePlan:
    run = plan_run(stage, source.scheduler, sigma)
    guidance_scale(stage, run.whole)
    return StagePlan(stage, takes, size, run, tuple(_notes(stage, run, size, source.sizes()[0])))  # type: ignore[arg-type]


def _input(
    chain: Chain, stage: ImageToImage | Inpaint, before: StagePlan | None, source: Source, native: int, shelf: Shelf
) -> tuple[tuple[int, int], str, float | None]:
    """Size in pixels, how it is handed on, and the sigma of a handoff."""
    if stage.image is not None:
        picture = read_picture(chain.folder / stage.image)
        size = (native, native) if stage.fit else picture.size
        _require_mask(chain, stage, size)
        return size, f"{stage.image}{', fitted' if stage.fit else ''}", None
    if before is None:
        raise BadInput('there is no picture to start from: give image = "file.png" or put a stage before it.')
    if isinstance(stage, ImageToImage) and stage.start == "handoff":
        if not before.left_noisy or before.run is None:
            raise BadInput('start = "handoff" needs a stage before it that stops early (stop = { steps_fraction = 0.8 }).')
        _require_same_space(stage, before, source, shelf)
        same = isinstance(before.stage, Denoising) and before.stage.model == stage.model
        takes = "noisy latents" if same else "noisy latents; the solver starts afresh"
        return before.size, takes, before.run.schedule.sigmas[-1]
    if before.left_noisy:
        raise BadInput(
            f'it is handed latents at sigma {_end(before):.3g}: give start = "handoff", or leave out stop before it.'
        )
    _require_mask(chain, stage, before.size)
    if isinstance(stage, Inpaint):
        return before.size, "pixels", None
    if stage.via == "pixels" or before.run is None:
        return before.size, "pixels", None
    _require_same_space(stage, before, source, shelf)
    return before.size, "latents", None


def _require_mask(chain: Chain, stage: Denoising, size: tuple[int, int]) -> None:
    if isinstance(stage, Inpaint):
        mask = read_mask(chain.folder / stage.mask)
        if mask.size != size and not stage.fit:
            raise BadInput(
                f"the mask is {mask.width}x{mask.height} but the picture is {size[0]}x{size[1]}: "
                "they must be of one size, or say fit = true."
            )


def _notes(stage: Denoising, run: Run, size: tuple[int, int], native: int) -> Iterable[str]:
    if max(size) > 2 * native:
        yield f"{size[0]}x{size[1]} is far above the model's native {native} px: take fit = true or a smaller size"
    if run.schedule.first and isinstance(stage, ImageToImage | Inpaint):
        yield f"runs {len(run.schedule)} of {len(run.whole)} steps, from sigma {run.schedule.sigmas[0]:.3g}"
    if not isinstance(stage.guidance_scale, list) and stage.guidance_scale <= 1.0:
        yield "guidance off" + (", the negative prompt has no effect" if stage.negative_prompt else "")


def _require_same_space(stage: Denoising, before: StagePlan, source: Source, shelf: Shelf) -> None:
    if not isinstance(before.stage, Denoising):
        return
    prints = [_encoder(s, shelf.variant) for s in (source, shelf.find(before.stage.model, weights=False))]
    if None not in prints and prints[0] != prints[1]:
        raise BadInput(
            f"{stage.model} and {before.stage.model} have different VAEs, so latents cannot be handed on: "
            'say via = "pixels" to decode and encode in between.'
        )


def _encoder(source: Source, variant: str | None) -> str | None:
    """The encoder's fingerprint if its weights are on this disk."""
    folder: Path = source.folders["vae"]
    return encoder_fingerprint(weight_files(folder, variant)) if any(folder.glob("*.safetensors")) else None


def _pixels_of(name: str, before: StagePlan | None) -> tuple[int, int]:
    if before is None:
        raise BadInput("there is no picture to work on: put a stage before it.")
    if before.left_noisy:
        raise BadInput(
            f"it is handed latents at sigma {_end(before):.3g}, which are no picture yet: leave out stop before it."
        )
    return before.size


def _end(plan_: StagePlan) -> float:
    return plan_.run.schedule.sigmas[-1] if plan_.run else 0.0
