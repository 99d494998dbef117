"""When a picture is wrong: is it the text encoding, the denoising or the decoding?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from ..core.errors import NonFinite
from ..core.loading import Shelf
from ..stages.text import TokenRow, token_table
from .chain import Chain, Denoising
from .checkups import Check, Known, apart, network_checks, said_of, text_checks, vae_checks
from .companions import Beside
from .jobs import Hook
from .prompts import Pair, encode_prompts
from .run import run
from .tasks import Task
from .watched import Seen, Watched, picture_checks, run_checks


@dataclass(frozen=True)
class Examined:
    """What was found in one stage of a chain.

    Args:
        tokens: what became of each of its prompts.
        steps: of its run.
        vae: on a known picture.
        text: what the encoder, or Kandinsky's prior, makes of prompts.
        denoising: the UNet on the known picture under noise, and the run.
        picture: what the run's end was decoded to.
    """

    name: str
    tokens: Mapping[str, Sequence[TokenRow]] = field(default_factory=dict)
    steps: Sequence[Seen] = ()
    vae: Sequence[Check] = ()
    text: Sequence[Check] = ()
    denoising: Sequence[Check] = ()
    picture: Sequence[Check] = ()

    @property
    def parts(self) -> Sequence[tuple[str, Sequence[Check]]]:
        """Each part's name and its checks, those first that explain what is found in later ones."""
        vae, picture = ("decoding", self.vae), ("decoding", self.picture)
        return vae, ("text encoding", self.text), ("denoising", self.denoising), picture


@dataclass(frozen=True)
class Diagnosis:
    """What was found in every stage that was reached."""

    stages: Sequence[Examined]

    @property
    def fault(self) -> tuple[str, str, Check] | None:
        """The stage, its part and the check that say most: what is wrong before what is odd, causes before what follows."""
        every = [(one.name, part, check) for one in self.stages for part, checks in one.parts for check in checks]
        return next((found for verdict in ("wrong", "odd") for found in every if found[2].verdict == verdict), None)

    @property
    def sentence(self) -> str:
        """The most likely fault."""
        if self.fault is None:
            return "Nothing was found to be wrong: text encoding, denoising and decoding are as expected."
        stage, part, check = self.fault
        expected = f", where {check.expected} is expected" if check.expected else ""
        return f"Most likely it is the {part} of stage {stage!r}: {check.what}: {check.found.rstrip('.')}{expected}."


def diagnose(chain: Chain, shelf: Shelf) -> Diagnosis:
    """Run a chain, and each part of each of its models on input that is known to be good; nothing is written.

    NaN and infinity end the run and are part of the diagnosis; any other fault is raised as by
    :func:`unrolled.chains.run.run`. Weights that work but are not those that were meant (another model's text encoder,
    say) cannot be told from the right ones.
    """
    examiner = Examiner(chain, shelf)
    try:
        run(chain, shelf, observe=examiner.observe)
    except NonFinite as error:
        if (found := Diagnosis(examiner.stages)).fault is None:  # the stage was not entered: its prior runs before it
            name = next(stage.name for stage in chain.stages if stage.name not in {one.name for one in found.stages})
            examiner.stages.append(Examined(name, text=(Check("the prior's run", str(error), "", "wrong"),)))
    return Diagnosis(examiner.stages)


class Examiner:
    """Sees the first image of every stage: ``run(chain, shelf, observe=examiner.observe)``, then take its ``stages``."""

    def __init__(self, chain: Chain, shelf: Shelf) -> None:
        self.chain, self.shelf, self.stages = chain, shelf, list[Examined]()

    @contextmanager
    def observe(self, task: Task) -> Iterator[Sequence[Hook]]:
        """Examine a stage's model before its run, and look at the run."""
        if task.seeds[0] != self.chain.seed:  # the other part of a batch that did not fit
            yield ()
            return
        stage, model = task.plan.stage, task.model
        assert isinstance(stage, Denoising)
        pair = task.prompts or encode_prompts(model, stage, (model.native_size, model.native_size))
        examined, known = self._alone(task, stage, pair)
        watched = Watched(known.latents.x if known else None)

        def close(*broken: Check) -> None:
            kind = task.plan.run.config.kind if task.plan.run else "epsilon"
            denoising = (*examined.denoising, *broken, *run_checks(watched, kind, differ=apart(*pair) > 0))
            picture = tuple(picture_checks(model, watched.ended, stage.tiled)) if watched.ended else ()
            self.stages.append(replace(examined, steps=watched.seen, denoising=denoising, picture=picture))

        try:
            with watched.on(model):
                yield [watched.see]
        except NonFinite as error:
            decoding = watched.ended is not None and watched.ended.x.isfinite().all()  # an inpainting decodes as well
            close(*() if decoding else [Check("the run", str(error), "", "wrong")])
            raise
        close()

    def _alone(self, task: Task, stage: Denoising, pair: Pair) -> tuple[Examined, Known | None]:
        """A stage's model, part by part, on a known picture and known prompts."""
        model, run = task.model, task.plan.run
        assert run is not None
        prior = self.shelf.load_prior(task.plan.prior) if task.plan.prior else None
        how: Any = {} if prior else {"chunks": stage.chunks, "weights": stage.prompt_weights}  # which it knows not
        tokens = {prompt: token_table(prior or model, prompt, **how) for prompt in prompts_of(stage)}
        differ = stage.prompt != (stage.negative_prompt or "")
        examined = Examined(stage.name, tokens, text=tuple(text_checks(prior or model, pair, tokens, differ=differ)))
        try:
            known = Known.of(model)
        except NonFinite as error:
            return replace(examined, vae=(Check("known picture, encoded", str(error), "", "wrong"),)), None
        said = said_of(model, prior, known)
        _, said = (task.beside or Beside()).conditioned(model, (said, said))  # an IP-Adapter wants its tokens
        network = model.denoiser_of(run.config.kind)
        denoising = tuple(network_checks(network, replace(said, control=None), known.latents, run.whole))
        return replace(examined, vae=tuple(vae_checks(model, known)), denoising=denoising), known


def prompts_of(stage: Denoising) -> tuple[str, ...]:
    """All that a stage is told in words, each once."""
    mixed = [part.prompt for part in stage.prior.mix] if stage.prior else []
    every = (*(mixed or [stage.prompt]), stage.prompt_2, stage.negative_prompt, stage.negative_prompt_2)
    return tuple(dict.fromkeys(prompt for prompt in every if prompt))
