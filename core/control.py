"""ControlNets: networks that see the latents first, and a picture, and add what they make of both to the UNet's skips.

(Zhang et al., arXiv:2302.05543, sec. 3.2.) The pictures travel in the conditioning, the networks in a wrapper of the UNet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from .conditioning import Conditioning
from .denoiser import ConditionalDenoiser, UNetDenoiser, asked, told
from .errors import BadInput
from .guidance import GuidanceScale, per_step
from .prediction import Prediction
from .schedule import Schedule


@dataclass(frozen=True)
class Control:
    """A diffusers ``ControlNetModel`` and how much of it: ``scale`` is a number, or one at each noise level.

    Where the scale is 0 the network is not called.
    """

    network: Any
    scale: GuidanceScale = 1.0

    def at(self, sigma: float) -> float:
        """The scale at a noise level."""
        return self.scale(sigma) if callable(self.scale) else self.scale


@dataclass(frozen=True)
class ControlledDenoiser:
    """A UNet and its ControlNets as a conditional denoiser; see :func:`controlled`."""

    inner: UNetDenoiser
    controls: tuple[Control, ...]

    def __call__(self, x: Tensor, sigma: float, timestep: float, conditioning: Conditioning, /) -> Prediction:
        """As the UNet's own, with the ControlNets' residuals; a conditioning without pictures is not controlled.

        Raises:
            BadInput: as :class:`UNetDenoiser`, or there is not one picture for each network, of the latents' size.
        """
        plain, pictures = replace(conditioning, control=None), conditioning.control
        acting = [(i, control.network, scale) for i, control in enumerate(self.controls) if (scale := control.at(sigma))]
        if pictures is None or not acting:
            return self.inner(x, sigma, timestep, plain)
        self._require_pictures(pictures, x)
        pictures = pictures.expand(len(x), *pictures.shape[1:]).to(x.device, self.inner.dtype)
        ready = self.inner.ready(plain, x)
        # The image tokens of an IP-Adapter are the UNet's alone.
        given = self.inner.arguments(ready) | {"encoder_hidden_states": ready.context, "return_dict": False}
        scaled, at = self.inner.scaled(x, sigma), told(self.inner.tells(sigma, timestep), x)
        made = [net(scaled, at, controlnet_cond=pictures[:, i], conditioning_scale=by, **given) for i, net, by in acting]
        return asked(
            self.inner,
            x,
            sigma,
            timestep,
            ready,
            down_block_additional_residuals=[sum(parts) for parts in zip(*(down for down, _ in made), strict=True)],
            mid_block_additional_residual=sum(mid for _, mid in made),
        )

    def _require_pictures(self, pictures: Tensor, x: Tensor) -> None:
        batch, count, _, *size = pictures.shape
        if batch not in (1, len(x)) or count != len(self.controls):
            raise BadInput(
                f"{len(x)} images under {len(self.controls)} ControlNets were given control pictures for {batch} under "
                f"{count}: with_control takes one picture for each network, for all images or for each of them."
            )
        cell = 2 ** (len(self.controls[0].network.config.conditioning_embedding_out_channels) - 1)
        if size != [cell * side for side in x.shape[-2:]]:
            raise BadInput(
                f"The control pictures are {size[1]}x{size[0]} where {cell * x.shape[-1]}x{cell * x.shape[-2]} is painted: "
                "they must be of one size."
            )


def controlled(network: ConditionalDenoiser, controls: Sequence[Control]) -> ConditionalDenoiser:
    """The UNet under ControlNets, before guidance; the conditionings bring the pictures (``with_control``).

    ``classifier_free(controlled(model.denoiser, [Control(edges, 0.8)]), cond, uncond)``. Without pictures in ``uncond``
    only the conditional pass is controlled.

    Raises:
        BadInput: the network is no plain UNet's, or a ControlNet was made for another.
    """
    if not controls:
        return network
    if not isinstance(network, UNetDenoiser):
        raise BadInput(f"ControlNets steer the UNets of Stable Diffusion and SDXL, not a {type(network).__name__}.")
    for control in controls:
        require_control_fits(control.network.config, network.unet.config)
    return ControlledDenoiser(network, tuple(controls))


def between(schedule: Schedule, scale: float, start: float = 0.0, end: float = 1.0) -> GuidanceScale:
    """``scale`` in those steps of a schedule that lie between two fractions of it, 0 in the others.

    diffusers' ``control_guidance_start`` and ``control_guidance_end``: of a run that starts late give what is left of its
    schedule, of one that is stopped early all of it. (With Heun and PNDM diffusers counts evaluations, and this steps.)

    Raises:
        BadInput: not ``0 <= start < end <= 1``.
    """
    if not 0.0 <= start < end <= 1.0:
        raise BadInput(f"A ControlNet acts from a fraction of the steps to a later one, 0 to 1, got {start:g} to {end:g}.")
    count = len(schedule)
    inside = [i / count >= start and (i + 1) / count <= end for i in range(count)]
    return scale if all(inside) else per_step(schedule, [scale * acts for acts in inside])


_OF_BOTH = ("cross_attention_dim", "block_out_channels", "layers_per_block", "projection_class_embeddings_input_dim")


def require_control_fits(control: Mapping[str, Any], unet: Mapping[str, Any], name: str = "The ControlNet") -> None:
    """Raise BadInput unless a ControlNet of one config can steer a UNet of the other."""
    if control.get("global_pool_conditions"):
        raise BadInput(
            f"{name} pools its picture (global_pool_conditions), which is for guess mode alone, and that is not run."
        )
    if (channels := control.get("conditioning_channels", 3)) != 3:
        raise BadInput(f"{name} takes pictures of {channels} channels, and only those that take 3 are run.")
    for key in _OF_BOTH:
        theirs, ours = (_plain(config.get(key)) for config in (control, unet))
        if None not in (theirs, ours) and theirs != ours:
            raise BadInput(f"{name} was made for a UNet whose {key} is {theirs}, and this one's is {ours}: take one for it.")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
