"""Repainting a part: white repaints, black keeps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from PIL import Image, ImageChops, ImageFilter
from torch import Tensor

from ..core.conditioning import Conditioning
from ..core.denoiser import Denoiser
from ..core.errors import BadInput
from ..core.latents import Latents, LatentSpace
from ..core.loading import Model
from ..core.loop import Step
from ..core.noise import Noise, NoiseSource
from ..core.prediction import Prediction
from ..core.schedule import Schedule
from .image import Posterior, encode_tensor, one_per_seed
from .pictures import as_mask, require_size, to_tensor

Downsample = Literal["max", "area", "nearest", "nearest-grown"]


def latent_mask(mask: Image.Image, space: LatentSpace, downsample: Downsample = "max") -> Tensor:
    """A mask on the latent grid, (1, 1, height / downscale, width / downscale), 1 where it repaints.

    Args:
        downsample: "max" repaints a cell if any of its pixels is white; "area" if at least half of
            them are; "nearest" looks at the upper left pixel alone, as diffusers does,
            so that thin strokes can vanish; "nearest-grown" adds to that six of each cell's eight
            neighbours, as diffusers does for Kandinsky.

    Raises:
        BadInput: sides are no multiples of the downscale, or nothing is white.
    """
    require_size(mask.size, space.downscale, "The mask")
    pixels = _binary(mask)
    if not bool(pixels.any()):
        raise BadInput("The mask is black everywhere, so there is nothing to repaint: white marks what is repainted.")
    if downsample == "max":
        return F.max_pool2d(pixels, space.downscale)
    if downsample == "area":
        return (F.avg_pool2d(pixels, space.downscale) >= 0.5).float()
    corners = pixels[:, :, :: space.downscale, :: space.downscale]
    return corners if downsample == "nearest" else _grown(corners)


def inpaint_channels(
    model: Model,
    pictures: Image.Image | Sequence[Image.Image],
    mask: Image.Image,
    *,
    seeds: Sequence[int] = (0,),
    stream: str = "",
    posterior: Posterior = "sample",
    downsample: Downsample = "max",
    source: NoiseSource | None = None,
    clean: Latents | None = None,
) -> Tensor:
    """What a 9-channel UNet takes beside the latents: where to repaint, and the latents of what is kept.

    Stable Diffusion's: the mask, 1 where it repaints, then the latents of the pictures with their masked part grey.
    Kandinsky's: the latents of the whole pictures, 0 where they are repainted, then the mask, 1 where it *keeps*;
    beside that its kept part is put back after every step (:func:`keep_known`).

    One picture serves all seeds, or there is one per seed.

    Args:
        clean: the pictures' latents where they are at hand, so that Kandinsky's are not encoded again.

    Returns:
        (seeds, 5, height, width); put it into a conditioning with :func:`with_channels`.
    """
    several = [pictures] if isinstance(pictures, Image.Image) else list(pictures)
    require_size(mask.size, model.cell, "The mask")
    for picture in several:
        require_same_size(picture, mask)
    cells = latent_mask(mask, model.space, downsample).expand(len(seeds), -1, -1, -1)
    pixels, source = one_per_seed(to_tensor(several), len(seeds)), source or Noise(tuple(seeds), stream)
    if model.system == "kandinsky":
        whole = encode_tensor(model, pixels, posterior, source) if clean is None else clean.x
        keep = 1 - cells.to(whole)
        return torch.cat([whole * keep, keep], dim=1)
    masked = encode_tensor(model, pixels * (_binary(mask) < 0.5), posterior, source, "masked posterior")
    return torch.cat([cells.to(masked), masked], dim=1)


def with_channels(conditioning: Conditioning, channels: Tensor) -> Conditioning:
    """The conditioning for a UNet that takes further channels."""
    return replace(conditioning.expand(max(len(conditioning), len(channels))), channels=channels)


def known(clean: Latents, unit: Tensor, schedule: Schedule) -> Callable[[float], Tensor]:
    """The kept picture's latents at each noise level of a run: with the run's own noise, clean at its end."""
    x0, end = clean.clean, schedule.finished_at

    def at(sigma: float) -> Tensor:
        # The variance-preserving state at the end is to be the clean picture itself.
        return x0 * math.sqrt(1.0 + sigma**2) if sigma <= end else x0 + sigma * unit

    return at


def keep_known(mask: Tensor, known_at: Callable[[float], Tensor]) -> Callable[[Step], None]:
    """A hook that puts the kept part back after every step, for UNets of 4 channels and for Kandinsky's of 9.

    (Blended diffusion: Avrahami et al., arXiv:2111.14818; RePaint: Lugmayr et al., arXiv:2201.09865, eq. 8.)
    """

    def hook(step: Step) -> None:
        step.x = torch.lerp(known_at(step.sigma_next), step.x, mask.to(step.x))

    return hook


def keeping_known(denoiser: Denoiser, mask: Tensor, known_at: Callable[[float], Tensor], pure: float) -> Denoiser:
    """The same before every evaluation inside a step (Heun's second), not at ``pure``, the level of pure noise."""

    def denoise(x: Tensor, sigma: float, timestep: float) -> Prediction:
        if sigma != pure:
            x = torch.lerp(known_at(sigma), x, mask.to(x))
        return denoiser(x, sigma, timestep)

    return denoise


def composite(original: Image.Image, painted: Image.Image, mask: Image.Image, blur: float = 0.0) -> Image.Image:
    """``painted`` where the mask is white, ``original`` bit for bit where it is black.

    Args:
        blur: radius in pixels over which the edge is faded, inwards only.
    """
    require_same_size(original, mask)
    require_same_size(painted, mask)
    hard = as_mask(mask).point([255 * (v >= 128) for v in range(256)])
    soft = ImageChops.darker(hard, hard.filter(ImageFilter.GaussianBlur(blur))) if blur else hard
    return Image.composite(painted.convert("RGB"), original.convert("RGB"), soft)


def require_same_size(picture: Image.Image, mask: Image.Image) -> None:
    """Raise BadInput unless picture and mask are of one size."""
    if picture.size != mask.size:
        raise BadInput(
            f"The mask is {mask.width}x{mask.height} but the picture is {picture.width}x{picture.height}: "
            "they must be of one size."
        )


def _grown(cells: Tensor) -> Tensor:
    # What diffusers' loops over all cells come to; they leave out two diagonal neighbours.
    neighbours = torch.tensor([[[[1.0, 1.0, 0.0], [1.0, 1.0, 1.0], [0.0, 1.0, 1.0]]]])
    return F.conv2d(cells, neighbours, padding=1).clamp(max=1)


def _binary(mask: Image.Image) -> Tensor:
    grey = np.asarray(as_mask(mask))
    return torch.from_numpy((grey >= 128).astype(np.float32))[None, None]
