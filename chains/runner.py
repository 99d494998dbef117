"""One chain under way, stage by stage."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ..core.errors import BadInput, BadModel, Note, OutOfMemory, UnrolledError
from ..core.files import claim
from ..core.latents import Latents
from ..core.loading import Model, Shelf
from ..core.loop import Step
from ..core.noise import NoiseSource
from ..stages import finish
from ..stages.decode import decode
from . import jobs
from .chain import Chain, Denoising, Resize, Sharpen, Stage
from .companions import inputs, load_companions
from .outputs import Output, Result, rescue
from .plan import StagePlan, pictures_wanted
from .prompts import Pair, prior_embeds
from .record import Machine
from .saved import STEM, Saved
from .tasks import Task, perform
from .trail import marks

Watch = Callable[[Stage, Step], object]
"""Called after every step; a progress bar, say."""

Observe = Callable[[Task], AbstractContextManager[Sequence[jobs.Hook]]]
"""Entered before every denoising stage and left after it: what it gives sees, and may edit, every step."""

Sources = Callable[[], NoiseSource]


@dataclass
class Runner:
    """One chain under way: what its stages made so far, the model and the newest step of the one being run.

    Args:
        path: the file that the run is saved in; claimed in ``folder`` when it is needed.
        since: where it was left, to go on from there.
    """

    chain: Chain
    plans: Sequence[StagePlan]
    shelf: Shelf
    watch: Watch | None
    frees: bool
    sources: Sources | None
    observe: Observe | None
    save_every: int
    folder: Path | None
    path: Path | None
    since: Saved | None

    def __post_init__(self) -> None:
        self.seeds = self.chain.seeds()
        self.result = self.since.result if self.since else Result()
        self.name = self.since.stage if self.since else self.chain.stages[0].name
        self.last = self.since.point if self.since else None
        self.model: Model | None = None
        self.claimed = list[str]()
        self.passed = list[tuple[Tensor, int, float]]()

    def run(self) -> Result:
        """Every stage in order, but for those that are there already."""
        result, wanted = self.result, pictures_wanted(self.chain, self.plans)
        with _noted(result.notes):
            for index, item in enumerate(self.plans):
                if (made := result.outputs.get(item.stage.name)) is not None:
                    made.decoder = self.decoder(index)
                    continue
                began, before = time.perf_counter(), self.chain.before(index)
                self.name = item.stage.name
                with _named(item.stage):
                    output = self.stage(index, result.outputs[before.name] if before else None)
                    if item.stage.name in wanted:
                        output.pictures()
                    if self.chain.gif == "stages" and output.is_picture and index < len(self.plans) - 1:
                        result.frames.append(output.pictures()[0])
                self.settle()
                self.last, self.model = None, None
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
        pictures, since = self.decoder(index), self.since
        weights = {**model.fingerprints, **item.changes.fingerprints(), **item.companions.fingerprints()}
        if since is not None and (fault := since.other_weights(stage.name, weights)):
            raise BadModel(fault)
        self.result.models[stage.name] = weights
        beside = load_companions(item.companions, stage, model, self.shelf, self.chain.folder, item.size, len(self.seeds))
        self.result.inputs |= inputs(beside)

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
            hooks=(),
            inputs=self.result.inputs,
            frame=frame,
            pictures=pictures,
            since=since.point and since.point.to(model.device) if since is not None and since.stage == stage.name else None,
            beside=beside,
        )
        observed = self.observe(task) if self.observe else nullcontext(())
        with item.changes.on(model), beside.on(model), observed as hooks:
            made = perform(replace(task, hooks=[*self.hooks(stage, pictures), *hooks, self.remember]))
        return Output(made, decoder=pictures) if isinstance(made, Latents) else Output(made=made)

    def decoder(self, index: int) -> Callable[[Latents], list[Image.Image]]:
        """Decodes what a stage made: in it with its model, later with one that may have to be loaded again."""
        item = self.plans[index]

        def pictures(latents: Latents) -> list[Image.Image]:
            model = self.model if self.model is not None and self.name == item.stage.name else self.load(item)
            return decode(model, latents, tiled=item.stage.tiled if isinstance(item.stage, Denoising) else None)

        return pictures

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
        return self.shelf.load(item.source, size=item.size, batch=len(self.seeds), beside=item.companions.parts)

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
        """What looks at every step: the progress bar, the animation."""
        hooks: list[jobs.Hook] = []
        if (watch := self.watch) is not None:
            hooks.append(lambda step: watch(stage, step))
        if self.chain.gif in (True, "steps"):
            hooks.append(lambda step: self.result.frames.extend(pictures(step.preview[:1])))
        return hooks

    def remember(self, step: Step) -> None:
        """Keep where the run stands, and save it if it is time to."""
        self.last = step.point
        self.passed.append((step.x, step.index, step.sigma_next))
        if self.save_every and (step.index + 1) % self.save_every == 0:
            self.save()

    def settle(self) -> None:
        """Take the marks of the steps that were passed: only now, because on a GPU it waits for them."""
        if self.passed:
            self.result.trail.setdefault(self.name, []).extend(marks(*step) for step in self.passed)
            self.passed.clear()

    def save(self) -> None:
        """Write the run as it stands into its file, which is claimed the first time."""
        assert self.folder is not None
        self.settle()
        if self.path is None:
            self.path = claim(self.folder, STEM, ".safetensors").with_suffix(".safetensors")
        machine = Machine.of(self.shelf)
        Saved(self.chain, machine, self.name, self.last, self.result, tuple(self.claimed)).save(self.path)

    def announce(self, name: str) -> None:
        """Have the run's file say which outputs it is about to write, so that what is half written can be told apart."""
        self.claimed.append(name)
        if self.path is not None:
            self.save()

    def done(self) -> None:
        """There is nothing to go on with any more."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def rescue(self) -> None:
        """Write what is there before an error goes on up; a further error must not hide the first."""
        if self.folder is None:
            return
        rescue(self.chain, self.result, Machine.of(self.shelf), self.folder)
        if self.last is not None or self.result.outputs:
            with suppress(Exception):
                try:
                    self.save()
                except BaseException:
                    if self.path is not None and not self.path.stat().st_size:
                        self.path.unlink()
                    raise

    def free(self, models: Sequence[StagePlan], priors: Sequence[StagePlan]) -> None:
        """Let go of all but the models of some stages and the priors of some."""
        if self.frees:
            held = [*(item.source for item in models), *(item.prior for item in priors)]
            beside = [part for item in models for part in item.companions.parts]
            self.shelf.keep(*(source for source in held if source is not None), *beside)


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
