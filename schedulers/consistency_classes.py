"""diffusers' schedulers for distilled models, as data: LCM and TCD."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from ..core.errors import BadInput
from ..core.schedule import Schedule
from ..core.solver import Solver
from . import spacing as spacings
from .classes import SpacedConfig
from .options import Clipping, Thresholding, bounded
from .renoise import LCM, TCD
from .spacing import Levels
from .training import BetaSchedule


class DistilledConfig(SpacedConfig):
    """What both have in common: timesteps out of those that the model was distilled at.

    ``timestep_spacing``, ``steps_offset`` and ``set_alpha_to_one`` have no effect, as in diffusers.
    """

    beta_start: float = Field(0.00085, gt=0.0, lt=1.0)
    beta_end: float = Field(0.012, gt=0.0, lt=1.0)
    beta_schedule: BetaSchedule = "scaled_linear"
    original_inference_steps: int = Field(50, ge=1)
    set_alpha_to_one: bool = True
    timestep_scaling: float = 10.0

    @model_validator(mode="after")
    def _original_steps_fit(self) -> Self:
        if self.original_inference_steps > self.num_train_timesteps:
            raise ValueError(
                f"{self.original_inference_steps} original_inference_steps of {self.num_train_timesteps} training timesteps"
            )
        return self

    def _timesteps(self, steps: int) -> Levels:
        if steps > self.original_inference_steps:
            raise BadInput(
                f"The steps of {self.name} are chosen among the {self.original_inference_steps} its model was distilled at "
                f"(original_inference_steps), got {steps}: take fewer, 4 to 8 are usual."
            )
        return spacings.distilled(steps, self.num_train_timesteps, self.original_inference_steps)

    def _spacing_name(self) -> str:
        return "distilled"


class LCMConfig(DistilledConfig, Thresholding, Clipping):
    """``LCMScheduler``."""

    name: ClassVar[str] = "lcm"
    clip_sample: bool = False

    def _solver(self, evaluated: Schedule, steps: int, eta: float, faithful: bool) -> Solver:
        """Consistency sampling; what is bounded is x0, before the boundary condition."""
        return bounded(LCM(self.training_sigmas(), self.timestep_scaling), self)


class TCDConfig(DistilledConfig):
    """``TCDScheduler``, whose ``timestep_scaling`` has no effect either; diffusers ignores clipping and thresholding."""

    name: ClassVar[str] = "tcd"
    takes_eta: ClassVar[bool] = True
    clip_sample: Literal[False] = False
    clip_sample_range: float = 1.0
    thresholding: Literal[False] = False
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0

    def _last_sigma(self) -> float:
        return self.training_sigmas()[0]

    def _solver(self, evaluated: Schedule, steps: int, eta: float, faithful: bool) -> Solver:
        """Strategic stochastic sampling, eta its gamma."""
        return TCD(eta, self.training_sigmas())
