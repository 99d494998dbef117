"""Which training timesteps, and which noise levels, a run visits."""

from __future__ import annotations

import numpy as np

Levels = list[float]


def leading(steps: int, training_steps: int, offset: int = 0, *, extra: int = 0) -> Levels:
    """Every ``training_steps // (steps + extra)``-th timestep from ``offset``, the largest first.

    ``extra = 1`` leaves room for a last step to timestep 0, as DPM-Solver counts.
    """
    ratio = training_steps // (steps + extra)
    return [float(i * ratio + offset) for i in range(steps + extra - 1, extra - 1, -1)]


def trailing(steps: int, training_steps: int) -> Levels:
    """From the last timestep down in even parts (Lin et al., arXiv:2305.08891, table 2)."""
    return [float(t) - 1.0 for t in np.arange(training_steps, 0, -training_steps / steps).round()][:steps]


def linspace(steps: int, training_steps: int, *, extra: int = 0, rounded: bool = True) -> Levels:
    """Evenly from the last timestep to 0, both included (0 is left out with ``extra = 1``)."""
    even = np.linspace(0, training_steps - 1, steps + extra, dtype=np.float64 if rounded else np.float32)
    return [float(t) for t in (even.round() if rounded else even)[::-1][:steps]]


def at_timesteps(timesteps: Levels, training_sigmas: tuple[float, ...]) -> Levels:
    """sigma at each timestep, linear between training timesteps."""
    return [float(s) for s in np.interp(timesteps, np.arange(len(training_sigmas)), training_sigmas)]


def log_linear(steps: int, sigma_min: float, sigma_max: float) -> Levels:
    """``steps`` levels, the first of an even division in log sigma that would reach ``sigma_min`` one later."""
    return [float(s) for s in np.exp(np.linspace(np.log(sigma_max), np.log(sigma_min), steps + 1))[:steps]]


def karras(steps: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Levels:
    """Even in ``sigma^(1 / rho)`` (Karras et al., arXiv:2206.00364, eq. 5)."""
    roots = np.linspace(sigma_max ** (1 / rho), sigma_min ** (1 / rho), steps)
    return [float(s) for s in roots**rho]
