"""One chain under way, stage by stage."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from ..core.errors import BadInput, BadModel
from ..core.files import claim, held
from ..core.latents import Latents
from ..core.loading import Model, Shelf
from ..core.loop import Point, Step
from ..core.noise import NoiseSource
from ..stages import finish
from ..stages.decode import decode
from ..stages.pictures import read_picture
from . import jobs
from .cache import Cache
from .chain import Chain, Denoising, Inpaint, Resize, Sharpen, Stage
from .companions import inputs, load_companions
from .keys import Keys, keys_of, stream_of, weights_of
from .outputs import Output, Result, rescue
from .plan import StagePlan, pictures_wanted
from .prompts import Pair, prior_embeds
from .record import Machine
from .said import named, noted
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
        cache: where what stages make is kept and found; not with animations, sources and observers, which need every step.
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
    cache: Cache | None

    def __post_init__(self) -> None:
        if self.chain.gif or self.sources or self.observe:
            self.cache = None
        self.seeds = self.chain.seeds()
        self.result = self.since.result if self.since else Result()
        self.name = self.since.stage if self.since else self.chain.stages[0].name
        self.last = self.since.point if self.since else None
        self.model: Model | None = None
        self.start: Point | None = None
        self.held: BinaryIO | None = None
        self.claimed = list(self.since.claimed) if self.since else []
        self.passed, self.settled, self.heard = list[Point](), 0, 0

    def run(self) -> Result:
        """Every stage in order, but for those that are there already."""
        result, wanted = self.result, pictures_wanted(self.chain, self.plans)
        with noted(result.notes):
            for index, item in enumerate(self.plans):
                if (made := result.outputs.get(item.stage.name)) is not None:
                    made.decoder = self.decoder(index)
                    continue
                began, after = time.perf_counter(), self.chain.before(index)
                before = result.outputs[after.name] if after else None
                self.name, self.start = item.stage.name, None
                if self.since is not None and self.since.stage == self.name:
                    self.start = self.since.point
                with named(item.stage):
                    keys = self.keys(index, before)
                    output = self.known(index, keys) or self.stage(index, before)
                    if item.stage.name in wanted:
                        output.pictures()
                    if self.chain.gif == "stages" and output.is_picture and index < len(self.plans) - 1:
                        result.frames.append(output.pictures()[0])
                    self.keep(keys, output)
                self.last, self.model = None, None
                result.outputs[item.stage.name] = output
                result.seconds[item.stage.name] = time.perf_counter() - began
        return result

    def keys(self, index: int, before: Output | None) -> Keys | None:
        """What a stage's steps depend on, if there is a cache to look into."""
        return (
            keys_of(self.chain, self.plans[index], before, stream_of(self.chain, index), self.shelf) if self.cache else None
        )

    def known(self, index: int, keys: Keys | None) -> Output | None:
        """What a stage makes, if all of it is in the cache; if a part is, the stage starts there."""
        item = self.plans[index]
        if self.cache is None or keys is None or self.start is not None or (kept := self.cache.find(keys)) is None:
            return None
        self.result.trail[self.name], self.start = kept.marks, kept.point
        whole = kept.count == len(keys.steps)
        self.result.notes.append(
            f"Stage {self.name!r}: {kept.count} of {len(keys.steps)} steps were made before and reused."
        )
        if not whole or item.reads_files or (isinstance(item.stage, Inpaint) and not kept.pictures):
            return None
        assert item.source is not None
        self.result.notes += kept.notes
        brought = {**item.changes.fingerprints(), **item.companions.fingerprints()}
        self.result.models[self.name] = weights_of(item.source) | brought
        if item.prior is not None:
            self.result.models[f"{self.name}, prior"] = weights_of(item.prior)
        return Output(kept.point.latents.to(self.shelf.device), kept.pictures, self.decoder(index))

    def keep(self, keys: Keys | None, output: Output) -> None:
        """Put what a stage made into the cache."""
        self.settle()
        if self.cache is not None and keys is not None and self.passed:
            notes = self.result.notes[self.heard :]
            self.cache.put(keys, self.passed, self.result.trail[self.name], output.made, notes)
        self.passed.clear()
        self.settled = 0

    def stage(self, index: int, before: Output | None) -> Output:
        """What one stage makes of what it is handed."""
        item, stage, stream = self.plans[index], self.chain.stages[index], stream_of(self.chain, index)
        self.heard = len(self.result.notes)
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
            since=self.start and self.start.to(model.device),
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
        for part in item.stage.prior.mix if item.stage.prior else ():
            if part.image is not None:
                self.result.inputs[part.image] = read_picture(self.chain.folder / part.image)
        prior = self.shelf.load_prior(item.prior)
        self.result.models[f"{item.stage.name}, prior"] = dict(prior.fingerprints)
        return prior_embeds(prior, item.stage, self.seeds, stream, self.chain.folder, self.sources and self.sources())

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
        self.passed.append(self.last)
        if self.save_every and (step.index + 1) % self.save_every == 0:
            self.save()

    def settle(self) -> None:
        """Take the marks of the steps that were passed: only now, because on a GPU it waits for them."""
        new = self.passed[self.settled :]
        if new:
            trail = self.result.trail.setdefault(self.name, [])
            trail.extend(marks(point.latents.x, point.step - 1, point.latents.sigma) for point in new)
        self.settled = len(self.passed)

    def save(self) -> None:
        """Write the run as it stands into its file, which is claimed the first time."""
        assert self.folder is not None
        self.settle()
        if self.path is None:
            self.path = claim(self.folder, STEM, ".safetensors").with_suffix(".safetensors")
            self.hold(self.path)
        machine = Machine.of(self.shelf)
        Saved(self.chain, machine, self.name, self.last, self.result, tuple(self.claimed)).save(self.path)
        self.hold(self.path)

    def hold(self, path: Path | None) -> None:
        """Have other processes know that this run is under way, by the file that it is saved in; None if it is not."""
        before, self.held = self.held, held(path) if path else None
        if before:
            before.close()

    def announce(self, name: str) -> None:
        """Have the run's file say which outputs it is about to write, so that what is half written can be told apart."""
        self.claimed.append(name)
        if self.path is not None:
            self.save()

    def done(self) -> None:
        """There is nothing to go on with any more."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
        self.hold(None)

    def rescue(self) -> None:
        """Write what is there before an error goes on up; a further error must not hide the first."""
        if self.folder is not None:
            self.rescue_into(self.folder)
        self.hold(None)

    def rescue_into(self, folder: Path) -> None:
        """The same, for a run that writes files."""
        rescue(self.chain, self.result, Machine.of(self.shelf), folder)
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
