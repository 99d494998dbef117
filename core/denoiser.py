"""The one wrapper between our coordinate and a UNet: input scaling, timestep, parametrisation."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from .conditioning import Conditioning
from .errors import BadInput
from .prediction import Kind, Prediction, preconditioning

Denoiser = Callable[[Tensor, float, float], Prediction]
"""``(x, sigma, timestep) -> Prediction``: what the loop calls, and the seam to wrap.

The timestep comes beside sigma because two schedules may tell the UNet different ones at the same
noise level (DPM++ with Karras sigmas rounds them); a closed-form denoiser ignores it.
"""


IMAGE_PROMPTED = "_unrolled_image_prompted"
"""Where a UNet remembers that an IP-Adapter is on it; not a weight, so no ``state_dict`` has it."""


class ConditionalDenoiser(Protocol):
    """``(x, sigma, timestep, conditioning) -> Prediction``: a network before guidance."""

    def __call__(self, x: Tensor, sigma: float, timestep: float, conditioning: Conditioning, /) -> Prediction:
        """The network's prediction at ``x``."""
        ...


@dataclass(frozen=True)
class UNetDenoiser:
    """A diffusers ``UNet2DConditionModel`` as a conditional denoiser.

    ``x`` may be of any dtype (float32 in the loop); the UNet runs in its own. A UNet with twice as many
    output channels as latents learned the variance too (``Prediction.variance``).

    Args:
        scale_input: ``False`` hands ``x`` on as it is, the fault of diffusers' Kandinsky pipelines with
            schedulers whose latents do not keep unit variance (docs/departures.md).
    """

    unet: Any
    kind: Kind = "epsilon"
    scale_input: bool = True

    @cached_property
    def dtype(self) -> torch.dtype:
        """The UNet's precision; kept, because diffusers walks over all parameters to tell it (1 ms a step)."""
        return self.unet.dtype  # type: ignore[no-any-return]

    @cached_property
    def takes(self) -> frozenset[str]:
        """What this UNet is conditioned by beside further channels; all of it is needed."""
        config = self.unet.config
        kinds = {"text_time": {"context", "pooled", "time_ids"}, "image": {"image_embeds"}}
        labels = {"class_labels"} if config.class_embed_type or config.num_class_embeds else set()
        pictures = {"image_tokens"} if hasattr(self.unet, IMAGE_PROMPTED) else set()
        return frozenset(kinds.get(config.addition_embed_type, {"context"}) | labels | pictures)

    def __call__(self, x: Tensor, sigma: float, timestep: float, conditioning: Conditioning, /) -> Prediction:
        """Scale the input to unit variance, call the UNet, and say what its output means.

        Raises:
            BadInput: the channels of ``x`` and of the conditioning do not add up to the UNet's, or the
                conditioning holds what this UNet cannot take or lacks what it needs.
        """
        return asked(self, x, sigma, timestep, conditioning)

    def ready(self, conditioning: Conditioning, x: Tensor) -> Conditioning:
        """The conditioning as the UNet takes it: one for each of ``x``, where and in what precision the UNet is."""
        require_conditioning(conditioning, self.takes)
        return conditioning.expand(len(x)).to(x.device, self.dtype)

    def scaled(self, x: Tensor, sigma: float) -> Tensor:
        """``x`` in unit variance, as the UNet takes it."""
        return (x * self.input_scale(sigma)).to(self.dtype)

    def input_scale(self, sigma: float) -> float:
        """What brings ``x`` to unit variance."""
        variance: float = preconditioning(self.kind).sigma_data ** 2 + sigma**2
        return 1.0 / variance**0.5 if self.scale_input else 1.0

    def tells(self, sigma: float, timestep: float) -> float:
        """What the UNet is told of the noise level."""
        return timestep

    def arguments(self, conditioning: Conditioning) -> dict[str, Any]:
        """What the UNet is called with beside the latents and the timestep."""
        added = {"text_embeds": "pooled", "time_ids": "time_ids", "image_embeds": "image_embeds"}
        context, tokens = conditioning.context, conditioning.image_tokens
        return {
            "encoder_hidden_states": context if tokens is None else (context, [tokens]),
            "class_labels": conditioning.class_labels,
            "added_cond_kwargs": {theirs: getattr(conditioning, ours) for theirs, ours in added.items()},
        }

    def read(self, out: Tensor, x: Tensor, sigma: float) -> Prediction:
        """What the UNet's output means."""
        out = out.to(x.dtype)
        if out.shape[1] == 2 * x.shape[1]:
            out, variance = out.chunk(2, dim=1)
            return Prediction(out, x, sigma, self.kind, variance=variance)
        return Prediction(out, x, sigma, self.kind)


@dataclass(frozen=True)
class UpscalerDenoiser:
    """The UNet of Stability's x2 latent upscaler, which is told ``ln(sigma) / 4`` instead of a timestep.

    Its preconditioning (Karras et al., arXiv:2206.00364, table 1, with unit data variance) is v
    prediction with the sign turned; its last output channel is not used. ``conditioning`` holds the
    context, the pooled prompt and, as ``channels``, the latents to enlarge.
    """

    unet: Any

    @cached_property
    def dtype(self) -> torch.dtype:
        """The UNet's precision."""
        return self.unet.dtype  # type: ignore[no-any-return]

    def __call__(self, x: Tensor, sigma: float, timestep: float, conditioning: Conditioning, /) -> Prediction:
        """As for :class:`UNetDenoiser`, but the timestep is not looked at, and sigma 0 is a BadInput."""
        return asked(self, x, sigma, timestep, conditioning)

    def ready(self, conditioning: Conditioning, x: Tensor) -> Conditioning:
        """As of :class:`UNetDenoiser`."""
        require_conditioning(conditioning, frozenset({"context", "pooled"}))
        return conditioning.expand(len(x)).to(x.device, self.dtype)

    def scaled(self, x: Tensor, sigma: float) -> Tensor:
        """``x`` in unit variance, as the UNet takes it."""
        return (x * self.input_scale(sigma)).to(self.dtype)

    def input_scale(self, sigma: float) -> float:
        """What brings ``x`` to unit variance."""
        return float(1.0 / (1.0 + sigma**2) ** 0.5)

    def tells(self, sigma: float, timestep: float) -> float:
        """``ln(sigma) / 4``."""
        if sigma <= 0.0:
            raise BadInput("The x2 upscaler is told ln(sigma) and cannot be asked at sigma 0: take a solver that does not.")
        return 0.25 * math.log(sigma)

    def arguments(self, conditioning: Conditioning) -> dict[str, Any]:
        """What the UNet is called with beside the latents and the timestep."""
        pooled = conditioning.pooled
        assert pooled is not None
        # The noise level of the latents to enlarge, 0, as a Fourier feature: 64 cosines, 64 sines.
        level = F.pad(pooled.new_ones(len(pooled), 64), (0, 64))
        return {
            "encoder_hidden_states": conditioning.context,
            "timestep_cond": torch.cat([level, pooled], 1),
        }

    def read(self, out: Tensor, x: Tensor, sigma: float) -> Prediction:
        """What the UNet's output means."""
        return Prediction(-out[:, :-1].to(x.dtype), x, sigma, "v")


@dataclass(frozen=True)
class PriorDenoiser:
    """Kandinsky's ``PriorTransformer``: it denoises an image embedding, held as latents of one pixel.

    ``conditioning`` holds the prompt's context with its mask, and the pooled prompt.
    """

    prior: Any
    kind: Kind = "x0"

    def __call__(self, x: Tensor, sigma: float, timestep: float, conditioning: Conditioning, /) -> Prediction:
        """The prediction at ``x`` of shape (batch, width, 1, 1)."""
        require_conditioning(conditioning, frozenset({"context", "context_mask", "pooled"}))
        conditioning = conditioning.expand(len(x)).to(x.device, self.prior.dtype)
        scaled = (x.flatten(1) * (1.0 / (1.0 + sigma**2) ** 0.5)).to(self.prior.dtype)
        out = self.prior(
            scaled,
            told(timestep, x),
            proj_embedding=conditioning.pooled,
            encoder_hidden_states=conditioning.context,
            attention_mask=conditioning.context_mask,
            return_dict=False,
        )[0]
        return Prediction(out.to(x.dtype).view_as(x), x, sigma, self.kind)


def asked(
    network: UNetDenoiser | UpscalerDenoiser,
    x: Tensor,
    sigma: float,
    timestep: float,
    conditioning: Conditioning,
    **more: Any,
) -> Prediction:
    """The UNet called with what its wrapper makes of the arguments, and with ``more``."""
    conditioning = network.ready(conditioning, x)
    out = network.unet(
        with_channels_of(conditioning, network.scaled(x, sigma), network.unet.config.in_channels),
        told(network.tells(sigma, timestep), x),
        **network.arguments(conditioning),
        **more,
        return_dict=False,
    )[0]
    return network.read(out, x, sigma)


def told(timestep: float, x: Tensor) -> Tensor:
    """A timestep where ``x`` is, filled in there: diffusers would copy a number, and wait for the device to take it.

    Raises:
        BadInput: the schedule does not know its timesteps.
    """
    if math.isnan(timestep):
        raise BadInput(
            "This schedule does not know its timesteps, which the network is told: take model.schedule(sigmas=[...]), or "
            "Schedule.at(levels, schedule.training_sigmas) with those of the model's own."
        )
    return torch.full((), timestep, dtype=torch.float32, device=x.device)


def require_conditioning(conditioning: Conditioning, takes: frozenset[str]) -> None:
    """Raise BadInput unless the conditioning holds just what a network takes; channels are counted elsewhere."""
    held = conditioning.names() - {"channels"}
    if held == takes:
        return
    wanted = " and ".join(sorted(takes))
    if unused := sorted(held - takes):
        raise BadInput(f"This network is conditioned by {wanted}, it cannot take {', '.join(unused)}.")
    raise BadInput(
        f"This network is conditioned by {wanted}, but {', '.join(sorted(takes - held))} is missing: "
        "encode_text gives context and pooled, with_size time_ids, the prior image_embeds, with_image_prompt image_tokens."
    )


def with_channels_of(conditioning: Conditioning, scaled: Tensor, in_channels: int) -> Tensor:
    """``scaled`` with the conditioning's channels behind it; BadInput unless they are as many as the UNet takes."""
    if conditioning.channels is not None:
        scaled = torch.cat([scaled, conditioning.channels], dim=1)
    if scaled.shape[1] != in_channels:
        raise BadInput(
            f"This UNet takes {in_channels} channels but was given {scaled.shape[1]}: beside the latents an inpainting "
            "UNet takes 5 (inpaint_channels), the x2 upscaler 4 (with_latents) and the x4 upscaler 3 (with_low_res)."
        )
    return scaled


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
