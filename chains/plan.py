"""What a chain will run, and every mistake in it, before a model is loaded."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from ..core.checkpoint import TOKENIZERS
from ..core.errors import BadChain, BadModel, Note, UnrolledError
from ..core.guidance import GuidanceScale
from ..core.loading import Shelf
from ..core.loop import Step
from ..core.memory import Mode, peak
from ..core.solver import History
from ..core.source import Source, enlarges
from ..core.weights import Part, has_weights
from .chain import Chain, Denoising, FromPicture, ImageToImage, Inpaint, PriorOptions, Resize, Sharpen, Stage, Upscale
from .changes import Changes, find_changes
from .changes import notes as of_changes
from .companions import Companions, find_companions
from .defaults import filled
from .fit import require_fit, require_prior
from .handed import pixels_of, what_is_handed
from .runs import Run, guidance_scale, plan_run
from .trace import trace


@dataclass(frozen=True)
class StagePlan:
    """One stage of a plan.

    Args:
        stage: with its system's usual values filled in.
        takes: what it is handed, in words.
        size: width and height in pixels of what comes out.
        run: schedule and solver, for stages that denoise.
        decodes: whether it makes the stage before decode its latents.
        goes_on_from: the stage whose very run it goes on with: same weights, schedule and solver.
        memory: bytes that its model takes of the device at the worst moment, where the weights are on this disk.
        mode: where its model lives while it is needed, likewise.
        source: where its model lies; ``prior`` likewise, Kandinsky's.
        changes: which LoRAs and learned words are on its model.
        companions: where its ControlNets and its IP-Adapter lie.
    """

    stage: Stage
    takes: str
    size: tuple[int, int]
    run: Run | None = None
    notes: tuple[str, ...] = field(default=())
    decodes: bool = False
    goes_on_from: StagePlan | None = None
    memory: int | None = None
    mode: Mode | None = None
    source: Source | None = None
    prior: Source | None = None
    changes: Changes = field(default_factory=Changes)
    companions: Companions = field(default_factory=Companions)

    @property
    def continues(self) -> bool:
        """Whether it is the rest of a run, so that the noise and the solver's memory go on."""
        return self.goes_on_from is not None

    @property
    def history(self) -> History:
        """What its solver remembers at its first step: as many points as it will, of nothing."""
        return self.goes_on_from.trace[-1].history if self.goes_on_from else ()

    @cached_property
    def trace(self) -> list[Step]:
        """Its steps on a network that says nothing; once, however often it is repeated."""
        return trace(self.run.schedule, self.run.solver, self.history) if self.run else []

    @property
    def reads_files(self) -> bool:
        """Whether pictures or latents go into it from files."""
        stage = self.stage
        named = isinstance(stage, FromPicture) and (stage.image or stage.latents or isinstance(stage, Inpaint))
        mixed = isinstance(stage, Denoising) and stage.prior and any(part.image for part in stage.prior.mix)
        return bool(named or mixed or (isinstance(stage, Denoising) and (stage.control or stage.image_prompt)))

    @property
    def on_disk(self) -> bool:
        """Whether all weights that it needs are on this disk."""
        sources = [source for source in (self.source, self.prior) if source is not None]
        parts = [source.part(name) for source in sources for name in source.parts if name not in TOKENIZERS]
        return all(has_weights(part) for part in (*parts, *self.companions.parts))

    @property
    def repeats(self) -> int:
        """How often its steps are run."""
        return self.stage.repeat if isinstance(self.stage, ImageToImage) else 1

    @property
    def evaluations(self) -> int:
        """Calls of the UNet for one image (a guided one counts once)."""
        return self.repeats * sum(len(step.predictions) for step in self.trace)

    @cached_property
    def guidance(self) -> GuidanceScale:
        """The guidance scale, or that at a noise level; 1 or below is no guidance."""
        return guidance_scale(self.stage, self.run.whole) if self.run and isinstance(self.stage, Denoising) else 1.0

    def guidance_at(self, sigma: float) -> float:
        """The guidance scale at a noise level."""
        return self.guidance(sigma) if callable(self.guidance) else self.guidance

    @property
    def end(self) -> float:
        """The noise level of what comes out."""
        return self.run.schedule.sigmas[-1] if self.run else 0.0

    @property
    def left_noisy(self) -> bool:
        """Whether what comes out still holds noise."""
        return self.run is not None and self.run.schedule.sigmas[-1] > self.run.whole.sigmas[-1]


def plan(chain: Chain, shelf: Shelf, *, weights: bool = False) -> list[StagePlan]:
    """Check a chain and say what each stage will run; reads configs and picture headers, no weights.

    Args:
        weights: fetch the weights from the hub too, so that the plan can be run.

    Raises:
        BadChain: naming the stage and what is wrong with it.
    """
    found = dict[tuple[object, ...], Source]()

    def find(name: str, borrowed: Mapping[str, str] | None = None, allow_pickle: bool = False) -> Source:
        key = (name, *sorted((borrowed or {}).items()), allow_pickle)
        if key not in found:
            found[key] = shelf.find(name, borrowed, weights=weights, allow_pickle=allow_pickle)
        return found[key]

    plans: dict[str, StagePlan] = {}
    for index, stage in enumerate(chain.stages):
        before = chain.before(index)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Note)  # the run tells
                plans[stage.name] = _plan_stage(chain, stage, plans[before.name] if before else None, shelf, find, weights)
        except UnrolledError as error:
            wrong = type(error) if isinstance(error, BadModel) else BadChain
            raise wrong(f"Stage {stage.name!r}: {error}") from error
    last = plans[chain.stages[-1].name]
    if last.left_noisy:
        raise BadChain(
            f"Stage {last.stage.name!r} is the last but stops at sigma {last.end:.3g}, which is still noise: "
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


def _plan_stage(
    chain: Chain, stage: Stage, before: StagePlan | None, shelf: Shelf, find: Callable[..., Source], weights: bool
) -> StagePlan:
    if isinstance(stage, Sharpen | Resize):
        size = pixels_of(before)
        factor = stage.factor if isinstance(stage, Resize) else 1.0
        return StagePlan(stage, "pixels", (round(size[0] * factor), round(size[1] * factor)), decodes=True)
    source = find(stage.model, stage.borrowed, stage.allow_pickle)
    prior = find((stage.prior or PriorOptions()).model) if source.system == "kandinsky" else None
    require_fit(stage, source)
    require_prior(stage, prior, chain.folder)
    stage = filled(stage, source.system)
    handed = what_is_handed(chain, stage, before, source)
    run = plan_run(stage, source.scheduler, handed.sigma)
    guidance_scale(stage, run.whole)
    stage = stage.model_copy(update={"solver": stage.solver or run.config.name})
    factor = enlarges(source.system)
    size = (factor * handed.size[0], factor * handed.size[1])
    changes = find_changes(stage, source, shelf, chain.folder)
    companions = find_companions(stage, source, shelf, chain.folder, size, weights=weights)
    memory, mode = max(_memory(source, shelf, size, chain.batch, companions.parts), _memory(prior, shelf))
    return StagePlan(
        stage,
        handed.takes,
        size,
        run,
        notes=(*handed.notes, *_notes(stage, size, source.sizes()[0]), *of_changes(stage)),
        decodes=handed.decodes,
        goes_on_from=before if handed.goes_on and _continues(stage, run, before) else None,
        memory=memory or None,
        mode=mode if memory else None,
        source=source,
        prior=prior,
        changes=changes,
        companions=companions,
    )


def _memory(
    source: Source | None,
    shelf: Shelf,
    size: tuple[int, int] | None = None,
    batch: int = 1,
    beside: Sequence[Part] = (),
) -> tuple[int, Mode]:
    """What a model takes of the device, 0 if it is not here, and how it is placed; raises BadInput if that is too much."""
    if source is None:
        return 0, "resident"
    parts = [source.part(name) for name in source.parts if name not in TOKENIZERS]
    if not all(has_weights(part) for part in (*parts, *beside)):
        return 0, "resident"
    placed = shelf.placement(source, size, batch, beside).values()
    return peak(placed), next((mode for _, mode in placed if mode != "resident"), "resident")


def _continues(stage: Denoising, run: Run, before: StagePlan | None) -> bool:
    """Whether two stages are two parts of one run, so that the solver's memory and the noise go on."""
    if before is None or before.run is None or not isinstance(before.stage, Denoising):
        return False
    own, other = ((one.model, one.borrowed, one.lora, one.embeddings) for one in (stage, before.stage))
    return own == other and before.run.whole == run.whole and before.run.solver == run.solver


def _notes(stage: Denoising, size: tuple[int, int], native: int) -> Iterable[str]:
    if max(size) > 2 * native and not isinstance(stage, Upscale):
        yield f"{size[0]}x{size[1]} is far above the model's native {native} px: take fit = true or a smaller size"
