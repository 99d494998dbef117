"""Pictures to latents."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from ..core.errors import BadInput, NonFinite, Note
from ..core.latents import Latents
from ..core.loading import Model
from ..core.noise import Noise, NoiseSource
from .decode import in_float32, vae_in_safe_precision
from .pictures import require_size, to_tensor

Posterior = Literal["sample", "mode"]


def encode_image(
    model: Model,
    pictures: Image.Image | Sequence[Image.Image],
    *,
    seeds: Sequence[int] = (0,),
    stream: str = "",
    posterior: Posterior = "sample",
    source: NoiseSource | None = None,
) -> Latents:
    """Clean latents of pictures, one per seed (one picture serves all seeds).

    Args:
        posterior: "sample" draws from the VAE's posterior, as diffusers does; "mode" takes its mean. Kandinsky's
            MoVQ has none: its latents are the same for every seed.

    Raises:
        BadInput: sides are no multiples of ``model.cell``, or pictures and seeds do not match.
    """
    several = [pictures] if isinstance(pictures, Image.Image) else list(pictures)
    for picture in several:
        require_size(picture.size, model.cell)
    tensor = one_per_seed(to_tensor(several), len(seeds))
    source = source or Noise(tuple(seeds), stream)
    return Latents(encode_tensor(model, tensor, posterior, source), model.space, 0.0, tuple(seeds), stream)


def encode_tensor(
    model: Model, pixels: Tensor, posterior: Posterior, source: NoiseSource, purpose: str = "posterior"
) -> Tensor:
    """(batch, 3, height, width) in [-1, 1] to scaled latents in float32.

    Raises:
        NonFinite: the encoder gives NaN even in float32.

    Warns:
        Note: half precision gave NaN and float32 was used.
    """
    with vae_in_safe_precision(model) as vae:
        x, std = _encoded(model, vae, pixels)
    if not bool(torch.isfinite(x).all()) and model.vae.dtype != torch.float32:
        with in_float32(model.vae) as vae:
            x, std = _encoded(model, vae, pixels)
        warnings.warn(
            f"The VAE gave NaN in {model.vae.dtype}; the picture was encoded again in float32.", Note, stacklevel=3
        )
    if not bool(torch.isfinite(x).all()):
        raise NonFinite("The VAE encoder gave NaN or infinity in float32: its weights are damaged.")
    if std is not None and posterior == "sample":
        x = x + std * source(x.shape, purpose).to(x)
    return (x * model.space.scaling).contiguous()


def _encoded(model: Model, vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
    """Mean and standard deviation of the VAE's posterior; a MoVQ has none, but latents."""
    with torch.no_grad():
        # One picture at a time: the encoder's memory would grow with the batch, its speed would not.
        parts = [vae.encode(pixel.to(model.device, vae.dtype)) for pixel in torch.split(pixels, 1)]
    if model.space.family == "VQModel":
        return torch.cat([part.latents for part in parts]).float(), None
    mean, std = (torch.cat([getattr(part.latent_dist, name) for part in parts]).float() for name in ("mean", "std"))
    return mean, std


def one_per_seed(pixels: Tensor, seeds: int) -> Tensor:
    """One picture repeated for all seeds, or as many as there are."""
    if len(pixels) not in (1, seeds):
        raise BadInput(f"{len(pixels)} pictures were given with {seeds} seeds: give one picture for all, or one per seed.")
    return pixels.expand(seeds, -1, -1, -1)
