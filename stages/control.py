"""Control pictures (edges, depth, poses, …) into what conditions a UNet.

ControlNets stand beside the UNet, their pictures in both conditionings::

    canny = load_controlnet(shelf, "lllyasviel/sd-controlnet-canny", sd)
    cond, uncond = (with_control(sd, encode_text(sd, prompt), [edges]) for prompt in ("a castle", ""))
    network = controlled(sd.denoiser, [Control(canny, between(schedule, 0.8, end=0.5))])
    denoiser = classifier_free(network, cond, uncond, 7.5)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from PIL import Image

from ..core.conditioning import Conditioning
from ..core.errors import BadInput
from ..core.loading import Model
from .pictures import require_size, to_tensor


def with_control(
    model: Model, conditioning: Conditioning, pictures: Sequence[Image.Image | Sequence[Image.Image]]
) -> Conditioning:
    """The conditioning with what ControlNets are to follow, in the order of :func:`~unrolled.core.control.controlled`.

    Args:
        pictures: for each ControlNet one, of the size that is painted, or one for each image of the batch.

    Raises:
        BadInput: the model takes none; there is no picture, they are of several sizes or of numbers that do not go
            together, or sides are no multiples of ``model.cell``.
    """
    if model.system not in ("sd", "sdxl"):
        raise BadInput(f"ControlNets steer the UNets of Stable Diffusion and SDXL, and {model.name} is neither.")
    several = [[held] if isinstance(held, Image.Image) else list(held) for held in pictures]
    if not several or not all(several):
        raise BadInput("Control needs a picture for each ControlNet, or one for each image.")
    for picture in (picture for held in several for picture in held):
        require_size(picture.size, model.cell, "The control picture")
    batch = max(map(len, several))
    if not {len(held) for held in several} <= {1, batch}:
        counts = ", ".join(str(len(held)) for held in several)
        raise BadInput(
            f"Control pictures were given for {counts} images: give each ControlNet one for all, or one per image."
        )
    pixels = to_tensor([held[i % len(held)] for held in several for i in range(batch)]) / 2 + 0.5
    control = pixels.view(len(several), batch, *pixels.shape[1:]).transpose(0, 1).to(model.device, model.dtype)
    together = replace(conditioning, control=control)
    return together.expand(len(together))
