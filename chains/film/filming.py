"""Films a chain while it runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial

from ...core.loading import Shelf
from ...core.loop import Step
from ...core.model import Model
from ...kernels.attending import attending
from ...stages.text import token_positions
from ..chain import Chain, Denoising
from ..jobs import Hook
from ..record import device_name, versions
from ..run import run
from ..tasks import Task
from .heat import Heat
from .recorder import Preview, Recorder, Show, require_every
from .values import Film, Scene
from .words import require_words, spans


def film(
    chain: Chain, shelf: Shelf, *, words: Sequence[str] = (), every: int = 1, show: Show | None = None, title: str = ""
) -> Film:
    """Run a chain and record what every step of every stage held.

    Args:
        words: of the prompts, to see where each is attended to.
        every: how many steps lie between two decoded previews; those between are shown in the latents' colours.
        show: called with every preview, see :mod:`unrolled.chains.film.live`.
        title: by default the first stage's prompt.

    Raises:
        BadInput: a word stands in no prompt, or ``every`` is below 1; else as :func:`unrolled.chains.run.run`.
    """
    camera = Camera(chain, words=words, every=every, show=show)
    run(chain, shelf, observe=camera.observe)
    return camera.film(shelf, title)


class Camera:
    """Sees every stage of a run: ``run(chain, shelf, observe=camera.observe)``, then take ``camera.film(shelf)``.

    After a run that failed the film holds what was seen until then. Arguments as of :func:`film`.
    """

    def __init__(self, chain: Chain, *, words: Sequence[str] = (), every: int = 1, show: Show | None = None) -> None:
        require_every(every)
        require_words(words, (stage.prompt for stage in chain.stages if isinstance(stage, Denoising)))
        self.chain, self.words, self.every, self.show = chain, words, every, show
        self.scenes = list[Scene]()

    def film(self, shelf: Shelf, title: str = "") -> Film:
        """What was seen so far, on whichever machine that was."""
        prompts = (scene.prompt for scene in self.scenes)
        title = title or next(filter(None, prompts), "A run")
        return Film(title, tuple(self.scenes), self.chain.seed, device_name(shelf.device), versions())

    @contextmanager
    def observe(self, task: Task) -> Iterator[Sequence[Hook]]:
        """For :func:`unrolled.chains.run.run`: sees the first image of every stage."""
        stage = task.plan.stage
        assert isinstance(stage, Denoising)
        if task.seeds[0] != self.chain.seed:  # the other part of a batch that did not fit
            yield ()
            return
        self.scenes = [scene for scene in self.scenes if scene.stage != stage.name]  # of an attempt that did not fit
        heat, takes = _heat(task, stage, self.words), list[Recorder]()

        def see(step: Step) -> None:
            if not takes or step.index <= takes[-1].newest[0].index:  # the stage is repeated
                preview = Preview(task.pictures, self.every, self.show)
                takes.append(Recorder(preview, task.plan.guidance, heat))
            takes[-1].see(step)

        def cut() -> None:
            self.scenes += [_scene(task, stage, n, take) for n, take in enumerate(takes)]

        try:
            with attending(task.model.unet, heat.edit, lambda place: place.cross) if heat else nullcontext():
                yield [see]
        except BaseException:
            with suppress(Exception):  # the first error is the one to tell
                cut()
            raise
        cut()


def _heat(task: Task, stage: Denoising, words: Sequence[str]) -> Heat | None:
    """Of the words that the stage's prompt holds and its model was told."""
    found = {word: _positions(task.model, stage, word) for word in words} if task.model.system != "kandinsky" else {}
    told = {word: at for word, at in found.items() if at}
    return Heat(told, len(task.seeds)) if told else None


def _positions(model: Model, stage: Denoising, word: str) -> list[int]:
    where = partial(token_positions, model, stage.prompt, chunks=stage.chunks, weights=stage.prompt_weights)
    places = (where(*span) for span in spans(stage.prompt, word))
    return sorted({position for place in places for position in place})


def _scene(task: Task, stage: Denoising, repetition: int, take: Recorder) -> Scene:
    return Scene(
        stage=stage.name,
        repetition=repetition,
        model=stage.model,
        solver=task.plan.run.schedule.origin if task.plan.run else "",
        prompt=stage.prompt,
        negative_prompt=stage.negative_prompt or "",
        frames=take.frames(),
    )
