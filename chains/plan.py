"""What a chain will run, and every mistake in it, before a model is loaded."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from ..core.checkpoint import encoder_fingerprint, weight_files
from ..core.errors import BadChain, BadInput, BadModel, UnrolledError
from ..core.latents import CLEAN
from ..core.loading import Source, check_classes, find
from ..stages.pictures import read_mask, read_picture
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
        """Calls of the UNet for one image (guidance counts as one)."""
        if self.run is None:
            return 0
        per_step = int(getattr(self.run.solver, "evaluations", 1))
        last_is_first_order = per_step > 1 and self.run.schedule.sigmas[-1] == 0.0
        return len(self.run.schedule) * per_step - last_is_first_order

    @property
    def left_noisy(self) -> bool:
        """Whether what comes out still holds noise."""
        return self.run is not None and self.run.schedule.sigmas[-1] > CLEAN


def plan(chain: Chain, models: str = "miniature") -> list[StagePlan]:
    """Check a chain and say what each stage will run; reads configs and picture headers, no weights.

    Raises:
        BadChain: naming the stage and what is wrong with it.
    """
    plans: dict[str, StagePlan] = {}
    for index, stage in enumerate(chain.stages):
        before = chain.before(index)
        try:
            plans[stage.name] = _plan_stage(chain, stage, plans[before.name] if before else None, models)
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


def _plan_stage(chain: Chain, stage: Stage, before: StagePlan | None, models: str) -> StagePlan:
    if isinstance(stage, Sharpen | Resize):
        size = _pixels_of(stage.name, before)
        factor = stage.factor if isinstance(stage, Resize) else 1.0
        return StagePlan(stage, "pixels", (round(size[0] * factor), round(size[1] * factor)))
    source = find(stage.model, models, weights=False)
    check_classes(source)
    native, cell = source.sizes()
    if isinstance(stage, TextToImage):
        size = (stage.width or native, stage.height or native)
        _require_cells(size, cell)
        return _denoising(stage, source, "noise", size)
    size, takes, sigma = _input(chain, stage, before, source, native, models)
    _require_cells(size, cell)
    return _denoising(stage, source, takes, size, sigma)


def _denoising(stage: Denoising, source: Source, takes: str, size: tuple[int, int], sigma: float = 0.0) -> StagePlan:
    run = plan_run(stage, source.scheduler, sigma)
    guidance_scale(stage, run.whole)
    return StagePlan(stage, takes, size, run, tuple(_notes(stage, run)))  # type: ignore[arg-type]


def _input(
    chain: Chain, stage: ImageToImage | Inpaint, before: StagePlan | None, source: Source, native: int, models: str
) -> tuple[tuple[int, int], str, float]:
    """Size in pixels, how it is handed on, and the sigma it is at."""
    if stage.image is not None:
        picture = read_picture(chain.folder / stage.image)
        size = (native, native) if stage.fit else picture.size
        _require_mask(chain, stage, size)
        return size, f"{stage.image}{', fitted' if stage.fit else ''}", 0.0
    if before is None:
        raise BadInput('there is no picture to start from: give image = "file.png" or put a stage before it.')
    if isinstance(stage, ImageToImage) and stage.start == "handoff":
        if not before.left_noisy or before.run is None:
            raise BadInput('start = "handoff" needs a stage before it that stops early (stop = { steps_fraction = 0.8 }).')
        _require_same_space(stage, before, source, models)
        return before.size, "noisy latents", before.run.schedule.sigmas[-1]
    if before.left_noisy:
        raise BadInput(
            f'it is handed latents at sigma {_end(before):.3g}: give start = "handoff", or leave out stop before it.'
        )
    _require_mask(chain, stage, before.size)
    if isinstance(stage, Inpaint):
        return before.size, "pixels", 0.0
    if stage.via == "pixels" or before.run is None:
        return before.size, "pixels", 0.0
    _require_same_space(stage, before, source, models)
    return before.size, "latents", 0.0


def _require_mask(chain: Chain, stage: Denoising, size: tuple[int, int]) -> None:
    if isinstance(stage, Inpaint):
        mask = read_mask(chain.folder / stage.mask)
        if mask.size != size and not stage.fit:
            raise BadInput(
                f"the mask is {mask.width}x{mask.height} but the picture is {size[0]}x{size[1]}: "
                "they must be of one size, or say fit = true."
            )


def _notes(stage: Denoising, run: Run) -> Iterable[str]:
    if run.schedule.first and isinstance(stage, ImageToImage | Inpaint):
        yield f"runs {len(run.schedule)} of {len(run.whole)} steps, from sigma {run.schedule.sigmas[0]:.3g}"
    if stage.eta and stage.solver not in (None, "ddim"):
        yield f"eta has no effect with {stage.solver}"
    if not isinstance(stage.guidance_scale, list) and stage.guidance_scale <= 1.0:
        yield "guidance off" + (", the negative prompt has no effect" if stage.negative_prompt else "")


def _require_same_space(stage: Denoising, before: StagePlan, source: Source, models: str) -> None:
    if not isinstance(before.stage, Denoising):
        return
    prints = [_encoder(s) for s in (source, find(before.stage.model, models, weights=False))]
    if None not in prints and prints[0] != prints[1]:
        raise BadInput(
            f"{stage.model} and {before.stage.model} have different VAEs, so latents cannot be handed on: "
            'say via = "pixels" to decode and encode in between.'
        )


def _encoder(source: Source) -> str | None:
    """The encoder's fingerprint if its weights are on this disk."""
    folder: Path = source.folders["vae"]
    return encoder_fingerprint(weight_files(folder)) if any(folder.glob("*.safetensors")) else None


def _pixels_of(name: str, before: StagePlan | None) -> tuple[int, int]:
    if before is None:
        raise BadInput("there is no picture to work on: put a stage before it.")
    if before.left_noisy:
        raise BadInput(
            f"it is handed latents at sigma {_end(before):.3g}, which are no picture yet: leave out stop before it."
        )
    return before.size


def _require_cells(size: tuple[int, int], cell: int) -> None:
    if any(side % cell or side < cell for side in size):
        down, up = [side // cell * cell for side in size], [-(-side // cell) * cell for side in size]
        raise BadInput(
            f"{size[0]}x{size[1]} does not fit: sides must be multiples of {cell}, "
            f"the nearest are {down[0]}x{down[1]} and {up[0]}x{up[1]}."
        )


def _end(plan_: StagePlan) -> float:
    return plan_.run.schedule.sigmas[-1] if plan_.run else 0.0
