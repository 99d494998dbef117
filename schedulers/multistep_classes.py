"""diffusers' exponential integrators as data: DPM-Solver, multistep and single-step, DEIS, UniPC, SA-Solver."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import accumulate
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from ..core.schedule import Schedule
from ..core.solver import Solver
from . import spacing as spacings
from .adams import DEIS
from .classes import SpacedConfig, TrainedConfig, renamed
from .dpm import DPMSolver
from .multistep import Predicts
from .options import (
    FinalSigmas,
    Flow,
    LambdaClipped,
    ShiftedFlow,
    SigmaRange,
    SigmaSpaced,
    SolverType,
    Thresholding,
    bounded,
)
from .sa import SASolver, Tau, TauBetween
from .singlestep import Singlestep
from .spacing import Levels, Spacing
from .unipc import UniPC

_ALGORITHMS: dict[str, tuple[Predicts, float]] = {
    "dpmsolver": ("eps", 0.0), "dpmsolver++": ("x0", 0.0), "sde-dpmsolver": ("eps", 1.0), "sde-dpmsolver++": ("x0", 1.0)
}  # fmt: skip
"""What DPM-Solver's algorithms extrapolate, and how stochastic they are."""


class ExponentialConfig(SigmaSpaced, TrainedConfig, Thresholding):
    """What exponential integrators have in common: whole timesteps, spacings by noise level over all of training's."""

    snr_floor: ClassVar[float] = 2.0**-24

    def _rounds(self, spacing: Spacing | str | None) -> bool:
        return spacing == "karras"


class MultistepConfig(ExponentialConfig, SpacedConfig):
    """What the multistep ones have in common: timesteps that leave room for a last step to 0."""

    timestep_spacing: Literal["leading", "trailing", "linspace"] = "linspace"
    lower_order_final: bool = True

    def _timesteps(self, steps: int) -> Levels:
        return self._spaced(steps, extra=1, clipped=self._clipped())

    def _clipped(self) -> int:
        return 0

    def _taper(self, evaluated: Schedule, steps: int) -> tuple[float, ...]:
        """The levels towards which the order falls; an empty last step of diffusers' counts, and is at 0 for us."""
        return (*evaluated.sigmas, *[0.0] * (steps - len(evaluated)))[-3:] if self.lower_order_final else ()


class DPMOptions(LambdaClipped, ExponentialConfig, ShiftedFlow):
    """What both DPM-Solver classes have in common."""

    solver_order: Literal[1, 2, 3] = 2
    algorithm_type: str = "dpmsolver++"
    solver_type: SolverType = "midpoint"
    final_sigmas_type: FinalSigmas = "zero"

    @model_validator(mode="after")
    def _ends_above_zero(self) -> Self:
        if self.algorithm_type in ("dpmsolver", "sde-dpmsolver") and self.final_sigmas_type == "zero":
            raise ValueError(f"{self.algorithm_type} cannot end at 0: it needs final_sigmas_type = 'sigma_min'")
        return self

    def _last_sigma(self) -> float:
        return self.training_sigmas()[0] if self.final_sigmas_type == "sigma_min" else 0.0


class DPMSolverMultistepConfig(DPMOptions, MultistepConfig):
    """``DPMSolverMultistepScheduler``."""

    name: ClassVar[str] = "dpm++2m"
    algorithm_type: Annotated[
        Literal["dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++"], renamed({"deis": "dpmsolver++"})
    ] = "dpmsolver++"
    euler_at_final: bool = False
    use_lu_lambdas: bool = False

    def _flagged(self) -> list[str]:
        return super()._flagged() + ["lu"] * self.use_lu_lambdas

    def _rounds(self, spacing: Spacing | str | None) -> bool:
        return spacing in ("karras", "lu") and self.beta_schedule != "squaredcos_cap_v2"

    def _solver(self, evaluated: Schedule, steps: int, eta: float, faithful: bool) -> Solver:
        """DPM-Solver of the configured order and kind."""
        predicts, tau = _ALGORITHMS[self.algorithm_type]
        taper = self._taper(evaluated, steps) if steps < 15 else ()
        if self.euler_at_final and len(evaluated) == steps:  # else diffusers' last step is an empty one
            taper = taper or (evaluated.sigmas[-1],)
        solver = DPMSolver(
            self.solver_order, predicts=predicts, tau=tau, solver_type=self.solver_type, taper=taper, faithful=faithful
        )
        return bounded(solver, self)


class DPMSolverSinglestepConfig(DPMOptions):
    """``DPMSolverSinglestepScheduler``: its blocks of timesteps are the steps, so that no split falls inside one."""

    name: ClassVar[str] = "dpm++2s"
    algorithm_type: Annotated[Literal["dpmsolver", "dpmsolver++", "sde-dpmsolver++"], renamed({"deis": "dpmsolver++"})] = (
        "dpmsolver++"
    )
    lower_order_final: bool = False

    def _timesteps(self, steps: int) -> Levels:
        return spacings.linspace(steps, self.num_train_timesteps - self._clipped(), extra=1)

    def _boundaries(self, evaluated: Schedule, steps: int) -> Schedule:
        blocks = self._blocks(steps, to_zero=not evaluated.sigmas[-1])
        blocks[-1] -= steps - len(evaluated)  # of an empty last step
        at = [0, *accumulate(block for block in blocks if block)]
        levels, timesteps = evaluated.sigmas, evaluated.timesteps
        inside = tuple((levels[i], timesteps[i]) for i in range(len(evaluated)) if i not in at)
        starts = tuple(timesteps[i] for i in at[:-1])
        return replace(evaluated, sigmas=tuple(levels[i] for i in at), timesteps=starts, inside=inside)

    def _blocks(self, evaluations: int, *, to_zero: bool) -> list[int]:
        """How many evaluations each step has (``get_order_list`` there); only a step of one can lead to 0."""
        order = self.solver_order
        whole, rest = divmod(evaluations, order)
        if not to_zero and (rest == 2 or not (rest or self.lower_order_final)):
            return [order] * whole + [rest] * bool(rest)
        whole, rest = divmod(evaluations - 1, order)
        return [order] * whole + [rest] * bool(rest) + [1]

    def _solver(self, evaluated: Schedule, steps: int, eta: float, faithful: bool) -> Solver:
        """Single-step DPM-Solver that evaluates at the levels inside its blocks."""
        predicts, tau = _ALGORITHMS[self.algorithm_type]
        solver = Singlestep(
            self.solver_order,
            levels=evaluated.sigmas,
            predicts=predicts,
            tau=tau,
            solver_type=self.solver_type,
            faithful=faithful,
        )
        return bounded(solver, self)


class DEISMultistepConfig(MultistepConfig, ShiftedFlow):
    """``DEISMultistepScheduler``."""

    name: ClassVar[str] = "deis"
    solver_order: Literal[1, 2, 3] = 2
    algorithm_type: Annotated[Literal["deis"], renamed({"dpmsolver": "deis", "dpmsolver++": "deis"})] = "deis"
    solver_type: Annotated[
        Literal["logrho"], renamed(dict.fromkeys(("midpoint", "heun", "bh1", "bh2"), "logrho"))
    ] = "logrho"  # fmt: skip

    def _last_sigma(self) -> float:
        return self.training_sigmas()[0]

    def _solver(self, evaluated: Schedule, steps: int, eta: float, faithful: bool) -> Solver:
        """DEIS of the configured order."""
        return bounded(DEIS(self.solver_order, self._taper(evaluated, steps) if steps < 15 else ()), self)


class UniPCMultistepConfig(MultistepConfig, ShiftedFlow, SigmaRange):
    """``UniPCMultistepScheduler``."""

    name: ClassVar[str] = "unipc"
    solver_order: Literal[1, 2, 3] = 2
    predict_x0: bool = True
    solver_type: Annotated[
        Literal["bh1", "bh2"], renamed(dict.fromkeys(("midpoint", "heun", "logrho"), "bh2"))
    ] = "bh2"  # fmt: skip
    disable_corrector: list[int] = Field(default_factory=list)
    solver_p: None = None
    final_sigmas_type: FinalSigmas = "zero"
    shift_terminal: None = None

    def _range(self, steps: int | None) -> tuple[float, float]:
        low, high = super()._range(steps)
        return low if self.sigma_min is None else self.sigma_min, high if self.sigma_max is None else self.sigma_max

    def _last_sigma(self) -> float:
        return self.training_sigmas()[0] if self.final_sigmas_type == "sigma_min" else 0.0

    def _solver(self, evaluated: Schedule, steps: int, eta: float, faithful: bool) -> Solver:
        """UniPC of the configured order; the step after one whose number is listed is not corrected."""
        left_out = tuple(level for i, level in enumerate(evaluated.sigmas) if i - 1 in self.disable_corrector)
        solver = UniPC(
            self.solver_order,
            solver_type=self.solver_type,
            predicts="x0" if self.predict_x0 else "eps",
            taper=self._taper(evaluated, steps),
            uncorrected=left_out,
        )
        return bounded(solver, self)


class SASolverConfig(LambdaClipped, MultistepConfig, Flow):
    """``SASolverScheduler``, whose ``tau_func`` a file cannot hold."""

    name: ClassVar[str] = "sa-solver"
    predictor_order: Literal[1, 2, 3, 4] = 2
    corrector_order: Literal[1, 2, 3, 4] = 2
    tau_func: None = None
    algorithm_type: Literal["data_prediction", "noise_prediction"] = "data_prediction"

    def _last_sigma(self) -> float:
        return self.training_sigmas()[0]

    def _solver(self, evaluated: Schedule, steps: int, eta: float, faithful: bool) -> Solver:
        """SA-Solver, stochastic from timestep 800 to 200, of what is left of fractional ones when they are cut."""
        stepped = zip(evaluated.sigmas, evaluated.timesteps, strict=False)
        noisy = [sigma for sigma, timestep in stepped if 200 <= math.floor(timestep) <= 800]
        tau: Tau = TauBetween(noisy[-1], noisy[0]) if noisy else 0.0
        solver = SASolver(
            self.predictor_order,
            self.corrector_order,
            tau=tau,
            predicts="x0" if self.algorithm_type == "data_prediction" else "eps",
            taper=self._taper(evaluated, steps),
        )
        return bounded(solver, self)
