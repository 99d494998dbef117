"""Classifier-free guidance: wraps a conditional denoiser, so that the loop never knows of it."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .conditioning import Conditioning, stack
from .denoiser import ConditionalDenoiser, Denoiser
from .errors import BadInput
from .prediction import Prediction
from .schedule import Schedule

GuidanceScale = float | Callable[[float], float]
"""One scale, or the scale at a noise level."""


def classifier_free(
    network: ConditionalDenoiser,
    cond: Conditioning,
    uncond: Conditioning,
    guidance_scale: GuidanceScale = 7.5,
    *,
    rescale: float = 0.0,
    batched: bool = True,
) -> Denoiser:
    """``uncond + guidance_scale * (cond - uncond)`` (Ho & Salimans, arXiv:2207.12598, eq. 6, with guidance_scale = 1 + w).

    Args:
        guidance_scale: at 1 or below no unconditional pass is run. :func:`per_step` and
            :func:`within` give one per step or for an interval of steps.
        rescale: 0 to 1, how far to take the standard deviation of the guided output back to the
            conditional one's (Lin et al., arXiv:2305.08891, eq. 14–16).
        batched: one UNet call for both; ``False`` calls one after the other to save memory.
    """
    if not 0.0 <= rescale <= 1.0:
        raise BadInput(f"Guidance rescale goes from 0 (off) to 1, got {rescale:g}.")
    together, pair = batched and cond.stackable(uncond), paired(cond, uncond)

    def both(x: Tensor, sigma: float, timestep: float) -> tuple[Prediction, Tensor, Tensor]:
        """The conditional prediction, but for its output, and the two outputs."""
        if not together:
            without = network(x, sigma, timestep, uncond).out
            prediction = network(x, sigma, timestep, cond)
            return prediction, without, prediction.out
        n = len(x)
        prediction = network(torch.cat([x, x]), sigma, timestep, pair(n))
        if prediction.variance is not None:
            prediction = replace(prediction, variance=prediction.variance[n:])
        without, with_ = prediction.out.chunk(2)
        return prediction, without, with_

    def denoise(x: Tensor, sigma: float, timestep: float) -> Prediction:
        scale = guidance_scale(sigma) if callable(guidance_scale) else guidance_scale
        if scale <= 1.0:
            return network(x, sigma, timestep, cond)
        prediction, without, with_ = both(x, sigma, timestep)
        out = torch.lerp(without, with_, scale)
        if rescale:
            out = rescaled(out, with_, rescale)
        return replace(prediction, out=out, x=x, cond=with_, uncond=without)

    return denoise


def paired(cond: Conditioning, uncond: Conditioning) -> Callable[[int], Conditioning]:
    """Both as one batch for so many images, ``uncond`` first: the same object at every step, until one is written to."""
    made: dict[int, tuple[tuple[int, ...], Conditioning]] = {}

    def pair(count: int) -> Conditioning:
        edits = cond.edits() + uncond.edits()
        if count not in made or made[count][0] != edits:
            made[count] = edits, stack([uncond.expand(count), cond.expand(count)])
        return made[count][1]

    return pair


def rescaled(guided: Tensor, cond: Tensor, amount: float) -> Tensor:
    """``guided`` with its standard deviation per image taken ``amount`` of the way to that of ``cond``."""
    dims = list(range(1, guided.ndim))
    ratio = cond.std(dims, keepdim=True) / guided.std(dims, keepdim=True)
    return guided * (amount * ratio + (1.0 - amount))


def per_step(schedule: Schedule, scales: Sequence[float]) -> Callable[[float], float]:
    """A guidance scale for each step, as a function of sigma.

    A second call at a step's end (Heun's, say) takes the scale of the step that starts there.
    """
    if len(scales) != len(schedule):
        raise BadInput(
            f"{len(scales)} guidance scales were given for a schedule of {len(schedule)} steps: give one per step."
        )
    rising = [-sigma for sigma in schedule.sigmas]

    def scale(sigma: float) -> float:
        # The last step that starts at or above this level.
        index = bisect_left(rising, -sigma)
        started = index if index < len(rising) and rising[index] == -sigma else index - 1
        return scales[min(max(started, 0), len(scales) - 1)]

    return scale


def within(schedule: Schedule, start: int, stop: int, guidance_scale: float) -> Callable[[float], float]:
    """Guidance in steps ``start`` to ``stop - 1`` only (Kynkäänniemi et al., arXiv:2404.07724)."""
    if not 0 <= start < stop <= len(schedule):
        raise BadInput(f"Guidance from step {start} to {stop} does not lie within {len(schedule)} steps.")
    return per_step(schedule, [guidance_scale if start <= i < stop else 1.0 for i in range(len(schedule))])
