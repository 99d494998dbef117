"""diffusers' scheduler classes as data: their options, and the (schedule, solver) each stands for.

"Scheduler" is diffusers' word for a schedule and a solver together; it is used here only for its files.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ..core.errors import BadInput
from ..core.prediction import Kind
from ..core.schedule import Schedule, timestep_of
from ..core.solver import Solver
from . import spacing
from .clip import Clipped
from .dpmpp import DPMpp2M
from .euler import Euler
from .faithful import DiffusersDDIM, DiffusersNoiseAtEnd, DiffusersPLMS
from .heun import Heun
from .pndm import PLMS, PNDM
from .training import ZERO_SNR, BetaSchedule, sigmas_of, training_alphas

_KINDS: dict[str, Kind] = {"epsilon": "epsilon", "v_prediction": "v", "sample": "x0"}


class SchedulerConfig(BaseModel):
    """What every diffusers scheduler is configured with, and the run it stands for.

    Subclasses are its classes; a field's default is that class's, a ``Literal`` lists what is honoured.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    name: ClassVar[str]
    snr_floor: ClassVar[float] = ZERO_SNR

    num_train_timesteps: int = Field(1000, ge=1)
    beta_start: float = Field(0.0001, gt=0.0, lt=1.0)
    beta_end: float = Field(0.02, gt=0.0, lt=1.0)
    beta_schedule: BetaSchedule = "linear"
    trained_betas: tuple[float, ...] | None = None
    prediction_type: Literal["epsilon", "v_prediction", "sample"] = "epsilon"
    timestep_spacing: Literal["leading", "trailing", "linspace"] = "leading"
    steps_offset: int = Field(0, ge=0)
    rescale_betas_zero_snr: bool = False

    @model_validator(mode="after")
    def _a_beta_each(self) -> Self:
        if self.trained_betas is not None and len(self.trained_betas) != self.num_train_timesteps:
            raise ValueError(f"{len(self.trained_betas)} betas for {self.num_train_timesteps} training timesteps")
        return self

    @property
    def kind(self) -> Kind:
        """What the UNet predicts."""
        return _KINDS[self.prediction_type]

    def schedule(self, steps: int) -> Schedule:
        """The noise levels of a run of ``steps`` steps.

        Raises:
            BadInput: the training timesteps do not allow so many steps.
        """
        if not 1 <= steps <= self.num_train_timesteps:
            raise BadInput(
                f"Steps go from 1 to {self.num_train_timesteps} (the training timesteps of this model), got {steps}."
            )
        timesteps, sigmas = self._levels(steps)
        if len(set(sigmas)) < len(sigmas) or max(timesteps) > self.num_train_timesteps - 1:
            raise BadInput(
                f"{steps} steps with {self.timestep_spacing} spacing (offset {self.steps_offset}) do not fit into "
                f"{self.num_train_timesteps} training timesteps: take fewer steps or another timestep_spacing."
            )
        last = self._last_sigma()
        # A last level already there would make an empty step.
        keep = len(sigmas) if sigmas[-1] > last else len(sigmas) - 1
        return Schedule(
            (*sigmas[:keep], last),
            tuple(timesteps[:keep]),
            self.training_sigmas(),
            self._start_std(sigmas[0]),
            origin=f"{self.name}, {self._spacing_name()}",
        )

    def solver(self, steps: int, *, eta: float = 0.0, faithful: bool = False) -> Solver:
        """The solver of this class for a run of ``steps`` steps.

        Args:
            eta: DDIM's, 0 (deterministic) to 1 (DDPM).
            faithful: repeat what diffusers does even where it is wrong (docs/departures.md).

        Raises:
            BadInput: eta is out of range, or this is not DDIM.
        """
        if not 0.0 <= eta <= 1.0:
            raise BadInput(f"DDIM's eta goes from 0 (deterministic) to 1 (DDPM), got {eta:g}.")
        if eta and not isinstance(self, DDIMConfig):
            raise BadInput(f"eta is DDIM's, and this solver is {self.name}: leave eta out, or take the solver ddim.")
        return self._solver(steps, eta, faithful)

    def _solver(self, steps: int, eta: float, faithful: bool) -> Solver:
        raise NotImplementedError

    def training_sigmas(self) -> tuple[float, ...]:
        """sigma of every training timestep."""
        zero_snr = self.rescale_betas_zero_snr
        alphas = training_alphas(
            self.num_train_timesteps, self.beta_start, self.beta_end, self.beta_schedule, self.trained_betas, zero_snr
        )
        return sigmas_of(alphas, self.snr_floor if zero_snr else ZERO_SNR)

    def _levels(self, steps: int) -> tuple[spacing.Levels, spacing.Levels]:
        timesteps = self._timesteps(steps, rounded=True)
        return timesteps, spacing.at_timesteps(timesteps, self.training_sigmas())

    def _timesteps(self, steps: int, *, rounded: bool, extra: int = 0) -> spacing.Levels:
        if self.timestep_spacing == "leading":
            return spacing.leading(steps, self.num_train_timesteps, self.steps_offset, extra=extra)
        if self.timestep_spacing == "trailing":
            return spacing.trailing(steps, self.num_train_timesteps)
        return spacing.linspace(steps, self.num_train_timesteps, extra=extra, rounded=rounded)

    def _last_sigma(self) -> float:
        return 0.0

    def _start_std(self, sigma: float) -> float:
        return float((1.0 + sigma**2) ** 0.5)

    def _spacing_name(self) -> str:
        return self.timestep_spacing


class DDIMConfig(SchedulerConfig):
    """``DDIMScheduler``."""

    name: ClassVar[str] = "ddim"
    clip_sample: bool = True
    clip_sample_range: float = 1.0
    set_alpha_to_one: bool = True
    thresholding: Literal[False] = False
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0

    def _last_sigma(self) -> float:
        return 0.0 if self.set_alpha_to_one else self.training_sigmas()[0]

    def _solver(self, steps: int, eta: float, faithful: bool) -> Solver:
        """Euler with DDIM's eta; clipping moves x0 but not the direction."""
        clip = self.clip_sample_range if self.clip_sample else None
        if faithful:
            return DiffusersDDIM(eta, self.training_sigmas(), self.num_train_timesteps // steps, self._last_sigma(), clip)
        return Clipped(Euler(eta), clip, keep_eps=True) if clip else Euler(eta)


class DDPMConfig(SchedulerConfig):
    """``DDPMScheduler``."""

    name: ClassVar[str] = "ddpm"
    variance_type: Literal["fixed_small", "fixed_small_log", "fixed_large"] = "fixed_small"
    clip_sample: bool = True
    clip_sample_range: float = 1.0
    thresholding: Literal[False] = False
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0

    def _solver(self, steps: int, eta: float, faithful: bool) -> Solver:
        """Ancestral Euler."""
        euler = Euler(1.0, "large" if self.variance_type == "fixed_large" else "small")
        solver = Clipped(euler, self.clip_sample_range) if self.clip_sample else euler
        return DiffusersNoiseAtEnd(solver, self.training_sigmas()[0]) if faithful and euler.variance == "large" else solver


class PNDMConfig(SchedulerConfig):
    """``PNDMScheduler``."""

    name: ClassVar[str] = "pndm"
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"
    skip_prk_steps: bool = False
    rescale_betas_zero_snr: Literal[False] = False
    set_alpha_to_one: bool = False

    def _last_sigma(self) -> float:
        return 0.0 if self.set_alpha_to_one else self.training_sigmas()[0]

    def _solver(self, steps: int, eta: float, faithful: bool) -> Solver:
        """PLMS, with a Runge–Kutta start unless ``skip_prk_steps``."""
        sigmas = self.training_sigmas()
        if not self.skip_prk_steps:
            return PNDM(sigmas)
        if faithful:
            return DiffusersPLMS(sigmas, self.num_train_timesteps // steps, self._last_sigma(), self.kind)
        return PLMS(self._last_sigma())


class _SigmaConfig(SchedulerConfig):
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


class EulerDiscreteConfig(_SigmaConfig):
    """``EulerDiscreteScheduler``."""

    name: ClassVar[str] = "euler"
    prediction_type: Literal["epsilon", "v_prediction", "sample"] = "epsilon"
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


class EulerAncestralDiscreteConfig(_SigmaConfig):
    """``EulerAncestralDiscreteScheduler``."""

    name: ClassVar[str] = "euler-ancestral"
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"
    use_karras_sigmas: Literal[False] = False

    def _solver(self, steps: int, eta: float, faithful: bool) -> Solver:
        """Ancestral Euler."""
        return Euler(1.0)


class HeunDiscreteConfig(_SigmaConfig):
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


class DPMSolverMultistepConfig(_SigmaConfig):
    """``DPMSolverMultistepScheduler``, first and second order."""

    name: ClassVar[str] = "dpm++2m"
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
