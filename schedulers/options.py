"""Options that several of diffusers' scheduler classes share, and what they do."""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

from pydantic import BaseModel, Field, model_validator

from ..core.solver import Solver
from .classes import HIGHEST, SchedulerConfig, TrainedConfig, renamed
from .clip import Clipped, Thresholded

FinalSigmas = Literal["zero", "sigma_min"]
SolverType = Annotated[
    Literal["midpoint", "heun"], renamed({"logrho": "midpoint", "bh1": "midpoint", "bh2": "midpoint"})
]  # fmt: skip


class SigmaSpaced(SchedulerConfig):
    """Spacings by noise level, one at most."""

    use_karras_sigmas: bool | None = False
    use_exponential_sigmas: bool | None = False
    use_beta_sigmas: bool | None = False

    @model_validator(mode="after")
    def _one_spacing(self) -> Self:
        if len(self._flagged()) > 1:
            raise ValueError(f"levels are {' and '.join(self._flagged())} at once")
        return self

    @property
    def own_spacing(self) -> str | None:
        """The spacing by noise level that the config asks for, if it does."""
        return next(iter(self._flagged()), None)

    def _flagged(self) -> list[str]:
        flags = {
            "karras": self.use_karras_sigmas,
            "exponential": self.use_exponential_sigmas,
            "beta": self.use_beta_sigmas,
        }
        return [name for name, flag in flags.items() if flag]


class SigmaRange(SchedulerConfig):
    """The range of a spacing by noise level, instead of the class's own."""

    sigma_min: float | None = Field(None, gt=0.0)
    sigma_max: float | None = Field(None, gt=0.0, le=HIGHEST)

    @model_validator(mode="after")
    def _a_range(self) -> Self:
        if self.sigma_min is not None and self.sigma_max is not None and self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min = {self.sigma_min:g} is not below sigma_max = {self.sigma_max:g}")
        return self


class Thresholding(BaseModel):
    """Dynamic thresholding of x0."""

    thresholding: bool = False
    dynamic_thresholding_ratio: float = Field(0.995, ge=0.0, le=1.0)
    sample_max_value: float = 1.0


class Clipping(BaseModel):
    """Clipping of x0."""

    clip_sample: bool = True
    clip_sample_range: float = Field(1.0, gt=0.0)


class LambdaClipped(TrainedConfig):
    """The highest noise levels left out, and a learned variance that no solver of theirs takes."""

    lambda_min_clipped: float | None = -math.inf
    variance_type: Literal["learned", "learned_range"] | None = None

    def _clipped(self) -> int:
        """How many training timesteps have a lambda, ``-log sigma``, below the lowest allowed."""
        lowest = -math.inf if self.lambda_min_clipped is None else self.lambda_min_clipped
        return sum(-math.log(sigma) < lowest for sigma in self.training_sigmas())


class Flow(BaseModel):
    """Options of flow matching, which is not honoured."""

    use_flow_sigmas: Literal[False] = False
    flow_shift: float = 1.0


class ShiftedFlow(Flow):
    """Options of flow matching whose shift depends on the size of the picture."""

    use_dynamic_shifting: Literal[False] = False
    time_shift_type: Literal["exponential"] = "exponential"


def bounded(solver: Solver, config: SchedulerConfig, *, keep_eps: bool = False) -> Solver:
    """The solver with x0 bounded as the config says; as in diffusers what is thresholded is not clipped too."""
    if isinstance(config, Thresholding) and config.thresholding:
        return Thresholded(solver, config.dynamic_thresholding_ratio, config.sample_max_value, keep_eps)
    if isinstance(config, Clipping) and config.clip_sample:
        return Clipped(solver, config.clip_sample_range, keep_eps)
    return solver
