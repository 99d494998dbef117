"""What both denoisers learn: to take Stable Diffusion's noise off the world's latents, so that guidance works."""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from typing import Final

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from torch.nn.functional import mse_loss
from transformers import CLIPTokenizer

from . import networks, words, world
from .pictures import latents, pixels

EMPTY: Final = 0.25
GUIDANCE: Final = 4.0


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

    def tokens(self, tokenizer: CLIPTokenizer, step: int, chosen: Sequence[int]) -> tuple[Tensor, Tensor]:
        """A fresh caption for each chosen thing, or an empty one; and which are empty."""
        rng = random.Random(f"{self.args.seed}/captions/{step}")
        texts = ["" if rng.random() < EMPTY else world.caption(self.things[i], rng) for i in chosen]
        encoded = tokenizer(texts, padding="max_length", max_length=words.LENGTH, truncation=True, return_tensors="pt")
        return encoded.input_ids, torch.tensor([not text for text in texts])

    def uninformed(self, noisy: Tensor, kept: Tensor) -> Tensor:
        """The noise that someone must predict who knows the world but not the caption, in closed form.

        The world is finite: the best guess at the picture is the average of all, weighted by how likely each is.
        """
        known = self.clean.flatten(1)
        away = torch.cdist(noisy.flatten(1)[:, None], kept.sqrt()[:, None, None] * known)[:, 0] ** 2
        guess = (torch.softmax(-away / (2 * (1 - kept[:, None])), 1) @ known).view_as(noisy)
        kept = kept.view(-1, 1, 1, 1)
        return (noisy - kept.sqrt() * guess) / (1 - kept).sqrt()

    def loss(self, unet: UNet2DConditionModel, clean: Tensor, text: Tensor, empty: Tensor, *beside: Tensor) -> Tensor:
        """The error of the predicted noise, with min-SNR weights (gamma 5); the steps are spread evenly.

        A network that has its pictures by heart predicts them outright from the caption, and guidance of the usual
        strength then overshoots every colour.  So it is asked for a quarter only of the way from the uninformed
        prediction to the true one; guidance goes the rest.  Where a part of the picture is seen that tells it anyway.
        """
        count = len(clean)
        time = (torch.randperm(count) + torch.rand(count)) / count
        steps = (time * networks.TRAIN_STEPS).long()
        kept = self.alphas[steps]
        noise = torch.randn_like(clean)
        signal = kept.sqrt().view(-1, 1, 1, 1) * clean
        noisy = signal + (1 - kept).sqrt().view(-1, 1, 1, 1) * noise
        share = torch.where(empty, 0.0, 1 / GUIDANCE)
        if beside:  # inpainting: the mask comes first
            share = torch.where(beside[0].mean((1, 2, 3)) < 1, 1.0, share)
        target = torch.lerp(self.uninformed(noisy, kept), noise, share.view(-1, 1, 1, 1))
        inputs = torch.cat([noisy, *beside], 1).contiguous(memory_format=torch.channels_last)
        error = mse_loss(unet(inputs, steps, text).sample, target, reduction="none").mean((1, 2, 3))
        ratio = kept / (1 - kept)
        return (error * ratio.clamp(max=5) / ratio).mean()


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
