"""The one wrapper between our coordinate and a UNet: input scaling, timestep, parametrisation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from .conditioning import Conditioning
from .errors import BadInput
from .prediction import Kind, Prediction

Denoiser = Callable[[Tensor, float, float], Prediction]
"""``(x, sigma, timestep) -> Prediction``: what the loop calls, and the seam to wrap.

The timestep comes beside sigma because two schedules may tell the UNet different ones at the same
noise level (DPM++ with Karras sigmas rounds them); a closed-form denoiser ignores it.
"""


class ConditionalDenoiser(Protocol):
    """``(x, sigma, timestep, conditioning) -> Prediction``: a network before guidance."""

    def __call__(self, x: Tensor, sigma: float, timestep: float, conditioning: Conditioning, /) -> Prediction:
        """The network's prediction at ``x``."""
        ...


@dataclass(frozen=True)
class UNetDenoiser:
    """A diffusers ``UNet2DConditionModel`` as a conditional denoiser.

    ``x`` may be of any dtype (float32 in the loop); the UNet runs in its own.
    """

    unet: Any
    kind: Kind = "epsilon"

    @cached_property
    def dtype(self) -> torch.dtype:
        """The UNet's precision; kept, because diffusers walks over all parameters to tell it (1 ms a step)."""
        return self.unet.dtype  # type: ignore[no-any-return]

    def __call__(self, x: Tensor, sigma: float, timestep: float, conditioning: Conditioning, /) -> Prediction:
        """Scale the input to unit variance, call the UNet, and say what its output means.

        Raises:
            BadInput: the channels of ``x`` and of the conditioning do not add up to the UNet's, or the
                conditioning holds what this UNet cannot take.
        """
        unet = self.unet
        if unused := conditioning.names() - {"context", "channels"}:
            raise BadInput(f"This UNet is conditioned by context and channels, it cannot take {', '.join(sorted(unused))}.")
        conditioning = conditioning.expand(len(x)).to(x.device, self.dtype)
        scaled = (x * (1.0 / (1.0 + sigma**2) ** 0.5)).to(self.dtype)
        if conditioning.channels is not None:
            scaled = torch.cat([scaled, conditioning.channels], dim=1)
        if scaled.shape[1] != unet.config.in_channels:
            raise BadInput(
                f"This UNet takes {unet.config.in_channels} channels but was given {scaled.shape[1]}: "
                "9 is an inpainting UNet (prepare it with inpaint_channels), 4 a plain one."
            )
        out = unet(scaled, timestep, encoder_hidden_states=conditioning.context, return_dict=False)[0]
        return Prediction(out.to(x.dtype), x, sigma, self.kind)


def conditioned(network: ConditionalDenoiser, cond: Conditioning) -> Denoiser:
    """The network under one conditioning, without guidance."""

    def denoise(x: Tensor, sigma: float, timestep: float) -> Prediction:
        return network(x, sigma, timestep, cond)

    return denoise


def edited(denoiser: Denoiser, edit: Callable[[Prediction], Prediction]) -> Denoiser:
    """The denoiser with every prediction passed through ``edit`` before the solver sees it."""

    def denoise(x: Tensor, sigma: float, timestep: float) -> Prediction:
        return edit(denoiser(x, sigma, timestep))

    return denoise
