"""Reads diffusers' ``scheduler_config.json``; every option honoured or refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from ..core.errors import BadInput, BadModel
from . import classes, sigma_classes
from .classes import SchedulerConfig

SOLVERS: dict[str, type[SchedulerConfig]] = {
    kind.name: kind
    for kind in (
        classes.DDIMConfig,
        classes.DDPMConfig,
        sigma_classes.DPMSolverMultistepConfig,
        sigma_classes.EulerAncestralDiscreteConfig,
        sigma_classes.EulerDiscreteConfig,
        sigma_classes.HeunDiscreteConfig,
        classes.PNDMConfig,
        classes.UnCLIPConfig,
    )
}
"""Solver names of chain files, and the diffusers class each takes its conventions from."""

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
        raise BadModel(f"The scheduler class {name or '(none)'} is not supported: use one of {', '.join(sorted(_CLASSES))}.")
    if solver is not None and solver not in SOLVERS:
        raise BadInput(f"There is no solver {solver!r}: use one of {', '.join(sorted(SOLVERS))}.")
    kind = SOLVERS[solver] if solver else _CLASSES[name]
    if foreign := sorted(changes.keys() - kind.model_fields.keys()):
        raise BadInput(f"The solver {kind.name} has no option {', '.join(foreign)}: take another solver or leave it out.")
    given = {key: value for key, value in config.items() if not key.startswith("_")} | changes
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
        name, option = kind.__name__.replace("Config", "Scheduler"), ".".join(str(part) for part in fault["loc"])
        raise BadModel(f"{name} option {option} = {fault['input']!r} is not honoured: {fault['msg']}.") from error
