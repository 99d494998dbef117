"""Stability's two upscalers: what they enlarge goes into their conditioning, the run starts from pure noise.

The ×2 upscaler enlarges clean latents of its own space, the ×4 one pictures with a little noise on them::

    cond, uncond = (with_latents(x2, encode_text(x2, prompt), small) for prompt in ("a red apple", ""))
    start = noise(x2, schedule, *enlarged_size(x2, small.size), seeds)
    big = denoise(classifier_free(x2.denoiser, cond, uncond, 9.0), start, schedule, solver)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F  # noqa: N812
from PIL import Image

from ..core.conditioning import Conditioning
from ..core.errors import BadInput
from ..core.latents import Latents
from ..core.loading import Model
from ..core.noise import Noise, NoiseSource
from ..core.source import System
from ..schedulers.config import read_scheduler
from .image import one_per_seed
from .pictures import require_size, to_tensor


def enlarged_size(model: Model, size: tuple[int, int]) -> tuple[int, int]:
    """Height and width in pixels of what an upscaler makes of ``size`` (height, width) in pixels.

    The ×4 upscaler takes any size; the ×2 one's UNet halves its latents three times and mirrors their edges, so that
    it needs multiples of 32 pixels, and at least 64.

    Raises:
        BadInput: the model is no upscaler, or the size does not fit.
    """
    height, width = size
    if model.system == "x2":
        require_enlargeable((width, height), model.cell)
        return 2 * height, 2 * width
    _require(model, "x4")
    # Its latents are as large as the picture it enlarges.
    return height * model.space.downscale, width * model.space.downscale


def require_enlargeable(size: tuple[int, int], cell: int) -> None:
    """Raise BadInput unless the x2 upscaler of that cell can take (width, height)."""
    require_size(size, cell, "What is to be enlarged")
    if min(size) < 2 * cell:
        raise BadInput(f"What is to be enlarged is {size[0]}x{size[1]}, but both sides must be {2 * cell} or more.")


def with_latents(model: Model, conditioning: Conditioning, latents: Latents) -> Conditioning:
    """The conditioning with clean latents for the ×2 upscaler to enlarge; one set serves all prompts, or one each.

    Raises:
        BadInput: the model is not that upscaler, the latents hold noise, their size does not fit, or they are
            of another number than the prompts; SpaceMismatch: they are of another VAE.
    """
    _require(model, "x2")
    model.space.require(latents.space, f"The upscaler {model.name}")
    latents.require_clean("enlarge")
    enlarged_size(model, latents.size)
    channels = F.interpolate(latents.clean, scale_factor=2, mode="nearest")
    together = replace(conditioning, channels=channels)
    return together.expand(len(together))


def with_low_res(
    model: Model,
    conditioning: Conditioning,
    pictures: Image.Image | Sequence[Image.Image],
    *,
    noise_level: int = 20,
    seeds: Sequence[int] = (0,),
    stream: str = "",
    source: NoiseSource | None = None,
) -> Conditioning:
    """The conditioning with pictures for the ×4 upscaler to enlarge, one per seed (one serves all seeds).

    Noise is put on them so that the UNet takes their flaws for noise, and it is told how much (noise conditioning
    augmentation: Ho et al., arXiv:2106.15282, sec. 4). Give the prompt and the negative one the same seeds.

    Args:
        noise_level: a timestep of the model's ``low_res_scheduler``, 0 (next to none) to its ``max_noise_level`` (350).
        source: where that noise comes from instead of the seeds.

    Raises:
        BadInput: the model is not that upscaler, the level is out of range, or pictures, seeds and prompts are
            of different numbers.
    """
    _require(model, "x4")
    highest = int(model.index.get("max_noise_level", 350))
    if noise_level not in range(highest + 1):
        raise BadInput(f"The noise level of {model.name} is a whole number from 0 to {highest}, got {noise_level:g}.")
    several = [pictures] if isinstance(pictures, Image.Image) else list(pictures)
    pixels = one_per_seed(to_tensor(several), len(seeds))
    sigma = read_scheduler(model.low_res_scheduler).training_sigmas()[noise_level]
    unit = (source or Noise(tuple(seeds), stream))(pixels.shape, "low resolution")
    noisy = (pixels + sigma * unit) / math.sqrt(1.0 + sigma**2)
    together = replace(
        conditioning, channels=noisy.to(model.device), class_labels=torch.tensor([noise_level], device=model.device)
    )
    return together.expand(len(together))


def _require(model: Model, system: System) -> None:
    if model.system != system:
        enlarges = {"x2": "the ×2 upscaler enlarges latents (with_latents)", "x4": "the ×4 one pictures (with_low_res)"}
        raise BadInput(f"{model.name} is not the upscaler asked for: {enlarges['x2']}, {enlarges['x4']}.")
