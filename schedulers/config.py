"""Reads diffusers' ``scheduler_config.json``; every option honoured or refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from ..core.errors import BadInput, BadModel, closest
from . import consistency_classes, multistep_classes, sigma_classes, vp_classes
from .classes import SchedulerConfig

SOLVERS: dict[str, type[SchedulerConfig]] = {
    kind.name: kind
    for kind in (
        vp_classes.DDIMConfig,
        vp_classes.DDPMConfig,
        multistep_classes.DEISMultistepConfig,
        multistep_classes.DPMSolverMultistepConfig,
        multistep_classes.DPMSolverSinglestepConfig,
        sigma_classes.DPMSolverSDEConfig,
        sigma_classes.KDPM2DiscreteConfig,
        sigma_classes.KDPM2AncestralDiscreteConfig,
        sigma_classes.EDMEulerConfig,
        sigma_classes.EulerDiscreteConfig,
        sigma_classes.EulerAncestralDiscreteConfig,
        sigma_classes.HeunDiscreteConfig,
        consistency_classes.LCMConfig,
        sigma_classes.LMSDiscreteConfig,
        vp_classes.PNDMConfig,
        multistep_classes.SASolverConfig,
        consistency_classes.TCDConfig,
        vp_classes.UnCLIPConfig,
        multistep_classes.UniPCMultistepConfig,
    )
}
"""Solver names of chain files, and the diffusers class each takes its conventions from."""

VARIANTS: dict[str, tuple[str, dict[str, object]]] = {
    "dpm++2m-sde": ("dpm++2m", {"algorithm_type": "sde-dpmsolver++"}),
    "dpm++3m": ("dpm++2m", {"solver_order": 3}),
    "dpm++3m-sde": ("dpm++2m", {"solver_order": 3, "algorithm_type": "sde-dpmsolver++"}),
    "dpm++3s": ("dpm++2s", {"solver_order": 3}),
}
"""Further names of chain files: a solver of those and the options that make it another."""

_CLASSES = {kind.__name__.replace("Config", "Scheduler"): kind for kind in SOLVERS.values()}
_KNOWN_OPTIONS = {name for kind in SOLVERS.values() for name in kind.model_fields}


def read_scheduler(config: Mapping[str, Any], solver: str | None = None, **changes: object) -> SchedulerConfig:
    """A diffusers scheduler config, optionally for another solver and with options changed.

    Changing the solver is diffusers' ``OtherScheduler.from_config(pipe.scheduler.config)``: options that
    are written in the config and that both classes know carry over, the first class's defaults do not.
    What a file holds of other classes' options has no effect in diffusers and none here; an option that is
    changed without effect, one that no class knows, or a value that is not honoured, is refused.

    Raises:
        BadInput: unknown solver, or a changed option it does not have; BadModel: unknown class or option in the
            config, or a value that is not honoured.
    """
    name = str(config.get("_class_name", ""))
    if name not in _CLASSES:
        known = ", ".join(sorted(known.removesuffix("Scheduler") for known in _CLASSES))
        raise BadModel(f"The scheduler class {name or '(none)'} is not supported: use one of {known} (…Scheduler).")
    named, variant = VARIANTS.get(solver or "", (solver, {}))
    if named is not None and named not in SOLVERS:
        use = f": use one of {', '.join(sorted(SOLVERS | VARIANTS))}."
        raise BadInput(f"There is no solver {solver!r}{closest(named, SOLVERS | VARIANTS) or use}")
    kind = SOLVERS[named] if named else _CLASSES[name]
    edm = sigma_classes.EDMEulerConfig
    if (kind is edm) != (_CLASSES[name] is edm):
        raise BadInput(
            f"{kind.name} cannot stand in for {_CLASSES[name].name}: one is for networks with the preconditioning of EDM, "
            "the other for those without; take another solver."
        )
    if foreign := sorted(changes.keys() - kind.model_fields.keys()):
        raise BadInput(f"The solver {kind.name} has no option {', '.join(foreign)}: take another solver or leave it out.")
    if double := sorted(changes.keys() & variant.keys()):
        raise BadInput(f"The solver {solver} is {named} with another {', '.join(double)}: take {named}, or leave it out.")
    given = {key: value for key, value in config.items() if not key.startswith("_")} | variant | changes
    unknown = sorted(given.keys() - _KNOWN_OPTIONS)
    if unknown:
        raise BadModel(
            f"{name} has no option {', '.join(unknown)}: it cannot be honoured, remove it from the scheduler config."
        )
    options = {key: value for key, value in given.items() if key in kind.model_fields}
    try:
        return kind(**options)
    except ValidationError as error:
        fault = error.errors()[0]
        option, why = ".".join(str(part) for part in fault["loc"]), fault["msg"].removeprefix("Value error, ")
        what = f"option {option} = {fault['input']!r} is" if option else "options are"
        # Options that only go wrong together are the fault of whoever changed one.
        wrong = BadInput if option.split(".")[0] in (changes or variant) or (changes and not option) else BadModel
        raise wrong(f"{kind.__name__.replace('Config', 'Scheduler')} {what} not honoured: {why}.") from error
