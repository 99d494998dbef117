"""The noise levels a model was trained on, from its betas."""

from __future__ import annotations

import math
from functools import cache
from itertools import pairwise
from typing import Literal

import torch

BetaSchedule = Literal["linear", "scaled_linear", "squaredcos_cap_v2"]

ZERO_SNR = 2.0**-40
"""What a zero terminal alpha-bar is floored at, so that its sigma is finite (2^20). diffusers' sigma
schedulers floor at 2^-24, its variance-preserving ones not at all; this serves both to float rounding."""


@cache
def training_alphas(
    steps: int,
    beta_start: float,
    beta_end: float,
    beta_schedule: BetaSchedule = "linear",
    trained_betas: tuple[float, ...] | None = None,
    zero_snr: bool = False,
) -> tuple[float, ...]:
    """alpha-bar of every training timestep, in float32 as checkpoints were trained.

    Args:
        beta_schedule: "linear" (Ho et al., arXiv:2006.11239), "scaled_linear" (linear in the root;
            latent diffusion) or "squaredcos_cap_v2" (Nichol & Dhariwal, arXiv:2102.09672, eq. 17).
        zero_snr: shift and scale so that the last one is 0 (Lin et al., arXiv:2305.08891, alg. 1).
    """
    if trained_betas is not None:
        betas = torch.tensor(trained_betas, dtype=torch.float32)
    elif beta_schedule == "linear":
        betas = torch.linspace(beta_start, beta_end, steps)
    elif beta_schedule == "scaled_linear":
        betas = torch.linspace(beta_start**0.5, beta_end**0.5, steps) ** 2
    else:
        bars = [math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(steps + 1)]
        betas = torch.tensor([min(1 - b / a, 0.999) for a, b in pairwise(bars)])
    alphas = torch.cumprod(1.0 - betas, 0)
    if zero_snr:
        root = alphas.sqrt()
        root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
        alphas = root**2
        # Through betas and back as diffusers does, which rounds the early ones.
        alphas = torch.cumprod(torch.cat([alphas[:1], 1 - (1 - alphas[1:] / alphas[:-1])]), 0)
    return tuple(alphas.double().tolist())


@cache
def sigmas_of(alphas: tuple[float, ...], zero_snr_floor: float = ZERO_SNR) -> tuple[float, ...]:
    """sigma = sqrt((1 - alpha-bar) / alpha-bar) of each."""
    return tuple(math.sqrt((1.0 - a) / a) for a in (max(alpha, zero_snr_floor) for alpha in alphas))
