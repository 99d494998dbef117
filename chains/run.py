"""Runs a chain: a thin reader over the stage functions, that loses nothing already made."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image

from ..core.errors import BadInput, Note, OutOfMemory, UnrolledError
from ..core.files import require_writable
from ..core.latents import Latents
from ..core.loading import Model, Shelf
from ..core.loop import Step
from ..core.noise import NoiseSource
from ..stages import finish
from ..stages.decode import decode
from . import jobs
from .chain import Chain, Denoising, FromPicture, Resize, Sharpen, Stage
from .outputs import Output, Result, joined, rescue, write
from .plan import StagePlan, pictures_wanted, plan
from .prompts import Pair, prior_embeds
from .record import Machine
from .tasks import Task, perform

Watch = Callable[[Stage, Step], object]
"""Called after every step; a progress bar, say."""

Observe = Callable[[Task], AbstractContextManager[Sequence[jobs.Hook]]]
"""Entered before every denoising stage and left after it: what it gives sees, and may edit, every step."""

Sources = Callable[[], NoiseSource]


def run(
    chain: Chain,
    shelf: Shelf,
    folder: Path | None = None,
    watch: Watch | None = None,
    *,
    free: bool = False,
    sources: Sources | None = None,
    observe: Observe | None = None,
) -> Result:
    """Run every stage and write what the chain asks for into ``folder`` (nothing is written without one).

    When a stage fails or is interrupted, the pictures of the stages before it are written, and an
    interrupted run's latents too, so that it can be taken up again. A batch that does not fit into
    memory is tried again in halves.

    Args:
        watch: called after every step.
        free: let go of every model that no later stage needs, and before the first stage of all others on the shelf.
        sources: gives every stage, and every prior, its source of noise in place of the seeds; for comparisons.
        observe: looks into every denoising stage.

    Raises:
        UnrolledError: what went wrong, with the stage's name.
    """
    if free:
        shelf.keep()
    plans = plan(chain, shelf)
    if shelf.models == "hub":  # all that is needed is fetched before anything runs
        plans = plan(chain, shelf, weights=True)
    if folder is not None:
        require_writable(folder)
    chain = chain.model_copy(update={"stages": tuple(item.stage for item in plans)})
    runner, machine = Runner(chain, plans, shelf, watch, free, sources, observe), Machine.of(shelf)
    try:
        result = runner.run()
        if folder is not None:
            write(chain, result, machine, folder)
        return result
    except BaseException as error:
        whole = any(isinstance(stage, FromPicture) and stage.latents for stage in chain.stages)
        if not isinstance(error, OutOfMemory) or chain.batch == 1 or whole:
            rescue(chain, runner.result, machine, runner.last, folder)
            raise
    del runner
    half = chain.batch // 2
    rest = chain.model_copy(update={"seed": chain.seed + half, "batch": chain.batch - half})
    first, second = (
        run(part, shelf, folder, watch, free=free, sources=sources, observe=observe)
        for part in (chain.model_copy(update={"batch": half}), rest)
    )
    return joined(first, second, f"The batch did not fit into memory and was run in parts of {half}.")


class Runner:
    """One chain under way: what its stages made so far, the model and the newest step of the one being run."""

    def __init__(
        self,
        chain: Chain,
        plans: Sequence[StagePlan],
        shelf: Shelf,
        watch: Watch | None,
        free: bool,
        sources: Sources | None,
        observe: Observe | None,
    ) -> None:
        self.chain, self.plans, self.shelf, self.watch, self.frees = chain, plans, shelf, watch, free
        self.sources, self.observe = sources, observe
        self.seeds, self.result, self.last = chain.seeds(), Result(), list[Step]()
        self.model: Model | None = None

    def run(self) -> Result:
        """Every stage in order."""
        result, wanted = self.result, pictures_wanted(self.chain, self.plans)
        with _noted(result.notes):
            for index, item in enumerate(self.plans):
                began, before = time.perf_counter(), self.chain.before(index)
                with _named(item.stage):
                    output = self.stage(index, result.outputs[before.name] if before else None)
                    if item.stage.name in wanted:
                        output.pictures()
                    if self.chain.gif == "stages" and output.is_picture and index < len(self.plans) - 1:
                        result.frames.append(output.pictures()[0])
                self.last.clear()
                self.model = None
                result.outputs[item.stage.name] = output
                result.seconds[item.stage.name] = time.perf_counter() - began
        return result

    def stage(self, index: int, before: Output | None) -> Output:
        """What one stage makes of what it is handed."""
        item, stage, stream = self.plans[index], self.chain.stages[index], self.stream(index)
        if not isinstance(stage, Denoising) or item.source is None:
            return self.finished(stage, before)
        prompts = self.prior_embeds(index, stream)
        self.free(self.plans[index:], self.plans[index + 1 :])
        self.model = model = self.load(item)
        self.result.models[stage.name] = dict(model.fingerprints)

        def pictures(latents: Latents) -> list[Image.Image]:
            # Asked for later, when the model may have been freed.
            return decode(self.model or self.load(item), latents, tiled=stage.tiled)

        def frame(latents: Latents) -> None:
            if self.chain.gif == "stages":
                self.result.frames += pictures(latents[:1])

        task = Task(
            plan=item,
            model=model,
            folder=self.chain.folder,
            before=before,
            seeds=self.seeds,
            stream=stream,
            source=self.sources and self.sources(),
            prompts=prompts,
            hooks=self.hooks(stage, pictures),
            inputs=self.result.inputs,
            frame=frame,
            pictures=pictures,
        )
        with self.observe(task) if self.observe else nullcontext(()) as hooks:
            made = perform(replace(task, hooks=[*task.hooks, *hooks]))
        return Output(made, decoder=pictures) if isinstance(made, Latents) else Output(made=made)

    def finished(self, stage: Stage, before: Output | None) -> Output:
        """What a stage does to finished pictures."""
        if before is None:
            raise BadInput("there is no picture to work on.")
        if isinstance(stage, Sharpen):
            return Output(made=[finish.sharpen(p, stage.percent, stage.radius) for p in before.pictures()])
        assert isinstance(stage, Resize)
        return Output(made=[finish.resize(p, stage.factor) for p in before.pictures()])

    def load(self, item: StagePlan) -> Model:
        """A stage's model."""
        assert item.source is not None
        return self.shelf.load(item.source, size=item.size, batch=len(self.seeds))

    def prior_embeds(self, index: int, stream: str) -> Pair | None:
        """What Kandinsky's prior makes of the prompts, for its decoders; it goes before the decoder comes."""
        item = self.plans[index]
        if item.prior is None or not isinstance(item.stage, Denoising):
            return None
        self.free(self.plans[index:], self.plans[index:])
        prior = self.shelf.load_prior(item.prior)
        self.result.models[f"{item.stage.name}, prior"] = dict(prior.fingerprints)
        return prior_embeds(prior, item.stage, self.seeds, stream, self.chain.folder, self.sources and self.sources())

    def stream(self, index: int) -> str:
        """Every denoising stage draws its own noise; the first one what a script draws by default."""
        first = next((i for i, stage in enumerate(self.chain.stages) if isinstance(stage, Denoising)), 0)
        return "" if index == first else self.chain.stages[index].name

    def hooks(self, stage: Stage, pictures: Callable[[Latents], list[Image.Image]]) -> list[jobs.Hook]:
        """What looks at every step: the rescue, the progress bar, the film."""

        def remember(step: Step) -> None:
            self.last[:] = [step]

        hooks: list[jobs.Hook] = [remember]
        if (watch := self.watch) is not None:
            hooks.append(lambda step: watch(stage, step))
        if self.chain.gif in (True, "steps"):
            hooks.append(lambda step: self.result.frames.extend(pictures(step.preview[:1])))
        return hooks

    def free(self, models: Sequence[StagePlan], priors: Sequence[StagePlan]) -> None:
        """Let go of all but the models of some stages and the priors of some."""
        if self.frees:
            held = [*(item.source for item in models), *(item.prior for item in priors)]
            self.shelf.keep(*(source for source in held if source is not None))


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
