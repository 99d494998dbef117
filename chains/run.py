"""Runs a chain: a thin reader over the stage functions, that loses nothing already made."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from ..core.errors import BadInput, Note, OutOfMemory, UnrolledError
from ..core.files import require_writable
from ..core.latents import Latents
from ..core.loading import Model, Shelf
from ..core.loop import Step
from ..core.noise import NoiseSource
from ..core.source import Source
from ..stages import finish
from ..stages.decode import decode
from . import jobs
from .chain import Chain, Denoising, PriorOptions, Resize, Sharpen, Stage
from .outputs import Output, Result, rescue, write
from .plan import StagePlan, pictures_wanted, plan
from .prompts import Pair, imagined
from .record import Machine
from .tasks import Task, perform

Watch = Callable[[Stage, Step], object]
"""Called after every step; a progress bar, say."""

Sources = Callable[[], NoiseSource]


def run(
    chain: Chain,
    shelf: Shelf,
    folder: Path | None = None,
    watch: Watch | None = None,
    *,
    keep: bool = False,
    sources: Sources | None = None,
) -> Result:
    """Run every stage and write what the chain asks for into ``folder`` (nothing is written without one).

    When a stage fails or is interrupted, the pictures of the stages before it are written, and an
    interrupted run's latents too, so that it can be taken up again. A batch that does not fit into
    memory is tried again in halves. Models are freed as soon as no later stage needs them.

    Args:
        watch: called after every step.
        keep: leave all models on the shelf.
        sources: gives every stage, and every prior, its source of noise in place of the seeds; for comparisons.

    Raises:
        UnrolledError: what went wrong, with the stage's name.
    """
    plans = plan(chain, shelf)
    chain = chain.model_copy(update={"stages": tuple(item.stage for item in plans)})
    machine = Machine(shelf.device, shelf.dtype)
    if folder is not None:
        require_writable(folder)
    runner = Runner(chain, plans, shelf, watch, keep, sources)
    try:
        result = runner.run()
        if folder is not None:
            write(chain, result, machine, folder)
        return result
    except OutOfMemory:
        if chain.batch == 1:
            rescue(chain, runner.result, machine, runner.last, folder)
            raise
    except (UnrolledError, KeyboardInterrupt):
        rescue(chain, runner.result, machine, runner.last, folder)
        raise
    return _in_halves(chain, shelf, folder, watch, keep)


def _in_halves(chain: Chain, shelf: Shelf, folder: Path | None, watch: Watch | None, keep: bool) -> Result:
    half = chain.batch // 2
    first = run(chain.model_copy(update={"batch": half}), shelf, folder, watch, keep=keep)
    rest = chain.model_copy(update={"seed": chain.seed + half, "batch": chain.batch - half})
    second = run(rest, shelf, folder, watch, keep=keep)
    for name, output in second.outputs.items():
        if output.is_picture:
            first.outputs[name] = Output(made=first.outputs[name].pictures() + output.pictures())
    first.files += second.files
    first.notes += [f"The batch did not fit into memory and was run in parts of {half}.", *second.notes]
    return first


class Runner:
    """One chain under way: what its stages made so far, and the models and the newest step of the one being run."""

    def __init__(
        self,
        chain: Chain,
        plans: Sequence[StagePlan],
        shelf: Shelf,
        watch: Watch | None,
        keep: bool,
        sources: Sources | None,
    ) -> None:
        self.chain, self.plans, self.shelf, self.watch, self.keep = chain, plans, shelf, watch, keep
        self.sources = sources
        self.seeds, self.result, self.last = chain.seeds(), Result(), list[Step]()
        self.models = dict[str, Model]()
        self.needed: list[Source | str] | None = None

    def run(self) -> Result:
        """Every stage in order."""
        result, wanted = self.result, pictures_wanted(self.chain, self.plans)
        with _noted(result.notes):
            for index, item in enumerate(self.plans):
                began, before = time.perf_counter(), self.chain.before(index)
                self.free(index, prior=True)
                with _named(item.stage):
                    output = self.stage(index, result.outputs[before.name] if before else None)
                    if item.stage.name in wanted:
                        output.pictures()
                    if self.chain.gif == "stages" and output.is_picture and index < len(self.plans) - 1:
                        result.frames.append(output.pictures()[0])
                self.last.clear()
                self.models.clear()
                result.outputs[item.stage.name] = output
                result.seconds[item.stage.name] = time.perf_counter() - began
        return result

    def stage(self, index: int, before: Output | None) -> Output:
        """What one stage makes of what it is handed."""
        stage = self.chain.stages[index]
        if isinstance(stage, Sharpen | Resize):
            if before is None:
                raise BadInput("there is no picture to work on.")
            if isinstance(stage, Sharpen):
                return Output(made=[finish.sharpen(p, stage.percent, stage.radius) for p in before.pictures()])
            return Output(made=[finish.resize(p, stage.factor) for p in before.pictures()])
        prompts = self.imagined(stage)
        self.free(index)

        def frame(latents: Latents) -> None:
            if self.chain.gif == "stages":
                self.result.frames += decode(self.model(stage), latents[:1])

        made = perform(
            Task(
                plan=self.plans[index],
                model=self.model(stage),
                folder=self.chain.folder,
                before=before,
                seeds=self.seeds,
                stream=self.stream(index),
                source=self.sources and self.sources(),
                prompts=prompts,
                hooks=self.hooks(stage),
                inputs=self.result.inputs,
                frame=frame,
            )
        )
        if not isinstance(made, Latents):
            return Output(made=made)
        return Output(made, decoder=lambda latents: decode(self.model(stage), latents, tiled=stage.tiled))

    def model(self, stage: Denoising) -> Model:
        """A stage's model; its fingerprints are kept for the manifest."""
        if stage.name not in self.models:  # the shelf looks at its weight files each time it is asked
            size = next(item.size for item in self.plans if item.stage.name == stage.name)
            self.models[stage.name] = model = self.shelf.load(
                stage.model, stage.borrowed, allow_pickle=stage.allow_pickle, size=size, batch=len(self.seeds)
            )
            self.result.models[stage.model] = dict(model.fingerprints)
        return self.models[stage.name]

    def imagined(self, stage: Denoising) -> Pair | None:
        """What Kandinsky's prior makes of the prompts, for its decoders; the prior goes before the decoder comes."""
        if self.place(stage).system != "kandinsky":
            return None
        prior = self.shelf.load_prior((stage.prior or PriorOptions()).model)
        self.result.models[prior.name] = dict(prior.fingerprints)
        return imagined(prior, stage, self.seeds, self.chain.folder, self.sources and self.sources())

    def place(self, stage: Denoising) -> Source:
        """Where a stage's model lies."""
        return self.shelf.find(stage.model, stage.borrowed, weights=False, allow_pickle=stage.allow_pickle)

    def stream(self, index: int) -> str:
        """Every denoising stage draws its own noise; the first one what a script draws by default."""
        first = next((i for i, stage in enumerate(self.chain.stages) if isinstance(stage, Denoising)), 0)
        return "" if index == first else self.chain.stages[index].name

    def hooks(self, stage: Stage) -> list[jobs.Hook]:
        """What looks at every step: the rescue, the progress bar, the film."""

        def remember(step: Step) -> None:
            self.last[:] = [step]

        hooks: list[jobs.Hook] = [remember]
        if (watch := self.watch) is not None:
            hooks.append(lambda step: watch(stage, step))
        if self.chain.gif in (True, "steps") and isinstance(stage, Denoising):
            model = self.model(stage)
            hooks.append(lambda step: self.result.frames.extend(decode(model, step.preview[:1])))
        return hooks

    def free(self, index: int, prior: bool = False) -> None:
        """Let go of every model that the stages from ``index`` on do not need; ``prior`` says if that one's still runs."""
        if self.keep:
            return
        needed = list[Source | str]()
        for later, stage in enumerate(self.chain.stages[index:]):
            if isinstance(stage, Denoising):
                needed.append(source := self.place(stage))
                if source.system == "kandinsky" and (later or prior):
                    needed.append((stage.prior or PriorOptions()).model)
        if needed != self.needed:
            self.needed = needed
            self.shelf.keep(*needed)


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
