"""What a UNet is told of the time: sines and cosines of the timestep at falling frequencies.

It depends on the timestep alone, not on the latents, the prompt or the picture. The schedule of a run is known before
its first step, so that one call makes the embeddings of all its steps (30 x 320 numbers), and the two layers of the
network that follow can be run on them at once as well: what is left of a step is reading a row. That is how to use it;
the kernel is here so that it is one launch where eager torch has eight.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..core.errors import BadInput
from .backends import Choice, ours


def timestep_embedding(
    timesteps: Tensor,
    dim: int,
    *,
    flip_sin_to_cos: bool = True,
    freq_shift: float = 0.0,
    max_period: float = 10_000.0,
    backend: Choice = "auto",
) -> Tensor:
    """``sin(t * f), cos(t * f)`` for ``f = max_period ** (-i / (dim // 2 - freq_shift))`` (arXiv:1706.03762, sec. 3.5).

    Args:
        timesteps: (n,), 0 to 999 as a rule, with fractions too.
        dim: of one embedding; an odd one ends in a 0.
        flip_sin_to_cos: cosines first, as all of our networks have it.
        freq_shift: 0 for all of them; 1 makes the last frequency ``1 / max_period``.
        max_period: of the slowest sine, in 2 pi timesteps.
        backend: "auto" is torch's own.

    Returns:
        (n, dim) in float32: diffusers' Timesteps.

    Raises:
        BadInput: there is nothing to divide by, or our kernel cannot run here.
    """
    if timesteps.ndim != 1 or dim < 2 or dim // 2 <= freq_shift:
        raise BadInput(
            f"Embeddings are of (n,) timesteps and of 2 numbers or more, twice the shift of frequencies, but were asked "
            f"for {tuple(timesteps.shape)} in {dim} with a shift of {freq_shift:g}."
        )
    timesteps = timesteps.to(torch.float32)
    if ours("timestep_embedding", backend, timesteps):
        out: Tensor = fused(timesteps, dim, flip_sin_to_cos, freq_shift, max_period)
        return out
    return reference(timesteps, dim, flip_sin_to_cos, freq_shift, max_period)


def reference(timesteps: Tensor, dim: int, flip_sin_to_cos: bool, freq_shift: float, max_period: float) -> Tensor:
    """In plain torch, in the timesteps' dtype."""
    i = torch.arange(dim // 2, dtype=timesteps.dtype, device=timesteps.device)
    angle = timesteps[:, None] * torch.exp(-math.log(max_period) * i / (dim // 2 - freq_shift))
    halves = (angle.cos(), angle.sin()) if flip_sin_to_cos else (angle.sin(), angle.cos())
    return torch.cat([*halves, torch.zeros_like(angle[:, : dim % 2])], -1)


@torch.library.custom_op("unrolled::timestep_embedding", mutates_args=())
def fused(timesteps: Tensor, dim: int, flip_sin_to_cos: bool, freq_shift: float, max_period: float) -> Tensor:
    """Our kernel."""
    from .timestep_embedding_kernel import launch

    return launch(timesteps, dim, flip_sin_to_cos, freq_shift, max_period)


@fused.register_fake
def _(timesteps: Tensor, dim: int, flip_sin_to_cos: bool, freq_shift: float, max_period: float) -> Tensor:
    return timesteps.new_empty((len(timesteps), dim), dtype=torch.float32)
