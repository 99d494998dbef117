"""What a chain will run, and every mistake in it, before a model is loaded."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..core.checkpoint import TOKENIZERS, encoder_fingerprint
from ..core.errors import BadChain, BadInput, BadModel, Note, UnrolledError
from ..core.latents import Latents, LatentSpace
from ..core.loading import Shelf
from ..core.loop import denoise
from ..core.memory import peak
from ..core.prediction import Prediction
from ..core.schedule import Schedule
from ..core.solver import Solver
from ..core.source import Source, enlarges
from ..core.weights import has_weights
from ..stages.pictures import read_mask, read_picture, require_size
from ..stages.upscale import require_enlargeable
from .chain import (
    Chain,
    Denoising,
    FromPicture,
    ImageToImage,
    Inpaint,
    PriorOptions,
    Resize,
    Sharpen,
    Stage,
    TextToImage,
)
from .defaults import filled
from .fit import require_fit, require_prior
from .runs import Run, guidance_scale, plan_run


@dataclass(frozen=True)
class StagePlan:
    """One stage of a plan.

    Args:
        stage: with its system's usual values filled in.
        takes: what it is handed, in words.
        size: width and height in pixels of what comes out.
        run: schedule and solver, for stages that denoise.
        decodes: whether it makes the stage before decode its latents.
        continues: whether it goes on with the very run of the stage before: same weights, schedule and solver.
        memory: bytes that its model takes of the device at the worst moment, where the weights are on this disk.
    """

    stage: Stage
    takes: str
    size: tuple[int, int]
    run: Run | None = None
    notes: tuple[str, ...] = field(default=())
    decodes: bool = False
    continues: bool = False
    memory: int | None = None

    @property
    def evaluations(self) -> int:
        """Calls of the UNet for one image (a guided one counts once), counted by running the solver on nothing."""
        repeats = self.stage.repeat if isinstance(self.stage, ImageToImage) else 1
        return repeats * count_evaluations(self.run.solver, self.run.schedule) if self.run else 0

    @property
    def left_noisy(self) -> bool:
        """Whether what comes out still holds noise."""
        return self.run is not None and self.run.schedule.sigmas[-1] > self.run.whole.sigmas[-1]


@dataclass(frozen=True)
class _Handed:
    """What a stage is handed."""

    size: tuple[int, int]
    takes: str
    sigma: float | None = None
    decodes: bool = False


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


def pictures_wanted(chain: Chain, plans: Sequence[StagePlan]) -> set[str]:
    """The stages whose pictures somebody looks at; the others' latents are never decoded."""
    last = plans[-1].stage.name
    if chain.grid or chain.gif == "stages":
        return {plan.stage.name for plan in plans if not plan.left_noisy}
    takers = (chain.before(index) for index, plan in enumerate(plans) if plan.decodes)
    return {last, *(stage.name for stage in takers if stage is not None)}


def _plan_stage(chain: Chain, stage: Stage, before: StagePlan | None, shelf: Shelf) -> StagePlan:
    if isinstance(stage, Sharpen | Resize):
        size = _pixels_of(before)
        factor = stage.factor if isinstance(stage, Resize) else 1.0
        return StagePlan(stage, "pixels", (round(size[0] * factor), round(size[1] * factor)), decodes=True)
    source = shelf.find(stage.model, stage.borrowed, weights=False, allow_pickle=stage.allow_pickle)
    require_fit(stage, source)
    if isinstance(stage, Denoising) and source.system == "kandinsky":
        require_prior(shelf.find((stage.prior or PriorOptions()).model, weights=False))
    stage = filled(stage, source.system)
    native, cell = source.sizes()
    if isinstance(stage, TextToImage):
        handed = _Handed((stage.width or native, stage.height or native), "noise")
    else:
        handed = _input(chain, stage, before, source, native, shelf)
    require_size(handed.size, cell, "The size")
    if source.system == "x2":
        require_enlargeable(handed.size, cell)
    run = plan_run(stage, source.scheduler, handed.sigma)
    guidance_scale(stage, run.whole)
    stage = stage.model_copy(update={"solver": run.config.name})
    factor = enlarges(source.system)
    size = (factor * handed.size[0], factor * handed.size[1])
    continues = handed.sigma is not None and _continues(stage, run, before)
    takes = handed.takes if handed.sigma is None or continues else f"{handed.takes}; the solver starts afresh"
    notes = tuple(_notes(stage, run, size, native))
    memory = _memory(source, shelf, size, chain.batch)
    return StagePlan(stage, takes, size, run, notes, handed.decodes, continues, memory)


def _input(chain: Chain, stage: FromPicture, before: StagePlan | None, source: Source, native: int, shelf: Shelf) -> _Handed:
    """What a stage that starts from a picture or latents is handed."""
    noisy = isinstance(stage, ImageToImage) and stage.start != "strength"
    if stage.image is not None:
        side = native // enlarges(source.system)
        size = (side, side) if stage.fit else read_picture(chain.folder / stage.image).size
        _require_mask(chain, stage, size)
        return _Handed(size, f"{stage.image}{', fitted' if stage.fit else ''}")
    if stage.latents is not None:
        held = Latents.load(chain.folder / stage.latents)
        if not noisy:
            held.require_clean("start from")
        return _Handed((held.size[1], held.size[0]), stage.latents, held.sigma if noisy else None)
    if before is None:
        raise BadInput('there is no picture to start from: give image = "file.png" or put a stage before it.')
    if noisy:
        if not before.left_noisy or before.run is None:
            raise BadInput('start = "handoff" needs a stage before it that stops early (stop = { steps_fraction = 0.8 }).')
        _require_same_space(stage, before, source, shelf)
        return _Handed(before.size, "noisy latents", before.run.schedule.sigmas[-1])
    if before.left_noisy:
        raise BadInput(
            f'it is handed latents at sigma {_end(before):.3g}: give start = "handoff", or leave out stop before it.'
        )
    _require_mask(chain, stage, before.size)
    if isinstance(stage, Inpaint) or source.system == "x4" or stage.via == "pixels" or before.run is None:
        return _Handed(before.size, "pixels", decodes=True)
    _require_same_space(stage, before, source, shelf)
    composited = isinstance(before.stage, Inpaint) and before.stage.composite
    return _Handed(before.size, "pixels" if composited else "latents", decodes=composited)


def _memory(source: Source, shelf: Shelf, size: tuple[int, int], batch: int) -> int | None:
    """What a model takes of the device; raises BadInput if that is more than there is."""
    if not all(has_weights(source.part(part)) for part in source.parts if part not in TOKENIZERS):
        return None
    return peak(shelf.placement(source, size, batch).values())


def _continues(stage: Denoising, run: Run, before: StagePlan | None) -> bool:
    """Whether two stages are two parts of one run, so that the solver's memory and the noise go on."""
    if before is None or before.run is None or not isinstance(before.stage, Denoising):
        return False
    same_weights = (before.stage.model, before.stage.borrowed) == (stage.model, stage.borrowed)
    return same_weights and before.run.whole == run.whole and before.run.solver == run.solver


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
    if isinstance(stage.guidance_scale, float) and stage.guidance_scale <= 1.0:
        yield "guidance off" + (", the negative prompt has no effect" if stage.negative_prompt else "")


def _require_same_space(stage: Denoising, before: StagePlan, source: Source, shelf: Shelf) -> None:
    if not isinstance(before.stage, Denoising):
        return
    other = shelf.find(before.stage.model, before.stage.borrowed, weights=False)
    prints = [_encoder(s) for s in (source, other)]
    if None not in prints and prints[0] != prints[1]:
        raise BadInput(
            f"{stage.model} and {before.stage.model} have different VAEs, so latents cannot be handed on: "
            'say via = "pixels" to decode and encode in between.'
        )


def _encoder(source: Source) -> str | None:
    """The encoder's fingerprint if its weights are on this disk."""
    part = source.part(source.vae)
    return encoder_fingerprint(part) if has_weights(part) else None


def _pixels_of(before: StagePlan | None) -> tuple[int, int]:
    if before is None:
        raise BadInput("there is no picture to work on: put a stage before it.")
    if before.left_noisy:
        raise BadInput(
            f"it is handed latents at sigma {_end(before):.3g}, which are no picture yet: leave out stop before it."
        )
    return before.size


def _end(plan_: StagePlan) -> float:
    return plan_.run.schedule.sigmas[-1] if plan_.run else 0.0
