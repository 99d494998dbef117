"""SDXL's conditioning by size: what it is told of the pictures it shall paint like."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..core.conditioning import Conditioning
from ..core.errors import BadInput
from ..core.loading import Model


def with_size(
    model: Model,
    conditioning: Conditioning,
    height: int,
    width: int,
    *,
    original: tuple[int, int] | None = None,
    crop: tuple[int, int] = (0, 0),
    target: tuple[int, int] | None = None,
    aesthetic_score: float = 6.0,
) -> Conditioning:
    """The conditioning with SDXL's time ids (Podell et al., arXiv:2307.01952, sec. 2.2).

    The base is told a target size, its refiner an aesthetic score in its place; one call may name both, so
    that it serves either.

    Args:
        height, width: of the picture to be painted, in pixels.
        original: (height, width) of the training pictures to be like: small ones were blurred by enlarging.
        crop: (top, left) of where those were cut; (0, 0) keeps things whole and in the middle.
        target: (height, width), by default the picture's own.
        aesthetic_score: 1 to 10; 2.5 is the usual negative.

    Raises:
        BadInput: the model is not SDXL, takes another number of such values, or there is no pooled prompt.
    """
    if model.system != "sdxl":
        raise BadInput(f"{model.name} is not conditioned by size: only SDXL is.")
    original, target = original or (height, width), target or (height, width)
    ids = [*original, *crop, *([aesthetic_score] if model.scored else target)]
    pooled, config = conditioning.pooled, model.unet.config
    if pooled is None:
        raise BadInput("Size conditioning stands beside a pooled prompt: encode the prompt with encode_text first.")
    room = (config.projection_class_embeddings_input_dim - pooled.shape[1]) / config.addition_time_embed_dim
    if room != len(ids):
        raise BadInput(
            f"The UNet of {model.name} takes {room:g} time ids, not {len(ids)}: requires_aesthetics_score in its "
            f"model_index.json must be {str(room == 5).lower()}."
        )
    rows = torch.tensor([ids] * len(conditioning), dtype=torch.float32, device=pooled.device)
    return replace(conditioning, time_ids=rows)


def sizes_in_turn(cond: Conditioning, uncond: Conditioning, images: int) -> tuple[Conditioning, Conditioning]:
    """``cond`` and ``uncond`` with the time ids that diffusers' text-to-image gives a batch (docs/departures.md).

    It repeats the negative's and the positive's row after having put them one behind the other, so that they
    take turns over unconditional and conditional images alike. Nothing changes for one image.

    Raises:
        BadInput: there are no time ids.
    """
    if cond.time_ids is None or uncond.time_ids is None:
        raise BadInput("Time ids can take turns only where there are some: use with_size on both conditionings first.")
    rows = torch.cat([uncond.time_ids[:1], cond.time_ids[:1]]).repeat(images, 1)
    cond, uncond = cond.expand(images), uncond.expand(images)
    return replace(cond, time_ids=rows[images:]), replace(uncond, time_ids=rows[:images])
