"""Options that a stage was given and that change nothing in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..core.textual_inversion import says
from .chain import Chain, Denoising, FromPicture, ImageToImage, Inpaint, PriorOptions, SizeConditioning, Stage
from .companions import unused
from .defaults import filled
from .effects import Setup, idle, shown
from .handoffs import Said, Severity
from .plan import StagePlan, pictures_wanted

_OF_GUIDANCE = ("negative_prompt", "negative_prompt_2", "negative_size")


def unheeded(chain: Chain, plans: Sequence[StagePlan]) -> dict[str, list[Said]]:
    """By stage, what is to be said of every option without effect.

    It is a warning, unless the same is said to a stage where it has one: what stands at the top of a chain for all of its
    stages may well be idle in one.
    """
    idle = {plan.stage.name: dict(_idle(chain, plans, index)) for index, plan in enumerate(plans)}

    def severity(stage: Stage, option: str) -> Severity:
        value = _value(stage, option)
        elsewhere = any(_value(other, option) == value and option not in idle[other.name] for other in chain.stages)
        return "note" if elsewhere or option == "faithful" else "warning"

    return {
        stage.name: [(severity(stage, option), sentence) for option, sentence in idle[stage.name].items()]
        for stage in chain.stages
    }


def _idle(chain: Chain, plans: Sequence[StagePlan], index: int) -> Iterator[tuple[str, str]]:
    """The options of one stage without effect, each with a sentence."""
    given, plan = chain.stages[index], plans[index]
    if not isinstance(given, Denoising) or plan.source is None or plan.run is None:
        return
    for option, why in _unlooked(chain, plans, index, given):
        yield option, f"{shown(option, _value(given, option))} has no effect: {why}."
    going_on = isinstance(given, ImageToImage) and given.start != "strength"
    setup = Setup(
        filled(given, plan.source.system),
        plan.source.scheduler,
        plan.source.system,
        plan.run.schedule.sigmas[0] if going_on else None,
    )
    for option, other in idle(setup):
        if option == "faithful" and _departs_otherwise(given, plan):
            continue
        if option in _OF_GUIDANCE and plan.prior is not None and (given.prior or PriorOptions()).guidance_scale > 1.0:
            continue  # Kandinsky's prior looks at it
        yield option, f"{shown(option, _value(given, option))} has no effect{_why(setup, option, other)}."


def _why(setup: Setup, option: str, other: str | None) -> str:
    """What keeps an option from having an effect, and what to do."""
    if other is not None and other.startswith("checkpoint."):
        name = other.removeprefix("checkpoint.")
        own = shown(name, setup.scheduler[name])
        return f" beside the checkpoint's own {own}: set that in scheduler too, or leave it out"
    reasons = {
        "stop": ": the run ends there anyway; leave it out",
        "guidance_interval": ": it holds every step that is run; leave it out",
        "faithful": ": nothing in this run departs from diffusers",
    }
    if option == "faithful" or (option in reasons and other in (None, "steps")):
        return reasons[option]
    if other == "steps":
        return f" with {shown(other, setup.stage.steps)}: leave it out"
    if other is not None:
        return f" beside {shown(other, setup.value(other))}: leave out one of the two"
    return " here, the run is the same number for number without it: leave it out"


def _departs_otherwise(given: Denoising, plan: StagePlan) -> bool:
    """Whether faithful changes something beside schedule and solver (see docs/departures.md)."""
    assert plan.source is not None
    assert plan.run is not None
    scaled = plan.source.system == "kandinsky" and plan.run.config.scales_input
    return scaled or (plan.source.system == "sdxl" and given.negative_size is not None)


def _unlooked(chain: Chain, plans: Sequence[StagePlan], index: int, given: Denoising) -> Iterator[tuple[str, str]]:
    """Options that nothing looks at in such a stage, and why."""
    plan = plans[index]
    if not given.guidance_batched and all(plan.guidance_at(step.sigma) <= 1.0 for step in plan.trace):
        yield "guidance_batched", "guidance is off, so there is one pass only; leave it out"
    if given.tiled is not None and plan.stage.name not in pictures_wanted(chain, plans):
        yield "tiled", "what it makes is handed on as latents and never decoded; leave it out"
    for word in given.embeddings:
        if not any(says(prompt, word) for prompt in given.prompts):
            yield f"embeddings.{word}", "none of its prompts has that word; leave it out"
    yield from unused(given, plan.run) if plan.run else ()
    if isinstance(given, FromPicture):
        yield from _unlooked_inputs(plan, given)
    if isinstance(given, Inpaint) and given.mask_blur and plan.left_noisy:
        yield "mask_blur", "it stops while there is noise, so nothing is put back by a composite; leave it out"
    yield from _unlooked_by_the_prior(given)
    scored = plan.source is not None and bool(plan.source.index.get("requires_aesthetics_score", False))
    for key in ("size", "negative_size"):
        told: SizeConditioning = getattr(given, key) or SizeConditioning()
        if told.aesthetic_score is not None and not scored:
            yield f"{key}.aesthetic_score", f"{given.model} was trained without scores, only SDXL's refiner is told one"
        if told.target is not None and scored:
            yield f"{key}.target", f"{given.model} is told a score in its place"


def _unlooked_inputs(plan: StagePlan, given: FromPicture) -> Iterator[tuple[str, str]]:
    from_file = given.image is not None or given.latents is not None
    if given.after is not None and from_file:
        yield "after", "it starts from a file, not from that stage's output; leave out one of the two"
    if given.fit and given.image is None and not isinstance(given, Inpaint):
        yield "fit", "there is no picture file to fit; leave it out"
    noisy = isinstance(given, ImageToImage) and given.start != "strength"
    pixels_only = plan.source is not None and plan.source.system == "x4"
    encodes = not noisy and not pixels_only and (given.image is not None or plan.decodes or isinstance(given, Inpaint))
    if given.posterior != "sample" and not encodes:
        why = "its pictures are not encoded" if pixels_only else "it is handed latents, which are not encoded"
        yield "posterior", f"{why}; leave it out"


def _unlooked_by_the_prior(given: Denoising) -> Iterator[tuple[str, str]]:
    prior = given.prior or PriorOptions()
    if not prior.mix:
        return
    if given.prompt:
        yield "prompt", "prior.mix stands in its place; leave out one of the two"
    if all(part.image is not None for part in prior.mix) and given.negative_prompt is None:
        for key in (key for key in ("steps", "guidance_scale") if getattr(prior, key) != getattr(PriorOptions(), key)):
            yield f"prior.{key}", "the prior is not run for a mix of pictures alone; leave it out"


def _value(stage: Stage, option: str) -> object:
    """What a stage was told of an option, None if nothing."""
    key, _, part = option.partition(".")
    value = getattr(stage, key, None)
    if not part:
        return value
    return value.get(part) if isinstance(value, dict) else getattr(value, part, None)
