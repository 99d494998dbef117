"""Pictures as prompts, through an IP-Adapter.

It is on the UNet while the run lasts, and what its picture says stands in both conditionings::

    adapter = load_image_adapter(shelf, "ip-adapter_sd15.safetensors", sd)
    with image_prompted(sd, adapter, scale=0.6):
        cond = with_image_prompt(adapter, encode_text(sd, "a castle"), picture)
        uncond = with_image_prompt(adapter, encode_text(sd, ""), None)
        latents = denoise(classifier_free(sd.denoiser, cond, uncond, 7.5), start, schedule, solver)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from PIL import Image
from torch import Tensor

from ..core.conditioning import Conditioning
from ..core.errors import BadInput
from ..core.image_adapter import ImageAdapter
from .pictures import clip_pixels


def with_image_prompt(
    adapter: ImageAdapter, conditioning: Conditioning, pictures: Image.Image | Sequence[Image.Image] | None
) -> Conditioning:
    """The conditioning with the tokens that an IP-Adapter makes of pictures, or of none.

    Args:
        pictures: of any size, the middle square is seen; one for all images, or one for each. None is nothing to go by, as
            diffusers has it: zeros in place of the embedding, or what the encoder says of zeros (adapters by patches).

    Raises:
        BadInput: there is no picture, or they are of another number than the prompts.
    """
    several = [pictures] if isinstance(pictures, Image.Image) else pictures
    if several is not None and not several:
        raise BadInput("An image prompt needs at least one picture; None is no picture at all.")
    with torch.no_grad():
        tokens: Tensor = adapter.projection(_seen(adapter, several))
    together = replace(conditioning, image_tokens=tokens.unsqueeze(1))
    return together.expand(len(together))


def _seen(adapter: ImageAdapter, pictures: Sequence[Image.Image] | None) -> Tensor:
    """What the image encoder says of pictures, or of none, as the adapter takes it."""
    encoder, like = adapter.image_encoder, next(adapter.projection.parameters())
    side = encoder.config.image_size
    pixels = torch.zeros(1, 3, side, side)
    if pictures is not None:
        options = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
        pixels = clip_pixels(options, pictures)
    answer = encoder(pixels.to(like.device, like.dtype), output_hidden_states=adapter.by_patches)
    if adapter.by_patches:
        return answer.hidden_states[-2]  # type: ignore[no-any-return]
    embeds: Tensor = answer.image_embeds
    return torch.zeros_like(embeds) if pictures is None else embeds
