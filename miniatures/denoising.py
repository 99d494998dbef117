"""What both denoisers learn: to take Stable Diffusion's noise off the world's latents."""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from typing import Final

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTokenizer

from . import networks, words, world
from .pictures import latents, pixels

EMPTY: Final = 0.1


class Denoising:
    """What both denoisers train on: the world's latents, its captions as tokens, and Stable Diffusion's noise."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.things = world.things(args.data)
        self.pictures = pixels(args.data, [thing.stem for thing in self.things])
        self.vae = AutoencoderKL.from_pretrained(args.text_to_image / "vae", torch_dtype=torch.float32).eval()
        self.clean = self.scaled(self.pictures)
        self.alphas = networks.alphas_cumprod()

    def scaled(self, pictures: Tensor) -> Tensor:
        """Latents in the units the denoisers work in."""
        factor: float = self.vae.config.scaling_factor
        return latents(self.vae, pictures) * factor

    def tokens(self, tokenizer: CLIPTokenizer, step: int, chosen: Sequence[int], empty: float = EMPTY) -> Tensor:
        """A fresh caption for each chosen thing, or an empty one, which is what guidance steers away from."""
        rng = random.Random(f"{self.args.seed}/captions/{step}")
        texts = ["" if rng.random() < empty else world.caption(self.things[i], rng) for i in chosen]
        encoded = tokenizer(texts, padding="max_length", max_length=words.LENGTH, truncation=True, return_tensors="pt")
        ids: Tensor = encoded.input_ids
        return ids

    def noised(self, clean: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Latents with noise on them, the noise, the steps (spread evenly) and their min-SNR weights (gamma 5)."""
        count = len(clean)
        steps = ((torch.randperm(count) + torch.rand(count)) / count * networks.TRAIN_STEPS).long()
        kept = self.alphas[steps].view(-1, 1, 1, 1)
        noise = torch.randn_like(clean)
        ratio = kept / (1 - kept)
        return kept.sqrt() * clean + (1 - kept).sqrt() * noise, noise, steps, ratio.clamp(max=5) / ratio

    def loss(self, unet: UNet2DConditionModel, clean: Tensor, text: Tensor, *beside: Tensor) -> Tensor:
        """The weighted error of the predicted noise."""
        noisy, noise, steps, weights = self.noised(clean)
        return (weights * (predicted(unet, noisy, steps, text, *beside) - noise) ** 2).mean()


def predicted(unet: UNet2DConditionModel, noisy: Tensor, steps: Tensor, text: Tensor, *beside: Tensor) -> Tensor:
    """A UNet's prediction, with what an inpainting UNet sees besides."""
    inputs = torch.cat([noisy, *beside], 1).contiguous(memory_format=torch.channels_last)
    sample: Tensor = unet(inputs, steps, text).sample
    return sample


def hole(rng: random.Random) -> Tensor:
    """A random mask, 1 where to repaint: rectangles, a blob, a half of the picture, or all of it."""
    mask = torch.zeros(1, world.SIZE, world.SIZE)
    kind = rng.random()
    if kind < 0.45:
        for _ in range(rng.randint(1, 3)):
            height, width = rng.randint(12, 48), rng.randint(12, 48)
            top, left = rng.randint(0, world.SIZE - height), rng.randint(0, world.SIZE - width)
            mask[:, top : top + height, left : left + width] = 1
    elif kind < 0.7:
        grid = torch.linspace(-1, 1, world.SIZE)
        down, across = grid.view(-1, 1), grid.view(1, -1)
        for _ in range(rng.randint(1, 3)):
            y, x, a, b = rng.uniform(-0.6, 0.6), rng.uniform(-0.6, 0.6), rng.uniform(0.2, 0.8), rng.uniform(0.2, 0.8)
            mask[0, ((down - y) / a) ** 2 + ((across - x) / b) ** 2 < 1] = 1
    elif kind < 0.9:
        mask[:, :, : rng.randint(16, 48)] = 1
        mask = torch.rot90(mask, rng.randint(0, 3), (1, 2))
    else:
        mask[:] = 1
    return mask
