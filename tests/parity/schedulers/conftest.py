"""diffusers' schedulers driven by hand, and ours, on the same network, start and noise."""

from __future__ import annotations

import contextlib
import inspect
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor
from unrolled.core.latents import Latents, LatentSpace
from unrolled.core.loop import steps as steps_of
from unrolled.core.noise import DiffusersNoise, Levels, NoiseSource
from unrolled.core.prediction import Prediction, preconditioning
from unrolled.core.solver import Solver
from unrolled.schedulers.config import read_scheduler

SPACE = LatentSpace("test", 4, 1, 1.0, "0" * 16)
SHAPE = (2, 4, 2, 2)
SEED = 7


@dataclass
class Trajectory:
    """One run: what the network was shown (of variance preserved) and told at every evaluation, and the end.

    ``draws`` is the noise of diffusers' run, ``after_empty_step`` where a last step that goes nowhere took it all the same.
    """

    shown: list[Tensor] = field(default_factory=list)
    told: list[float] = field(default_factory=list)
    end: Tensor = field(default_factory=lambda: torch.zeros(0))
    draws: list[Tensor] = field(default_factory=list)
    after_empty_step: Tensor | None = None

    def gap(self, other: Trajectory) -> float:
        """The largest difference of anything shown, or of the end, as part of the largest value there in the other."""
        assert len(self.shown) == len(other.shown), f"{len(self.shown)} evaluations, {len(other.shown)} in the other"
        pairs = zip([*self.shown, self.end], [*other.shown, other.end], strict=True)
        gaps = [float((a.double() - b.double()).abs().max() / b.double().abs().max()) for a, b in pairs]
        return math.inf if any(math.isnan(gap) for gap in gaps) else max(gaps)


def network(x: Tensor) -> Tensor:
    """Smooth, elementwise, and no function of the timestep: what it is told is compared on its own."""
    return 0.9 * x / torch.sqrt(1 + 0.3 * x * x) + 0.2 * torch.cos(2 * x)


def start(dtype: torch.dtype) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)


# --- theirs


class _In64:
    """A module whose ``float32`` is ``float64``; but timesteps that are rounded to float32 stay so, as ours are."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, "float64" if name == "float32" else name)

    def linspace(self, *args: Any, dtype: Any = None, **more: Any) -> Any:
        return self._module.linspace(*args, dtype=np.float32 if dtype in (float, np.float64) else dtype, **more)


@contextlib.contextmanager
def _calculating_in(dtype: torch.dtype, scheduler: Any) -> Iterator[None]:
    """diffusers' scheduler with its float32 tables as they are, but in float64 from there on, as the judge."""
    if dtype == torch.float32:
        yield
        return
    if hasattr(scheduler, "alphas_cumprod"):
        alphas = scheduler.alphas_cumprod.double()
        tables = {"alphas_cumprod": alphas, "alpha_t": alphas.sqrt(), "sigma_t": (1 - alphas).sqrt()}
        tables["lambda_t"] = tables["alpha_t"].log() - tables["sigma_t"].log()
        tables["alphas"] = torch.cat([alphas[:1], alphas[1:] / alphas[:-1]])
        tables["betas"] = 1 - tables["alphas"]
        for name in [*tables, "final_alpha_cumprod", "one"]:
            if hasattr(scheduler, name):
                setattr(scheduler, name, tables.get(name, getattr(scheduler, name).double()))
    module = sys.modules[type(scheduler).__module__]
    with mock.patch.multiple(module, torch=_In64(torch), np=_In64(np), create=True):
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)


def theirs(
    name: str, options: dict[str, Any], steps: int, dtype: torch.dtype = torch.float32, **more: Any
) -> Trajectory | None:
    """diffusers' scheduler; ``more`` goes to its ``step``.

    A last step that goes nowhere is taken off: the end is what the network was shown there. None where the first
    timestep, cut or rounded to a whole one, comes again: diffusers then starts there instead.
    """
    run, scheduler = Trajectory(), _made(name, options)
    with _calculating_in(dtype, scheduler), _recording(run, scheduler):
        scheduler.set_timesteps(steps)
        if "generator" in inspect.signature(scheduler.step).parameters:
            more["generator"] = torch.Generator().manual_seed(SEED)
        x, run.told = start(dtype) * scheduler.init_noise_sigma, scheduler.timesteps.tolist()
        if run.told[0] in run.told[1:] and hasattr(scheduler, "index_for_timestep"):
            return None
        for i, timestep in enumerate(scheduler.timesteps):
            if name == "UnCLIPScheduler":  # as its pipelines do
                more["prev_timestep"] = int(run.told[i + 1]) if i + 1 < len(run.told) else None
            run.shown.append(scheduler.scale_model_input(x, timestep) if hasattr(scheduler, "scale_model_input") else x)
            x = scheduler.step(network(run.shown[-1]), timestep, x, **more).prev_sample
        before, last = _last_levels(scheduler)
    run.end = x / math.sqrt(1 + last**2) if last and scheduler.init_noise_sigma != 1.0 else x
    if math.isclose(before, last, rel_tol=1e-6):
        run.after_empty_step, run.end = run.end, run.shown.pop()
        run.told.pop()
    return run


def _last_levels(scheduler: Any) -> tuple[float, float]:
    """Where the last step starts and ends; timesteps where the scheduler has no sigmas."""
    if hasattr(scheduler, "sigmas"):
        before, last = scheduler.sigmas[len(scheduler.timesteps) - 1 :][:2].tolist()
        return before, last
    return float(scheduler.timesteps[-1]), 0.0 if scheduler.config.get("set_alpha_to_one") is False else -1.0


def _made(name: str, options: dict[str, Any]) -> Any:
    """The scheduler; some plan a run of all training steps while they are made, which takes 0.2 s and is done with two."""
    kind = getattr(diffusers, name)
    plan = kind.set_timesteps
    with mock.patch.object(kind, "set_timesteps", lambda self, steps, *more: plan(self, 2, *more)):
        return kind(**options)


@contextlib.contextmanager
def _recording(run: Trajectory, scheduler: Any) -> Iterator[None]:
    """Keeps every draw of noise."""
    module = sys.modules[type(scheduler).__module__]
    draw = getattr(module, "randn_tensor", None)

    def drawn(shape: Any, dtype: torch.dtype, **more: Any) -> Tensor:
        assert draw is not None
        # In float32 always, so that a run in float64 has the same noise.
        run.draws.append(draw(shape, dtype=torch.float32, **more).to(dtype))
        return run.draws[-1]

    def tree(x: Tensor, *_: Any) -> Callable[..., Tensor]:
        return lambda sigma, sigma_next: _on_path(float(sigma), float(sigma_next)).to(x)

    with mock.patch.multiple(module, create=True, randn_tensor=drawn, BrownianTreeNoiseSampler=tree):
        yield


def _on_path(sigma: float, sigma_next: float) -> Tensor:
    """In place of a Brownian motion a smooth path, so that rounding a level does not change its noise."""

    def path(sigma: float) -> Tensor:
        cells = torch.arange(math.prod(SHAPE), dtype=torch.float64)
        return torch.sin(5.0 * math.log(sigma) + cells).mul(sigma**0.5)

    return ((path(sigma) - path(sigma_next)) / math.sqrt(abs(sigma - sigma_next))).view(SHAPE)


# --- ours


def ours(
    name: str,
    options: dict[str, Any],
    steps: int,
    noise: NoiseSource | None = None,
    dtype: torch.dtype = torch.float32,
    wrap: Callable[[Solver], Solver] = lambda solver: solver,
    **more: Any,
) -> Trajectory:
    """The same by ``core.loop``; ``more`` goes to the config's ``sampling``."""
    config = read_scheduler({"_class_name": name, **options})
    schedule, solver = config.sampling(steps, **more)
    run, data = Trajectory(), preconditioning(config.kind).sigma_data

    def denoiser(x: Tensor, sigma: float, timestep: float) -> Prediction:
        run.shown.append(x * (1.0 / math.sqrt(sigma**2 + data**2)))
        run.told.append(timestep)
        return Prediction(network(run.shown[-1]), x, sigma, config.kind)

    assert schedule.start_std is not None
    latents = Latents(start(dtype) * schedule.start_std, SPACE, schedule.sigmas[0])
    for step in steps_of(denoiser, latents, schedule, wrap(solver), noise or DiffusersNoise.seeded(SEED)):
        latents = step.latents
    run.end = latents.clean
    return run


def _noise_of(name: str, run: Trajectory, dtype: torch.dtype) -> NoiseSource:
    """The noise of diffusers' run for ours: its generator's, in its order, unless that is not the order of our steps."""
    if dtype == torch.float32 and name not in ("SASolverScheduler", "DPMSolverSDEScheduler"):
        return DiffusersNoise.seeded(SEED)
    in_order = iter(run.draws)

    def source(shape: Sequence[int], purpose: str, step: int = 0, draw: int = 0, levels: Levels | None = None) -> Tensor:
        assert levels is not None
        if name == "SASolverScheduler":  # draws in every step, needed or not
            return run.draws[step]
        return _on_path(*levels) if name == "DPMSolverSDEScheduler" else next(in_order)

    return source


def both(
    name: str, options: dict[str, Any], steps: int, dtype: torch.dtype = torch.float32, *, eta: float = 0.0, **more: Any
) -> tuple[Trajectory, Trajectory] | None:
    """Ours and diffusers', if it has one; ``more`` goes to our ``sampling``."""
    their = theirs(name, options, steps, dtype, **({"eta": eta} if eta or name == "TCDScheduler" else {}))
    if their is None:
        return None
    return ours(name, options, steps, _noise_of(name, their, dtype), dtype, eta=eta, **more), their


@pytest.fixture(scope="session")
def run_both() -> Callable[..., tuple[Trajectory, Trajectory] | None]:
    return both


@pytest.fixture(scope="session")
def run_ours() -> Callable[..., Trajectory]:
    return ours


@pytest.fixture(scope="session")
def run_theirs() -> Callable[..., Trajectory | None]:
    return theirs
