"""diffusers' schedulers that work on timesteps, as data: DDIM, DDPM, PNDM, UnCLIP."""

from __future__ import annotations

from typing import ClassVar, Literal

from ..core.errors import BadInput
from ..core.schedule import Schedule
from ..core.solver import Solver
from . import spacing as spacings
from .classes import SpacedConfig, TrainedConfig
from .euler import Euler
from .faithful import DiffusersDDIM, DiffusersNoiseAtEnd, DiffusersPLMS
from .options import Clipping, Thresholding, bounded
from .pndm import PLMS, PNDM
from .spacing import Levels

_VARIANCES: dict[str, Literal["small", "large", "learned"]] = {
    "fixed_small": "small", "fixed_small_log": "small", "fixed_large": "large", "learned_range": "learned"
}  # fmt: skip


class DDIMConfig(SpacedConfig, Thresholding, Clipping):
    """``DDIMScheduler``."""

    name: ClassVar[str] = "ddim"
    takes_eta: ClassVar[bool] = True
    set_alpha_to_one: bool = True

    def _last_sigma(self) -> float:
        return 0.0 if self.set_alpha_to_one else self.training_sigmas()[0]

    def _solver(self, evaluated: Schedule, steps: int, eta: float, faithful: bool) -> Solver:
        """Euler with DDIM's eta; bounding moves x0 but not the direction."""
        if not faithful:
            return bounded(Euler(eta), self, keep_eps=True)
        table = self.training_sigmas()
        _require_training_levels(self, evaluated)
        solver = DiffusersDDIM(eta, table, self.num_train_timesteps // steps, self._last_sigma())
        return bounded(solver, self, keep_eps=True)


class DDPMConfig(SpacedConfig, Thresholding, Clipping):
    """``DDPMScheduler``."""

    name: ClassVar[str] = "ddpm"
    variance_type: Literal["fixed_small", "fixed_small_log", "fixed_large", "learned_range"] = "fixed_small"

    def _solver(self, evaluated: Schedule, steps: int, eta: float, faithful: bool) -> Solver:
        """Ancestral Euler."""
        euler = Euler(1.0, _VARIANCES[self.variance_type])
        solver = bounded(euler, self)
        return DiffusersNoiseAtEnd(solver, self.training_sigmas()[0]) if faithful and euler.variance == "large" else solver


class PNDMConfig(SpacedConfig):
    """``PNDMScheduler``."""

    name: ClassVar[str] = "pndm"
    skip_prk_steps: bool = False
    set_alpha_to_one: bool = False

    def _last_sigma(self) -> float:
        return 0.0 if self.set_alpha_to_one else self.training_sigmas()[0]

    def _solver(self, evaluated: Schedule, steps: int, eta: float, faithful: bool) -> Solver:
        """PLMS, with a Runge–Kutta start unless ``skip_prk_steps``."""
        sigmas, last = self.training_sigmas(), evaluated.sigmas[-1]
        if not self.skip_prk_steps:
            return PNDM(sigmas)
        if not faithful or self.kind == "x0":  # which diffusers' refuses
            return PLMS(last)
        _require_training_levels(self, evaluated)
        return DiffusersPLMS(sigmas, self.num_train_timesteps // steps, last, self.kind)


class UnCLIPConfig(TrainedConfig, Clipping):
    """``UnCLIPScheduler``: DDPM on evenly spread timesteps, both ends included."""

    name: ClassVar[str] = "unclip"
    beta_schedule: Literal["squaredcos_cap_v2"] = "squaredcos_cap_v2"
    prediction_type: Literal["epsilon", "sample"] = "epsilon"
    variance_type: Literal["fixed_small_log", "learned_range"] = "fixed_small_log"

    def _timesteps(self, steps: int) -> Levels:
        if steps < 2:
            raise BadInput("The steps of unclip begin and end with training's own: use 2 or more, not 1.")
        return spacings.linspace(steps, self.num_train_timesteps)

    def _solver(self, evaluated: Schedule, steps: int, eta: float, faithful: bool) -> Solver:
        """Ancestral Euler."""
        return bounded(Euler(1.0, _VARIANCES[self.variance_type]), self)


def _require_training_levels(config: SpacedConfig, evaluated: Schedule) -> None:
    """BadInput unless every level is a training timestep's, on which diffusers' arithmetic is."""
    if not set(evaluated.sigmas[:-1]) <= set(config.training_sigmas()):
        raise BadInput(
            f"Faithful {config.name} counts in training timesteps, and these levels lie between them: leave faithful out, "
            "or the spacing, sigmas or timesteps."
        )
