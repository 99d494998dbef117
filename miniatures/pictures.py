"""Pictures as tensors, and as latents."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from . import world


def pixels(data: Path, stems: Sequence[str]) -> Tensor:
    """The pictures of some emoji as the autoencoder sees them."""
    return as_tensor([world.picture(data, stem) for stem in stems])


def as_tensor(pictures: Sequence[Image.Image]) -> Tensor:
    """N × 3 × 64 × 64 in [-1, 1]."""
    stacked = np.stack([np.asarray(picture) for picture in pictures])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).float() / 127.5 - 1


def latents(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """The posterior means of pictures, unscaled."""
    with torch.no_grad():
        return torch.cat([vae.encode(batch).latent_dist.mean for batch in torch.split(pictures, 64)])
