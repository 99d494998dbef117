"""What is wrong with a chain that would run, and what is worth knowing of it, before a model is loaded."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ..core.latents import Latents
from ..stages.noise import start_step
from .chain import Chain, Denoising, FromPicture, ImageToImage, Inpaint, Stage, TextToImage
from .effects import shown
from .handoffs import Part, Said, Severity, half_steps, history, level, nearly_twice
from .plan import StagePlan
from .trace import draws
from .unheeded import unheeded

DISTILLED = {"lcm": "LCMScheduler", "tcd": "TCDScheduler"}
"""Solvers that take a model distilled for them, and the class that such a checkpoint names."""


@dataclass(frozen=True)
class Finding:
    """One thing that was found.

    Args:
        severity: an "error" will stop the run, a "warning" is hardly what was meant, a "note" is as it should be but may
            surprise.
        stage: where.
        sentence: what is so, what comes of it, what to do.
    """

    severity: Severity
    stage: str
    sentence: str


def findings(chain: Chain, plans: Sequence[StagePlan]) -> list[Finding]:
    """Everything there is to say of a chain that :func:`unrolled.chains.plan.plan` let pass, stage by stage.

    Args:
        chain: as it was given to ``plan``: what it does not say is not criticised.
    """
    found, by_name, idle = list[Finding](), {plan.stage.name: plan for plan in plans}, unheeded(chain, plans)
    for index, (given, plan) in enumerate(zip(chain.stages, plans, strict=True)):
        said: list[Said] = [("note", note) for note in plan.notes]
        if isinstance(given, Denoising) and isinstance(plan.stage, Denoising) and plan.run is not None:
            before, name = _taken(chain, index), given.latents if isinstance(given, FromPicture) else None
            held = Latents.load(chain.folder / name) if name is not None else None
            part = Part(chain, plan, plan.run, given, plan.stage, by_name[before.name] if before else None, held)
            said += [one for check in CHECKS for one in check(part)]
        said += idle[given.name]
        said += _bracketed(plans, index)
        said += _wasted(chain, plans, index)
        found += [Finding(severity, given.name, sentence) for severity, sentence in said]
    return found


def inputs(part: Part) -> Iterator[Said]:
    """Inputs that are not scaled as the network was trained, and outputs that it does not give."""
    run, source, starts = part.run, part.plan.source, part.schedule.sigmas[0]
    assert source is not None
    if part.stage.faithful and source.system == "kandinsky" and run.config.scales_input:
        yield (
            "warning",
            f"faithful with {part.stage.solver} leaves the input of Kandinsky's UNet unscaled, as diffusers does: it sees a "
            f"standard deviation of {math.hypot(1, starts):.3g} instead of 1; leave faithful out, or take the solver ddpm.",
        )
    # A network that learned the variance gives it beside the 4 channels of its latents.
    if getattr(run.config, "variance_type", None) == "learned_range" and source.config("unet").get("out_channels", 4) < 8:
        yield (
            "error",
            f'variance_type = "learned_range" takes the variance from the network, and {part.stage.model} has none to '
            "give: leave it out.",
        )
    if starts > 100 and run.config.kind == "epsilon":
        out = "start lower" if _own_levels(part.stage) else "leave rescale_betas_zero_snr out"
        yield (
            "warning",
            f"at sigma {starts:.4g} a model that predicts noise cannot say what the picture is to be: levels as high as "
            f"those of zero terminal SNR are for models that predict v or the picture, {out}.",
        )
    if getattr(run.config, "clip_sample", False) and "clip_sample" not in {**source.scheduler, **part.stage.scheduler}:
        yield (
            "warning",
            f"{part.stage.solver} clips x0 to a picture's range unless told otherwise, and these are latents, which go "
            "beyond it: say scheduler = { clip_sample = false }.",
        )
    if run.config.name in DISTILLED and source.scheduler.get("_class_name") not in DISTILLED.values():
        yield (
            "note",
            f"{part.stage.solver} is for models that were distilled for it, and nothing says that {part.stage.model} was; "
            "others come out smooth or garish.",
        )


def _own_levels(stage: Denoising) -> bool:
    return stage.sigmas is not None or stage.timesteps is not None


def ends(part: Part) -> Iterator[Said]:
    """Runs that start or end where there is another amount of noise than what is handed on has."""
    starts, last = part.schedule.sigmas[0], part.run.whole.sigmas[-1]
    if not part.plan.left_noisy and last > part.run.whole.finished_at:
        yield "error", f"it ends at sigma {last:.4g}, which is still noise and cannot be decoded: let its levels end with 0."
    if part.goes_on:
        return
    if starts > part.highest * (1 + 1e-4):
        yield (
            "warning",
            f"it starts at sigma {starts:.4g}, above {part.highest:.4g}, the highest level its model was trained on, whose "
            "timestep it will be told: start there.",
        )
    elif starts < 0.5 * part.highest < math.inf and not part.schedule.first and not isinstance(part.stage, ImageToImage):
        how = "with a higher first level" if _own_levels(part.stage) else 'by more steps or timestep_spacing = "trailing"'
        yield (
            "note" if starts > 0.2 * part.highest else "warning",
            f"it starts from pure noise at sigma {starts:.4g} where training goes to {part.highest:.4g}, and takes some of "
            f"it for a grey picture (arXiv:2305.08891): start higher, {how}.",
        )


def strength(part: Part) -> Iterator[Said]:
    """Steps that rounding takes from a strength."""
    stage, count = part.stage, len(part.run.whole)
    if not isinstance(stage, ImageToImage | Inpaint) or stage.strength is None or part.goes_on:
        return
    ours, theirs = (count - start_step(count, stage.strength, faithful=faithful) for faithful in (False, True))
    if ours != theirs:
        exact = f"strength {stage.strength:g} of {count} steps is {ours}, but float rounding makes it {theirs} in diffusers"
        if stage.faithful:
            yield "warning", f"{exact}, and here with faithful: leave faithful out, or say first_step = {count - ours}."
        else:
            yield "note", f"{exact}; faithful = true repeats that."
    asked = count * stage.strength
    if isinstance(part.given, ImageToImage | Inpaint) and part.given.strength is not None and asked - ours > 0.5:
        yield (
            "note",
            f"strength {stage.strength:g} of {count} steps is {asked:.3g} of them, but a part of a step cannot be run: it "
            f"works as {ours / count:.3g}, with {ours} steps; {(ours + 1) / count:.4g} runs {ours + 1}.",
        )


def guidance(part: Part) -> Iterator[Said]:
    """Scales and intervals for steps that are not run."""
    scale, interval, count = part.stage.guidance_scale, part.stage.guidance_interval, len(part.schedule)
    first, last = part.schedule.first, part.schedule.first + count - 1
    runs = f"of the {len(part.run.whole)} steps, counted from 0, only {first} to {last} are run"
    if isinstance(scale, list) and count < len(scale):
        yield "note", f"{len(scale) - count} of its {len(scale)} guidance scales are not used: {runs}."
    if interval is not None and (interval[0] > last or interval[1] <= first):
        yield "warning", f"{shown('guidance_interval', interval)} guides nothing: {runs}."
    elif all(part.plan.guidance_at(step.sigma) <= 1.0 for step in part.plan.trace):
        yield "note", "guidance is off, as no scale is above 1: every step takes one pass through the UNet instead of two."


def seeds(part: Part) -> Iterator[Said]:
    """A batch whose images start from the same latents and draw nothing."""
    copies = part.goes_on and part.held is not None and len(part.held) == 1 < part.chain.batch
    if copies and not draws(part.schedule, part.run.solver):
        yield (
            "warning",
            f"its {part.chain.batch} images are the same, as {part.giver} holds one and {part.stage.solver} draws no "
            "noise: set batch = 1, or take a solver that draws.",
        )


CHECKS: Sequence[Callable[[Part], Iterator[Said]]] = (
    level, history, nearly_twice, half_steps, inputs, ends, strength, guidance, seeds,
)  # fmt: skip


def _taken(chain: Chain, index: int) -> Stage | None:
    """The stage whose output a stage takes, if it takes one."""
    stage = chain.stages[index]
    from_file = isinstance(stage, FromPicture) and (stage.image or stage.latents)
    return None if from_file or isinstance(stage, TextToImage) else chain.before(index)


def _bracketed(plans: Sequence[StagePlan], index: int) -> Iterator[Said]:
    """The first prompt whose brackets somebody may have meant as weights."""

    def as_text(plan: StagePlan) -> bool:
        stage = plan.stage
        if not isinstance(stage, Denoising) or stage.prompt_weights or plan.prior is not None:
            return False
        return any(bracket in prompt for prompt in stage.prompts for bracket in "([")

    if as_text(plans[index]) and not any(map(as_text, plans[:index])):
        yield (
            "note",
            "the brackets of its prompt are encoded as they stand, as diffusers does: prompt_weights = true reads "
            "(word:1.3) and [word] as weights, as AUTOMATIC1111's web UI does.",
        )


def _wasted(chain: Chain, plans: Sequence[StagePlan], index: int) -> Iterator[Said]:
    """Stages that work for nobody."""
    taken = [_taken(chain, later) for later in range(index + 1, len(plans))]
    shows = chain.gif or (chain.grid and not plans[index].left_noisy)
    if index < len(plans) - 1 and chain.stages[index] not in taken and not shows:
        yield (
            "warning",
            "no stage takes what it makes and no picture of it is written: leave it out, let a stage come after it, or say "
            "grid = true.",
        )
