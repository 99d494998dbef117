"""Two runs from one: a chain, and the same chain changed from some step on; what lies before is computed once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from ..core.errors import BadInput
from ..core.latents import Latents
from ..core.loading import Shelf
from ..core.loop import Point, Step
from ..stages import finish
from .chain import Chain, Denoising
from .jobs import Hook
from .outputs import Result
from .plan import plan
from .record import Machine
from .run import go_on, run
from .runner import Observe, Watch
from .saved import Saved
from .tasks import Task

_NEW_SOLVER = ("model", "components", "vae", "solver", "scheduler", "eta", "faithful", "lora")
"""What makes the solver's memory another one's."""


@dataclass(frozen=True)
class Forked:
    """Both runs; ``parent`` is the one that was not changed."""

    parent: Result
    branch: Result

    def sheet(self, index: int = 0) -> Image.Image:
        """One image of the batch, side by side."""
        pictures = [self.parent.pictures[index], self.branch.pictures[index]]
        return finish.grid(pictures, columns=2, labels=["as it was", "changed"])


def fork(
    chain: Chain,
    changed: Chain,
    shelf: Shelf,
    step: int,
    stage: str | None = None,
    folder: Path | None = None,
    watch: Watch | None = None,
    *,
    edit: Callable[[Latents], Latents] | None = None,
    free: bool = False,
    observe: tuple[Observe | None, Observe | None] = (None, None),
) -> Forked:
    """Run a chain, and from a step on also as it is changed: other prompts, guidance, solver, noise, later stages.

    Args:
        changed: may differ from ``chain`` in that stage and those after it, and in its seed, from which the noise of the
            rest is drawn. What its steps lead through below that noise level is its own schedule's.
        step: how many steps of the stage's schedule lie before the fork.
        stage: by name; by default the last that denoises.
        edit: of the latents at the fork, for the branch alone.
        observe: looks into the stages of the parent, and of the branch.

    Further arguments as of :func:`~unrolled.chains.run.run`.

    Raises:
        BadInput: there is no such stage or step, or what lies before the fork is changed too.
    """
    plans = plan(chain, shelf)
    chain, changed = (
        part.model_copy(update={"stages": tuple(item.stage for item in planned)})
        for part, planned in ((chain, plans), (changed, plan(changed, shelf)))
    )
    stage = stage or next((s.name for s in reversed(chain.stages) if isinstance(s, Denoising)), "")
    index = _require_same_before(chain, changed, stage)
    steps = [passed.index + 1 for passed in plans[index].trace]
    if step not in steps:
        raise BadInput(f"Stage {stage!r} can be forked after its steps {steps[0]} to {steps[-1]}, not after {step}.")
    found: list[Point] = []
    parent = run(chain, shelf, folder, watch, free=free, observe=_watching(stage, step, found, observe[0]))
    (point,) = found
    latents = replace(point.latents, seeds=changed.seeds())
    was, now = chain.stages[index], changed.stages[index]
    if any(getattr(was, key) != getattr(now, key) for key in _NEW_SOLVER):
        latents = replace(latents, history=())
    branch = Saved(
        changed,
        Machine.of(shelf),
        stage,
        Point(edit(latents) if edit else latents, step),
        _before(parent, [s.name for s in chain.stages[:index]], stage, step),
    )
    branch.result.forked = {
        "chain": chain.model_dump(mode="json"), "stage": stage, "step": step, "edited": edit is not None
    }  # fmt: skip
    return Forked(parent, go_on(branch, shelf, folder, watch, free=free, observe=observe[1]))


def _require_same_before(chain: Chain, changed: Chain, name: str) -> int:
    """Where the stage is; raises BadInput unless the chains are alike up to it."""
    names = [stage.name for stage in chain.stages if isinstance(stage, Denoising)]
    if name not in names:
        raise BadInput(
            f"A fork is in a stage that denoises, {' or '.join(names) or 'of which there is none'}, not {name!r}."
        )
    index = [stage.name for stage in chain.stages].index(name)
    if len(changed.stages) <= index or changed.stages[index].name != name or changed.batch != chain.batch:
        raise BadInput(f"The chain that is changed needs a stage {name!r} at the same place, and a batch of {chain.batch}.")
    for was, now in zip(chain.stages[:index], changed.stages[:index], strict=True):
        if was != now:
            raise BadInput(f"Stage {was.name!r} is changed too, which lies before the fork in {name!r}: fork in it instead.")
    return index


def _watching(name: str, step: int, found: list[Point], observe: Observe | None) -> Observe:
    """Observes a run and keeps where the stage stood after so many of its steps, the first time if it is repeated."""

    @contextmanager
    def watching(task: Task) -> Iterator[Sequence[Hook]]:
        def look(passed: Step) -> None:
            if task.plan.stage.name == name and passed.index + 1 == step and not found:
                found.append(passed.point)

        with observe(task) if observe else nullcontext(()) as hooks:
            yield [*hooks, look]

    return watching


def _before(parent: Result, names: Sequence[str], stage: str, step: int) -> Result:
    """What a run had made before the fork."""
    steps = parent.trail.get(stage, [])
    count = next(i for i, images in enumerate(steps, 1) if images[0].step + 1 == step)
    return Result(
        outputs={name: parent.outputs[name] for name in names},
        inputs=dict(parent.inputs),
        models={model: prints for model, prints in parent.models.items() if model.split(", ")[0] in names},
        seconds={name: parent.seconds[name] for name in names},
        trail={name: parent.trail[name] for name in names if name in parent.trail} | {stage: steps[:count]},
    )
