"""diffusers' scheduler classes as data: their options, and the (schedule, solver) each stands for.

"Scheduler" is diffusers' word for a schedule and a solver together; it is used here only for its files.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from ..core.errors import BadInput
from ..core.prediction import Kind
from ..core.schedule import Schedule
from ..core.solver import Solver
from . import spacing
from .clip import Clipped
from .euler import Euler
from .faithful import DiffusersDDIM, DiffusersNoiseAtEnd, DiffusersPLMS
from .pndm import PLMS, PNDM
from .training import ZERO_SNR, BetaSchedule, sigmas_of, training_alphas

_KINDS: dict[str, Kind] = {"epsilon": "epsilon", "v_prediction": "v", "sample": "x0"}


def _newer_name(prediction_type: object) -> object:
    return "sample" if prediction_type == "original_sample" else prediction_type


PredictionType = Annotated[Literal["epsilon", "v_prediction", "sample"], BeforeValidator(_newer_name)]
"""The network's, whichever solver is taken: all of ours take all three, where some of diffusers' refuse "sample"."""

_VARIANCES: dict[str, Literal["small", "large", "learned"]] = {
    "fixed_small": "small", "fixed_small_log": "small", "fixed_large": "large", "learned_range": "learned"
}  # fmt: skip


class SchedulerConfig(BaseModel):
    """What every diffusers scheduler is configured with, and the run it stands for.

    Subclasses are its classes; a field's default is that class's, a ``Literal`` lists what is honoured.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    name: ClassVar[str]
    snr_floor: ClassVar[float] = ZERO_SNR
    scales_input: ClassVar[bool] = False
    """Whether its latents in diffusers are of standard deviation ``sqrt(1 + sigma^2)`` and scaled for the UNet."""

    num_train_timesteps: int = Field(1000, ge=1)
    beta_start: float = Field(0.0001, gt=0.0, lt=1.0)
    beta_end: float = Field(0.02, gt=0.0, lt=1.0)
    beta_schedule: BetaSchedule = "linear"
    trained_betas: tuple[float, ...] | None = None
    prediction_type: PredictionType = "epsilon"
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
    variance_type: Literal["fixed_small", "fixed_small_log", "fixed_large", "learned_range"] = "fixed_small"
    clip_sample: bool = True
    clip_sample_range: float = 1.0
    thresholding: Literal[False] = False
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0

    def _solver(self, steps: int, eta: float, faithful: bool) -> Solver:
        """Ancestral Euler."""
        euler = Euler(1.0, _VARIANCES[self.variance_type])
        solver = Clipped(euler, self.clip_sample_range) if self.clip_sample else euler
        return DiffusersNoiseAtEnd(solver, self.training_sigmas()[0]) if faithful and euler.variance == "large" else solver


class PNDMConfig(SchedulerConfig):
    """``PNDMScheduler``."""

    name: ClassVar[str] = "pndm"
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
        if faithful and self.kind != "x0":  # which diffusers' refuses
            return DiffusersPLMS(sigmas, self.num_train_timesteps // steps, self._last_sigma(), self.kind)
        return PLMS(self._last_sigma())


class UnCLIPConfig(SchedulerConfig):
    """``UnCLIPScheduler``: DDPM on evenly spread timesteps, both ends included."""

    name: ClassVar[str] = "unclip"
    beta_schedule: Literal["squaredcos_cap_v2"] = "squaredcos_cap_v2"
    prediction_type: Literal["epsilon", "sample"] = "epsilon"
    timestep_spacing: Literal["linspace"] = "linspace"
    rescale_betas_zero_snr: Literal[False] = False
    variance_type: Literal["fixed_small_log", "learned_range"] = "fixed_small_log"
    clip_sample: bool = True
    clip_sample_range: float = 1.0

    def _levels(self, steps: int) -> tuple[spacing.Levels, spacing.Levels]:
        if steps < 2:
            raise BadInput("The steps of unclip begin and end with training's own: use 2 or more, not 1.")
        return super()._levels(steps)

    def _solver(self, steps: int, eta: float, faithful: bool) -> Solver:
        """Ancestral Euler."""
        euler = Euler(1.0, _VARIANCES[self.variance_type])
        return Clipped(euler, self.clip_sample_range) if self.clip_sample else euler
