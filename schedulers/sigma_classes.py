"""diffusers' sigma schedulers as data: Euler, Heun, DPM-Solver."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from pydantic import Field

from ..core.schedule import timestep_of
from ..core.solver import Solver
from . import spacing
from .classes import SchedulerConfig
from .clip import Clipped
from .dpmpp import DPMpp2M
from .euler import Euler
from .heun import Heun


class SigmaConfig(SchedulerConfig):
    """What the schedulers that work on sigmas have in common."""

    # diffusers' sigma schedulers floor a zero terminal alpha-bar here, visibly: 2.4e-4 of the first step.
    snr_floor: ClassVar[float] = 2.0**-24

    timestep_spacing: Literal["leading", "trailing", "linspace"] = "linspace"
    use_karras_sigmas: bool = False
    use_exponential_sigmas: Literal[False] = False
    use_beta_sigmas: Literal[False] = False

    def _levels(self, steps: int) -> tuple[spacing.Levels, spacing.Levels]:
        timesteps = self._timesteps(steps, rounded=False)
        sigmas = spacing.at_timesteps(timesteps, self.training_sigmas())
        if self.use_karras_sigmas:
            sigmas = spacing.karras(steps, *self._karras_range(sigmas))
            timesteps = [timestep_of(sigma, self.training_sigmas()) for sigma in sigmas]
        return timesteps, sigmas

    def _karras_range(self, sigmas: spacing.Levels) -> tuple[float, float]:
        return sigmas[-1], sigmas[0]

    def _start_std(self, sigma: float) -> float:
        return super()._start_std(sigma) if self.timestep_spacing == "leading" else sigma

    def _spacing_name(self) -> str:
        return "Karras" if self.use_karras_sigmas else super()._spacing_name()


class EulerDiscreteConfig(SigmaConfig):
    """``EulerDiscreteScheduler``."""

    name: ClassVar[str] = "euler"
    interpolation_type: Literal["linear", "log_linear"] = "linear"
    sigma_min: float | None = None
    sigma_max: float | None = None
    timestep_type: Literal["discrete", "continuous"] = "discrete"
    final_sigmas_type: Literal["zero", "sigma_min"] = "zero"

    def _levels(self, steps: int) -> tuple[spacing.Levels, spacing.Levels]:
        timesteps, sigmas = super()._levels(steps)
        if self.interpolation_type == "log_linear" and not self.use_karras_sigmas:
            table = self.training_sigmas()
            sigmas = spacing.log_linear(steps, table[0], table[-1])
        if self.timestep_type == "continuous" and self.prediction_type == "v_prediction":
            timesteps = [0.25 * math.log(sigma) for sigma in sigmas]
        return timesteps, sigmas

    def _karras_range(self, sigmas: spacing.Levels) -> tuple[float, float]:
        low, high = super()._karras_range(sigmas)
        return low if self.sigma_min is None else self.sigma_min, high if self.sigma_max is None else self.sigma_max

    def _last_sigma(self) -> float:
        # log_linear plans one level more than it has timesteps, so that it never reaches 0.
        ends_above = self.interpolation_type == "log_linear" and not self.use_karras_sigmas
        return self.training_sigmas()[0] if ends_above or self.final_sigmas_type == "sigma_min" else 0.0

    def _solver(self, steps: int, eta: float, faithful: bool) -> Solver:
        """Euler."""
        return Euler()


class EulerAncestralDiscreteConfig(SigmaConfig):
    """``EulerAncestralDiscreteScheduler``."""

    name: ClassVar[str] = "euler-ancestral"
    use_karras_sigmas: Literal[False] = False

    def _solver(self, steps: int, eta: float, faithful: bool) -> Solver:
        """Ancestral Euler."""
        return Euler(1.0)


class HeunDiscreteConfig(SigmaConfig):
    """``HeunDiscreteScheduler``."""

    name: ClassVar[str] = "heun"
    rescale_betas_zero_snr: Literal[False] = False
    beta_start: float = 0.00085
    beta_end: float = 0.012
    clip_sample: bool = False
    clip_sample_range: float = 1.0

    def _solver(self, steps: int, eta: float, faithful: bool) -> Solver:
        """Heun."""
        return Clipped(Heun(), self.clip_sample_range) if self.clip_sample else Heun()


class DPMSolverMultistepConfig(SigmaConfig):
    """``DPMSolverMultistepScheduler``, first and second order."""

    name: ClassVar[str] = "dpm++2m"
    scales_input: ClassVar[bool] = False
    solver_order: Literal[1, 2] = 2
    thresholding: Literal[False] = False
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0
    algorithm_type: Literal["dpmsolver++"] = "dpmsolver++"
    solver_type: Literal["midpoint", "heun"] = "midpoint"
    lower_order_final: bool = True
    euler_at_final: bool = False
    use_lu_lambdas: Literal[False] = False
    use_flow_sigmas: Literal[False] = False
    flow_shift: float = 1.0
    final_sigmas_type: Literal["zero", "sigma_min"] = "zero"
    lambda_min_clipped: float | None = Field(-math.inf, le=-math.inf)
    variance_type: None = None
    use_dynamic_shifting: Literal[False] = False
    time_shift_type: str = "exponential"

    def _levels(self, steps: int) -> tuple[spacing.Levels, spacing.Levels]:
        table = self.training_sigmas()
        if not self.use_karras_sigmas:
            timesteps = self._timesteps(steps, rounded=True, extra=1)
            return timesteps, spacing.at_timesteps(timesteps, table)
        sigmas = spacing.karras(steps, table[0], table[-1])
        timesteps = [timestep_of(sigma, table) for sigma in sigmas]
        return ([float(round(t)) for t in timesteps] if self.beta_schedule != "squaredcos_cap_v2" else timesteps), sigmas

    def _start_std(self, sigma: float) -> float:
        return float((1.0 + sigma**2) ** 0.5)

    def _last_sigma(self) -> float:
        return self.training_sigmas()[0] if self.final_sigmas_type == "sigma_min" else 0.0

    def _solver(self, steps: int, eta: float, faithful: bool) -> Solver:
        """DPM-Solver++ of the configured order."""
        if self.solver_order == 1:
            return Euler()
        short = self.lower_order_final and steps < 15
        return DPMpp2M(self.solver_type, self._last_sigma() if short or self.euler_at_final else 0.0)
