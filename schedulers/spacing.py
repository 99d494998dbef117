"""Which training timesteps, and which noise levels, a run visits: floats in, floats out, the largest first."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from ..core.errors import BadInput, closest

Levels = list[float]

Spacing = Callable[[int, float, float], Levels]
"""``(steps, sigma_min, sigma_max) -> levels``, falling from sigma_max; a run goes on from the last to its own end."""

# --- training timesteps


def leading(steps: int, training_steps: int, offset: int = 0, *, extra: int = 0) -> Levels:
    """Every ``training_steps // (steps + extra)``-th timestep from ``offset``.

    ``extra = 1`` leaves room for a last step to timestep 0, as DPM-Solver counts.
    """
    ratio = training_steps // (steps + extra)
    return [float(i * ratio + offset) for i in range(steps + extra - 1, extra - 1, -1)]


def trailing(steps: int, training_steps: int, *, clipped: int = 0) -> Levels:
    """From the last timestep down in even parts (Lin et al., arXiv:2305.08891, table 2); ``clipped`` ones are left out."""
    return [float(t) - 1.0 for t in np.arange(training_steps - clipped, 0, -training_steps / steps).round()][:steps]


def linspace(steps: int, training_steps: int, *, extra: int = 0, rounded: bool = True) -> Levels:
    """Evenly from the last timestep to 0, both included (0 is left out with ``extra = 1``)."""
    even = np.linspace(0, training_steps - 1, steps + extra, dtype=np.float64 if rounded else np.float32)
    return [float(t) for t in (even.round() if rounded else even)[::-1][:steps]]


def distilled(steps: int, training_steps: int, original_steps: int) -> Levels:
    """``steps`` of the ``original_steps`` timesteps a consistency model was distilled at (Luo et al., arXiv:2310.04378).

    Those are trailing ones of stride ``training_steps // original_steps``; at most ``original_steps`` can be had.
    """
    stride = training_steps // original_steps
    chosen = np.floor(np.linspace(0, original_steps, steps, endpoint=False))
    return [float((original_steps - i) * stride - 1) for i in chosen]


def at_timesteps(timesteps: Levels, training_sigmas: tuple[float, ...]) -> Levels:
    """sigma at each timestep, linear between training timesteps."""
    return [float(s) for s in np.interp(timesteps, np.arange(len(training_sigmas)), training_sigmas)]


# --- noise levels: from sigma_max to sigma_min, both exactly; one step has sigma_max alone


def karras(steps: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Levels:
    """Even in ``sigma^(1 / rho)`` (Karras et al., arXiv:2206.00364, eq. 5)."""
    roots = np.linspace(sigma_max ** (1 / rho), sigma_min ** (1 / rho), steps)
    return _pinned(roots**rho, sigma_min, sigma_max)


def polyexponential(steps: int, sigma_min: float, sigma_max: float, rho: float = 1.0) -> Levels:
    """``log sigma`` falls as a power of what is left of the run (k-diffusion's ``get_sigmas_polyexponential``).

    ``rho`` above 1 spends more steps at low noise; 1 is :func:`exponential`.
    """
    low, high = math.log(sigma_min), math.log(sigma_max)
    return _pinned(np.exp(low + np.linspace(1, 0, steps) ** rho * (high - low)), sigma_min, sigma_max)


def exponential(steps: int, sigma_min: float, sigma_max: float) -> Levels:
    """Even in ``log sigma`` (Lu et al., arXiv:2206.00927, sect. 3.3; k-diffusion's ``get_sigmas_exponential``).

    diffusers' ``use_lu_lambdas`` is this too: even in ``lambda^(1 / rho)``, but with rho fixed at 1.
    """
    return polyexponential(steps, sigma_min, sigma_max)


def beta(steps: int, sigma_min: float, sigma_max: float, a: float = 0.6, b: float = 0.6) -> Levels:
    """Quantiles of a beta distribution, dense at both ends (Lee et al., arXiv:2407.12173, sect. 4).

    Over sigma, as diffusers has it; the paper and ComfyUI take them over training time.
    """
    from scipy.special import betaincinv  # imported here because it is slow to

    quantiles = betaincinv(a, b, np.linspace(1, 0, steps))
    return _pinned(sigma_min + quantiles * (sigma_max - sigma_min), sigma_min, sigma_max)


def kl_optimal(steps: int, sigma_min: float, sigma_max: float) -> Levels:
    """Even in ``atan sigma``: the least KL divergence for Gaussian data (Sabour et al., arXiv:2404.14507, eq. 23)."""
    return _pinned(np.tan(np.linspace(math.atan(sigma_max), math.atan(sigma_min), steps)), sigma_min, sigma_max)


# The authors' levels of 10 steps, https://research.nvidia.com/labs/toronto-ai/AlignYourSteps/howto.html
_ALIGNED: dict[str, tuple[float, ...]] = {
    "sd": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    "sdxl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
    "svd": (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002),
}


def align_your_steps(steps: int, sigma_min: float, sigma_max: float, table: str = "sd") -> Levels:
    """Levels optimised for one model (Sabour et al., arXiv:2404.14507), between them log-linear as the authors say.

    The lowest of the ``steps + 1`` levels is left out: a run goes on from the last but one to its own end.

    Args:
        table: "sd" (Stable Diffusion 1.5), "sdxl" or "svd" (Stable Video Diffusion).

    Raises:
        BadInput: the table is of a model with another highest noise level.
    """
    levels = _ALIGNED[table]
    if not math.isclose(sigma_max, levels[0], rel_tol=1e-3):
        raise BadInput(
            f"The align-your-steps table of {table} begins at sigma {levels[0]:g}, but this run at {sigma_max:.4g}: "
            "take the table of this model, or another spacing."
        )
    logs = np.interp(np.linspace(0, 1, steps + 1), np.linspace(0, 1, len(levels)), np.log(levels))
    return [float(sigma) for sigma in np.exp(logs[:steps])]


def linear_quadratic(steps: int, sigma_max: float, threshold: float = 0.025, linear_steps: int | None = None) -> Levels:
    """Linear from ``sigma_max`` down by ``threshold`` of it, then quadratic to 0, which is left out.

    Genmo's Mochi 1 (``linear_quadratic_schedule`` in its ``infer.py``), scaled by ``sigma_max`` as ComfyUI does.

    Args:
        linear_steps: by default half of the steps.
    """
    linear = steps // 2 if linear_steps is None else linear_steps
    if not linear:
        return [sigma_max]
    slope, rest = threshold / linear, steps - linear
    bend = (1.0 - threshold - slope * rest) / rest**2  # so that it reaches 1 after all steps
    gone = [slope * i + bend * max(0, i - linear) ** 2 for i in range(steps)]
    return [sigma_max * (1.0 - part) for part in gone]


SPACINGS: dict[str, Spacing] = {
    "align-your-steps": align_your_steps,
    "align-your-steps-svd": lambda steps, low, high: align_your_steps(steps, low, high, "svd"),
    "align-your-steps-xl": lambda steps, low, high: align_your_steps(steps, low, high, "sdxl"),
    "beta": beta,
    "exponential": exponential,
    "karras": karras,
    "kl-optimal": kl_optimal,
    "linear-quadratic": lambda steps, low, high: linear_quadratic(steps, high),
    "lu": exponential,
    "polyexponential": polyexponential,
}
"""By the names of chain files."""


def named(spacing: Spacing | str, steps: int, sigma_min: float, sigma_max: float) -> Levels:
    """The levels of a spacing in :data:`SPACINGS`, or of one's own; BadInput if there is none of that name."""
    if callable(spacing):
        return spacing(steps, sigma_min, sigma_max)
    if spacing not in SPACINGS:
        known = [*SPACINGS, "leading", "trailing", "linspace"]
        use = f": use one of {', '.join(known)}, or sigmas of your own."
        raise BadInput(f"There is no spacing {spacing!r}{closest(spacing, known) or use}")
    return SPACINGS[spacing](steps, sigma_min, sigma_max)


def _pinned(levels: np.ndarray, sigma_min: float, sigma_max: float) -> Levels:
    """As floats, with the ends free of rounding: a run that ends at ``sigma_min`` must not step there twice."""
    return [sigma_max, *(float(level) for level in levels[1:-1]), sigma_min][: len(levels)]
