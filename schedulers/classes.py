"""What diffusers' scheduler classes have in common as data: options, and the (schedule, solver) they stand for.

"Scheduler" is diffusers' word for a schedule and a solver together; it is used here only for its files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Annotated, ClassVar, Literal, Self, TypedDict, Unpack

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from ..core.errors import BadInput
from ..core.prediction import Kind
from ..core.schedule import Schedule, timestep_of
from ..core.solver import Solver
from . import spacing as spacings
from .spacing import Levels, Spacing
from .training import ZERO_SNR, BetaSchedule, sigmas_of, training_alphas


def renamed(names: Mapping[str, str]) -> BeforeValidator:
    """Takes values by other names too, as diffusers does."""
    return BeforeValidator(lambda value: names.get(value, value) if isinstance(value, str) else value)


_KINDS: dict[str, Kind] = {"epsilon": "epsilon", "v_prediction": "v", "sample": "x0"}

PredictionType = Annotated[Literal["epsilon", "v_prediction", "sample"], renamed({"original_sample": "sample"})]
"""The network's, whichever solver is taken: all of ours take all three, where some of diffusers' refuse "sample"."""


HIGHEST = 1e7
"""The highest level of one's own; those of zero terminal SNR are a tenth of it."""


class Given(TypedDict, total=False):
    """The ways to give levels; see :meth:`SchedulerConfig.sampling`."""

    spacing: Spacing | str | None
    sigmas: Sequence[float] | None
    timesteps: Sequence[float] | None


class SchedulerConfig(BaseModel):
    """What every diffusers scheduler is configured with, and the run it stands for.

    Subclasses are its classes; a field's default is that class's, a ``Literal`` lists what is honoured. They say what
    their own levels are (:meth:`_own`), where those end (:meth:`_last_sigma`) and who walks them (:meth:`_solver`).
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    name: ClassVar[str]
    takes_eta: ClassVar[bool] = False
    brownian: ClassVar[bool] = False
    """Whether its noise is one path for the whole run, so that other steps leave the picture what it is."""
    scales_input: ClassVar[bool] = False
    """Whether its latents in diffusers are of standard deviation ``sqrt(1 + sigma^2)`` and scaled for the UNet."""

    num_train_timesteps: int = Field(1000, ge=1)
    prediction_type: PredictionType = "epsilon"

    @property
    def kind(self) -> Kind:
        """What the UNet predicts."""
        return _KINDS[self.prediction_type]

    @property
    def continuous(self) -> bool:
        """Whether the UNet is told ``ln(sigma) / 4`` instead of a training timestep."""
        return False

    @property
    def own_spacing(self) -> str | None:
        """The spacing by noise level that the config asks for, if it does."""
        return None

    def sampling(
        self,
        steps: int | None = None,
        *,
        spacing: Spacing | str | None = None,
        sigmas: Sequence[float] | None = None,
        timesteps: Sequence[float] | None = None,
        eta: float = 0.0,
        faithful: bool = False,
    ) -> tuple[Schedule, Solver]:
        """The noise levels of a run, and the solver of this class for them.

        Args:
            steps: as diffusers counts; follows from ``sigmas`` or ``timesteps``. The steps of single-step DPM-Solver are
                fewer, as each takes several of them, and so are those of a run whose last one would be empty.
            spacing: instead of the config's, levels over all of training's by one of
                :data:`unrolled.schedulers.spacing.SPACINGS` or a function like those; or timesteps that are "leading",
                "trailing" or "linspace".
            sigmas: levels of your own, falling; without a 0 at the end they end where this class's do.
            timesteps: training timesteps of your own, falling, fractions allowed.
            eta: DDIM's, 0 (deterministic) to 1 (DDPM), or TCD's gamma.
            faithful: repeat what diffusers does even where it is wrong (docs/departures.md).

        Raises:
            BadInput: the training timesteps do not allow so many steps, levels are given in several ways or do not
                fall, or eta is out of range or without effect.
        """
        if not 0.0 <= eta <= 1.0:
            raise BadInput(f"eta goes from 0 (deterministic) to 1 (new noise in every step), got {eta:g}.")
        if spacing in ("leading", "trailing", "linspace"):
            return self._by_timesteps(str(spacing)).sampling(
                steps, sigmas=sigmas, timesteps=timesteps, eta=eta, faithful=faithful
            )
        if eta and not self.takes_eta:
            raise BadInput(f"eta is for ddim and tcd, and this solver is {self.name}: leave eta out, or take one of them.")
        told, levels = self._asked(steps, spacing, sigmas, timesteps)
        end = levels[-1] if len(levels) > len(told) else min(levels[-1], self._last_sigma())
        # A last level already there would make an empty step.
        keep = len(told) if levels[len(told) - 1] > end else len(told) - 1
        if not keep:
            raise BadInput(f"There is no step to take: these levels begin at sigma {end:.4g}, where {self.name} ends.")
        listed = "sigmas" if sigmas is not None else "timesteps" if timesteps is not None else None
        evaluated = Schedule(
            (*levels[:keep], end),
            tuple(told[:keep]),
            self.training_sigmas(),
            self._start_std(levels[0]),
            continuous=self.continuous,
            origin=f"{self.name}, {getattr(spacing, '__name__', spacing) or listed or self._spacing_name()}",
        )
        return self._boundaries(evaluated, len(told)), self._solver(evaluated, len(told), eta, faithful)

    def schedule(self, steps: int | None = None, **levels: Unpack[Given]) -> Schedule:
        """The noise levels of :meth:`sampling`."""
        return self.sampling(steps, **levels)[0]

    def solver(
        self, steps: int | None = None, *, eta: float = 0.0, faithful: bool = False, **levels: Unpack[Given]
    ) -> Solver:
        """The solver of :meth:`sampling`."""
        return self.sampling(steps, eta=eta, faithful=faithful, **levels)[1]

    def training_sigmas(self) -> tuple[float, ...]:
        """sigma of every training timestep, or the lowest and the highest where the network is told noise levels."""
        raise NotImplementedError

    def _by_timesteps(self, spacing: str) -> SchedulerConfig:
        raise BadInput(f"{self.name} has timesteps of its own: leave spacing = {spacing!r} out.")

    def _asked(
        self,
        steps: int | None,
        spacing: Spacing | str | None,
        sigmas: Sequence[float] | None,
        timesteps: Sequence[float] | None,
    ) -> tuple[Levels, Levels]:
        """What the UNet is told at each level, and the levels, which may be followed by the one where they end."""
        if sum(way is not None for way in (spacing, sigmas, timesteps)) > 1:
            raise BadInput("The levels of a run are given by one of spacing, sigmas and timesteps: leave the others out.")
        if sigmas is not None:
            levels = _falling("sigmas", sigmas, HIGHEST)
            told = self._told(levels if levels[-1] else levels[:-1])
        elif timesteps is not None:
            told = _falling("timesteps", timesteps, self.num_train_timesteps - 1)
            levels = self._levels_at(told)
            told = self._told(levels) if self.continuous else told
        elif steps is None:
            raise BadInput("A run has a number of steps, or sigmas or timesteps of your own: give one of them.")
        elif not 1 <= steps <= self.num_train_timesteps:
            raise BadInput(
                f"Steps go from 1 to {self.num_train_timesteps} (the training timesteps of this model), got {steps}."
            )
        else:
            return self._levels(steps, spacing)
        if steps is not None and steps != len(told):
            raise BadInput(f"{steps} steps were asked for, but levels for {len(told)} given: leave steps out.")
        return told, levels

    def _levels(self, steps: int, spacing: Spacing | str | None) -> tuple[Levels, Levels]:
        name = self.own_spacing if spacing is None else spacing
        if name is None:
            return self._own(steps)
        levels = spacings.named(name, steps, *self._range(steps if spacing is None else None))
        return self._told(levels, name), levels

    def _told(self, levels: Levels, spacing: Spacing | str | None = None) -> Levels:
        if self.continuous:
            return [0.25 * math.log(sigma) for sigma in levels]
        table = self.training_sigmas()
        timesteps = [timestep_of(sigma, table) for sigma in levels]
        return [float(round(t)) for t in timesteps] if self._rounds(spacing) else timesteps

    def _rounds(self, spacing: Spacing | str | None) -> bool:
        """Whether diffusers rounds the timesteps that the UNet is told at the levels of a spacing by noise level."""
        return False

    def _levels_at(self, timesteps: Levels) -> Levels:
        raise BadInput(f"{self.name} knows noise levels but no training timesteps: give sigmas instead of timesteps.")

    def _own(self, steps: int) -> tuple[Levels, Levels]:
        raise NotImplementedError

    def _range(self, steps: int | None) -> tuple[float, float]:
        """Lowest and highest level of the config's own spacing by noise level, or of training's (None)."""
        raise NotImplementedError

    def _last_sigma(self) -> float:
        return 0.0

    def _start_std(self, sigma: float) -> float:
        return math.sqrt(1.0 + sigma**2)

    def _spacing_name(self) -> str:
        return self.own_spacing or "linspace"

    def _boundaries(self, evaluated: Schedule, steps: int) -> Schedule:
        """The steps of a run, of all the levels that it evaluates at; diffusers plans ``steps`` of those."""
        return evaluated

    def _solver(self, evaluated: Schedule, steps: int, eta: float, faithful: bool) -> Solver:
        """For these levels, which diffusers plans as so many steps (the last may be an empty one)."""
        raise NotImplementedError


class TrainedConfig(SchedulerConfig):
    """Trained on noise levels that betas give."""

    snr_floor: ClassVar[float] = ZERO_SNR

    beta_start: float = Field(0.0001, gt=0.0, lt=1.0)
    beta_end: float = Field(0.02, gt=0.0, lt=1.0)
    beta_schedule: BetaSchedule = "linear"
    trained_betas: tuple[float, ...] | None = None
    rescale_betas_zero_snr: bool = False

    @model_validator(mode="after")
    def _a_beta_each(self) -> Self:
        if self.trained_betas is not None and len(self.trained_betas) != self.num_train_timesteps:
            raise ValueError(f"{len(self.trained_betas)} betas for {self.num_train_timesteps} training timesteps")
        return self

    def training_sigmas(self) -> tuple[float, ...]:
        """sigma of every training timestep."""
        zero_snr = self.rescale_betas_zero_snr
        alphas = training_alphas(
            self.num_train_timesteps, self.beta_start, self.beta_end, self.beta_schedule, self.trained_betas, zero_snr
        )
        return sigmas_of(alphas, self.snr_floor if zero_snr else ZERO_SNR)

    def _own(self, steps: int) -> tuple[Levels, Levels]:
        timesteps = self._timesteps(steps)
        sigmas = self._levels_at(timesteps)
        if len(set(sigmas)) < len(sigmas) or not 0 <= timesteps[-1] <= timesteps[0] <= self.num_train_timesteps - 1:
            raise BadInput(
                f"{steps} steps with {self._spacing_name()} spacing do not fit into {self.num_train_timesteps} training "
                "timesteps: take fewer steps or another spacing."
            )
        return timesteps, sigmas

    def _levels_at(self, timesteps: Levels) -> Levels:
        return spacings.at_timesteps(timesteps, self.training_sigmas())

    def _timesteps(self, steps: int) -> Levels:
        raise NotImplementedError

    def _range(self, steps: int | None) -> tuple[float, float]:
        table = self.training_sigmas()
        return table[0], table[-1]


class SpacedConfig(TrainedConfig):
    """Run on training timesteps that can be chosen in three ways."""

    timestep_spacing: Literal["leading", "trailing", "linspace"] = "leading"
    steps_offset: int = Field(0, ge=0)

    def _by_timesteps(self, spacing: str) -> SchedulerConfig:
        flags = [name for name in type(self).model_fields if name.startswith("use_")]
        return self.model_copy(update={"timestep_spacing": spacing} | dict.fromkeys(flags, False))

    def _timesteps(self, steps: int) -> Levels:
        return self._spaced(steps)

    def _spaced(self, steps: int, *, rounded: bool = True, extra: int = 0, clipped: int = 0) -> Levels:
        if self.timestep_spacing == "leading":
            return spacings.leading(steps, self.num_train_timesteps - clipped, self.steps_offset, extra=extra)
        if self.timestep_spacing == "trailing":
            return spacings.trailing(steps, self.num_train_timesteps, clipped=clipped)
        return spacings.linspace(steps, self.num_train_timesteps - clipped, extra=extra, rounded=rounded)

    def _spacing_name(self) -> str:
        return self.own_spacing or self.timestep_spacing


def _falling(name: str, given: Sequence[float], highest: float) -> Levels:
    """``given`` as numbers; BadInput unless they begin above 0 and fall strictly, to 0 at the lowest."""
    values = [float(value) for value in given]
    if not values or not 0.0 < values[0] <= highest or not all(a > b >= 0.0 for a, b in pairwise(values)):
        shown = " ".join(f"{value:g}" for value in values) or "none"
        raise BadInput(
            f"The {name} of a run begin above 0 and at most at {highest:g} and fall strictly, to 0 at the lowest, "
            f"got {shown}."
        )
    return values
