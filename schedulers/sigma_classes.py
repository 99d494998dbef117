"""diffusers' schedulers that work on sigmas as k-diffusion does, as data: Euler, Heun, LMS, DPM2, DPM++ SDE, EDM."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from ..core.prediction import Kind, Preconditioned
from ..core.schedule import Schedule
from ..core.solver import Solver
from . import spacing as spacings
from .adams import LMS
from .classes import HIGHEST, SpacedConfig
from .dpmpp_sde import DPMppSDE
from .euler import Euler
from .heun import Heun
from .options import Clipping, FinalSigmas, SigmaRange, SigmaSpaced, bounded
from .seeded import Seeded
from .singlestep import DPM2
from .spacing import Levels, Spacing


class SigmaConfig(SpacedConfig):
    """What the schedulers that work on sigmas have in common."""

    scales_input: ClassVar[bool] = True
    # diffusers' sigma schedulers floor a zero terminal alpha-bar here, visibly: 2.4e-4 of the first step.
    snr_floor: ClassVar[float] = 2.0**-24

    timestep_spacing: Literal["leading", "trailing", "linspace"] = "linspace"

    def _timesteps(self, steps: int) -> Levels:
        return self._spaced(steps, rounded=False)

    def _range(self, steps: int | None) -> tuple[float, float]:
        if steps is None:
            return super()._range(None)
        levels = self._levels_at(self._timesteps(steps))
        return levels[-1], levels[0]

    def _start_std(self, sigma: float) -> float:
        return super()._start_std(sigma) if self.timestep_spacing == "leading" else sigma


class EulerDiscreteConfig(SigmaConfig, SigmaSpaced, SigmaRange):
    """``EulerDiscreteScheduler``."""

    name: ClassVar[str] = "euler"
    interpolation_type: Literal["linear", "log_linear"] = "linear"
    timestep_type: Literal["discrete", "continuous"] = "discrete"
    final_sigmas_type: FinalSigmas = "zero"

    @property
    def continuous(self) -> bool:
        """Whether the UNet is told ``ln(sigma) / 4`` instead of a training timestep."""
        return self.timestep_type == "continuous" and self.prediction_type == "v_prediction"

    def _own(self, steps: int) -> tuple[Levels, Levels]:
        timesteps, sigmas = super()._own(steps)
        if self.interpolation_type == "log_linear":
            # One level more than there are timesteps, so that it never reaches 0; and the timesteps stay.
            table = self.training_sigmas()
            sigmas = spacings.exponential(steps + 1, table[0], table[-1])
        return (self._told(sigmas[:steps]) if self.continuous else timesteps), sigmas

    def _range(self, steps: int | None) -> tuple[float, float]:
        table = self.training_sigmas()
        low, high = (table[0], table[-1]) if self.interpolation_type == "log_linear" else super()._range(steps)
        return low if self.sigma_min is None else self.sigma_min, high if self.sigma_max is None else self.sigma_max

    def _last_sigma(self) -> float:
        return self.training_sigmas()[0] if self.final_sigmas_type == "sigma_min" else 0.0

    def _solver(self, evaluated: Schedule, steps: int, eta: float, faithful: bool) -> Solver:
        """Euler."""
        return Euler()


class EulerAncestralDiscreteConfig(SigmaConfig):
    """``EulerAncestralDiscreteScheduler``."""

    name: ClassVar[str] = "euler-ancestral"

    def _solver(self, evaluated: Schedule, steps: int, eta: float, faithful: bool) -> Solver:
        """Ancestral Euler."""
        return Euler(1.0)


class LMSDiscreteConfig(SigmaConfig, SigmaSpaced):
    """``LMSDiscreteScheduler``."""

    name: ClassVar[str] = "lms"

    def _solver(self, evaluated: Schedule, steps: int, eta: float, faithful: bool) -> Solver:
        """Linear multistep of fourth order."""
        return LMS()


class SecondOrderConfig(SigmaConfig, SigmaSpaced):
    """What the schedulers with two evaluations in each step have in common: other betas."""

    beta_start: float = Field(0.00085, gt=0.0, lt=1.0)
    beta_end: float = Field(0.012, gt=0.0, lt=1.0)


class HeunDiscreteConfig(SecondOrderConfig, Clipping):
    """``HeunDiscreteScheduler``."""

    name: ClassVar[str] = "heun"
    clip_sample: bool = False

    def _solver(self, evaluated: Schedule, steps: int, eta: float, faithful: bool) -> Solver:
        """Heun."""
        return bounded(Heun(), self)


class KDPM2DiscreteConfig(SecondOrderConfig):
    """``KDPM2DiscreteScheduler``."""

    name: ClassVar[str] = "dpm2"

    def _rounds(self, spacing: Spacing | str | None) -> bool:
        return spacing == "karras"

    def _solver(self, evaluated: Schedule, steps: int, eta: float, faithful: bool) -> Solver:
        """DPM-Solver-2."""
        return DPM2()


class KDPM2AncestralDiscreteConfig(KDPM2DiscreteConfig):
    """``KDPM2AncestralDiscreteScheduler``."""

    name: ClassVar[str] = "dpm2-ancestral"

    def _solver(self, evaluated: Schedule, steps: int, eta: float, faithful: bool) -> Solver:
        """DPM-Solver-2 with ancestral noise."""
        return DPM2(1.0)


class DPMSolverSDEConfig(SecondOrderConfig):
    """``DPMSolverSDEScheduler``."""

    name: ClassVar[str] = "dpm++sde"
    brownian: ClassVar[bool] = True
    noise_sampler_seed: int | None = None

    def _solver(self, evaluated: Schedule, steps: int, eta: float, faithful: bool) -> Solver:
        """DPM-Solver++ SDE, with noise of its own if it has a seed."""
        if self.noise_sampler_seed is None:
            return DPMppSDE()
        return Seeded(DPMppSDE(), self.noise_sampler_seed)


class EDMEulerConfig(SigmaRange):
    """``EDMEulerScheduler``: the noise levels and preconditioning of Karras et al., arXiv:2206.00364, table 1."""

    name: ClassVar[str] = "edm-euler"
    scales_input: ClassVar[bool] = True
    sigma_min: float = Field(0.002, gt=0.0)
    sigma_max: float = Field(80.0, gt=0.0, le=HIGHEST)
    sigma_data: float = Field(0.5, gt=0.0)
    sigma_schedule: Literal["karras", "exponential"] = "karras"
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"
    rho: float = Field(7.0, ge=0.1)
    final_sigmas_type: FinalSigmas = "zero"

    @property
    def kind(self) -> Kind:
        """What the UNet predicts: with "v_prediction" of the other sign."""
        return Preconditioned(self.sigma_data, 1 if self.prediction_type == "epsilon" else -1)

    @property
    def continuous(self) -> bool:
        """The UNet is told ``ln(sigma) / 4``."""
        return True

    def training_sigmas(self) -> tuple[float, ...]:
        """The lowest and the highest."""
        return self.sigma_min, self.sigma_max

    def _own(self, steps: int) -> tuple[Levels, Levels]:
        low, high = self._range(steps)
        karras = self.sigma_schedule == "karras"
        levels = spacings.karras(steps, low, high, self.rho) if karras else spacings.exponential(steps, low, high)
        return self._told(levels), levels

    def _range(self, steps: int | None) -> tuple[float, float]:
        return self.sigma_min, self.sigma_max

    def _last_sigma(self) -> float:
        return self.sigma_min if self.final_sigmas_type == "sigma_min" else 0.0

    def _spacing_name(self) -> str:
        return self.sigma_schedule

    def _solver(self, evaluated: Schedule, steps: int, eta: float, faithful: bool) -> Solver:
        """Euler."""
        return Euler()
