"""Latents to pictures."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..core.errors import BadInput, NonFinite, Note
from ..core.latents import Latents
from ..core.loading import Model
from ..core.memory import TILE_FROM
from .pictures import to_pictures


def decode(model: Model, latents: Latents, *, tiled: bool | None = None) -> list[Image.Image]:
    """Decode clean latents to 8-bit RGB pictures.

    Args:
        tiled: in overlapping tiles, blended (diffusers' tiling); by default for large pictures only, and never
            with Kandinsky's MoVQ, which has no such thing.

    Raises:
        SpaceMismatch: the latents are of another VAE; BadInput: they still hold noise, or tiles are asked of a MoVQ;
        NonFinite: the decoder gives NaN even in float32.

    Warns:
        Note: half precision gave NaN and float32 was used.
    """
    return to_pictures(decode_tensor(model, latents, tiled=tiled))


def decode_tensor(model: Model, latents: Latents, *, tiled: bool | None = None) -> Tensor:
    """As :func:`decode`, but (batch, 3, height, width), about -1 to 1, in float32."""
    model.space.require(latents.space, f"The VAE of {model.name}")
    height, width = latents.size
    if tiled and _is_movq(model):
        raise BadInput(f"The MoVQ of {model.name} cannot decode in tiles: leave tiled out.")
    tiled = height * width > TILE_FROM and not _is_movq(model) if tiled is None else tiled
    return torch.cat([_decode_one(model, z, tiled) for z in torch.split(latents.unscaled, 1)])


def _decode_one(model: Model, z: Tensor, tiled: bool) -> Tensor:
    if not bool(torch.isfinite(z).all()):
        raise NonFinite("The latents to decode hold NaN or infinity: the fault lies in the denoising before.")
    # Kandinsky's UNet was trained on latents from before the MoVQ's codebook, and its decoder takes them.
    options = {"force_not_quantize": True} if _is_movq(model) else {}
    with torch.no_grad(), vae_in_safe_precision(model) as vae, _tiling(vae, tiled):
        pixels: Tensor = vae.decode(z.to(model.device, vae.dtype), return_dict=False, **options)[0].float()
    if bool(torch.isfinite(pixels).all()):
        return pixels
    if model.vae.dtype == torch.float32:
        raise NonFinite("The VAE decoder gave NaN or infinity in float32: its weights or the latents' scale are wrong.")
    with torch.no_grad(), in_float32(model.vae) as vae, _tiling(vae, tiled):
        pixels = vae.decode(z.to(model.device, torch.float32), return_dict=False, **options)[0]
    if not bool(torch.isfinite(pixels).all()):
        raise NonFinite("The VAE decoder gave NaN or infinity in half precision and in float32.")
    warnings.warn(f"The VAE gave NaN in {model.vae.dtype}; the picture was decoded again in float32.", Note, stacklevel=4)
    return pixels


@contextmanager
def vae_in_safe_precision(model: Model) -> Iterator[Any]:
    """The VAE, in float32 while it is likely to overflow: SDXL's and the x4 upscaler's in fp16.

    Unless its config says ``force_upcast = false``, as those do that were fine-tuned for fp16.
    """
    fragile = model.system in ("sdxl", "x4") and model.vae.config.get("force_upcast", True)
    if fragile and model.vae.dtype == torch.float16:
        with in_float32(model.vae) as upcast:
            yield upcast
    else:
        yield model.vae


@contextmanager
def in_float32(vae: Any) -> Iterator[Any]:
    """The VAE in float32, and back in what it was."""
    dtype, cast = vae.dtype, torch.nn.Module.to  # the VAE's own .to() warns that it keeps [] in float32
    try:
        yield cast(vae, torch.float32)
    finally:
        cast(vae, dtype)


def _is_movq(model: Model) -> bool:
    return model.space.family == "VQModel"


@contextmanager
def _tiling(vae: Any, on: bool) -> Iterator[None]:
    before = getattr(vae, "use_tiling", False)  # a MoVQ has none
    vae.use_tiling = on
    try:
        yield
    finally:
        vae.use_tiling = before
