"""Train the upscalers on a CPU: `x2` enlarges SD 1.5's latents, `x4` a picture's pixels. VAE and words are SD 1.5's.

A training that was killed goes on from its last checkpoint: run the same command again.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from transformers import CLIPTextModel

from . import networks, upscaler_networks, words, world
from .pictures import as_tensor, latents
from .train import turn
from .train_sdxl import spread
from .training import Losses, Recipe, Recipes, Report, Training, command
from .upscaler_networks import LATENTS, LEVELS, X4_SCALE

UNTOLD: Final = 0.25  # captions left empty: `guidance_scale=0` and the other half of guidance
CROPS: Final = 2
SIDES: Final = (64, 64, 96, 128)  # of the small picture that a crop is taken from


class Told:
    """The frozen text encoder on fresh captions, some of them empty."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.things = args, world.things(args.data)
        self.tokenizer = words.load_tokenizer(args.text_to_image / "tokenizer")
        self.encoder = CLIPTextModel.from_pretrained(args.text_to_image / "text_encoder", dtype=torch.float32)

    def __call__(self, step: int, chosen: Sequence[int], last: bool) -> tuple[Tensor, Tensor]:
        """The context, with the last layer's norm or without, and its summary."""
        rng = random.Random(f"{self.args.seed}/captions/{step}")
        texts = ["" if rng.random() < UNTOLD else world.caption(self.things[i], rng) for i in chosen]
        ids = self.tokenizer(
            texts, padding="max_length", max_length=words.LENGTH, truncation=True, return_tensors="pt"
        ).input_ids
        with torch.no_grad():
            said = self.encoder(ids, output_hidden_states=True)
        return said.last_hidden_state if last else said.hidden_states[-1], said.pooler_output


def autoencoder(args: argparse.Namespace) -> AutoencoderKL:
    """SD 1.5's."""
    return AutoencoderKL.from_pretrained(args.text_to_image / "vae", torch_dtype=torch.float32).eval()


def nhwc(*inputs: Tensor) -> Tensor:
    """Inputs side by side, in the order of memory that convolutions like."""
    return torch.cat(inputs, 1).contiguous(memory_format=torch.channels_last)


# --- twice as large, in latents -------------------------------------------------------------------------------


def train_x2(args: argparse.Namespace) -> None:
    """From the latents of 64-pixel pictures to those of 128; the small ones are a little noisy, as generated ones are."""
    told, vae = Told(args), autoencoder(args)
    factor: float = vae.config.scaling_factor
    stems = [thing.stem for thing in told.things]
    small, large = (
        factor * latents(vae, as_tensor([world.picture(args.data, stem, side) for stem in stems]))
        for side in (world.SIZE, 2 * world.SIZE)
    )
    torch.manual_seed(args.seed)
    unet = upscaler_networks.new_x2().to(memory_format=torch.channels_last)
    training = Training({"unet": unet}, args, average=0.998)
    kept = networks.alphas_cumprod()
    level = torch.cat([torch.ones(args.batch, 64), torch.zeros(args.batch, 64)], 1)

    def losses(step: int) -> Losses:
        chosen = turn(step, args.batch, len(stems), args.seed)
        context, summary = told(step, chosen, last=False)
        clean = large[chosen]
        rough = small[chosen] + 0.15 * torch.rand(args.batch, 1, 1, 1) * torch.randn_like(small[chosen])
        share = kept[spread(args.batch)].view(-1, 1, 1, 1)
        sigma = ((1 - share) / share).sqrt()
        noisy, total = clean + sigma * torch.randn_like(clean), (sigma**2 + 1).sqrt()
        beside = interpolate(rough, scale_factor=2, mode="nearest")
        out = unet(
            nhwc(noisy / total, beside),
            0.25 * sigma.flatten().log(),
            context,
            timestep_cond=torch.cat([level, summary], 1),
        ).sample[:, :-1]
        return {"loss": ((out - (clean - noisy / total**2) * total / sigma) ** 2).mean()}

    def publish(report: Report) -> None:
        networks.save_network(unet, args.out / "unet")
        networks.save_index(
            args.out, "StableDiffusionLatentUpscalePipeline", scheduler=upscaler_networks.X2_SCHEDULER, settings={}
        )
        networks.save_json(report, args.out / "training.json")

    training.run(losses, publish)


# --- four times as large, from pixels -------------------------------------------------------------------------


def crops(data: Path, stem: str, rng: random.Random) -> list[tuple[Image.Image, Image.Image]]:
    """Pieces of a small picture, each with the same piece four times as large."""
    found = []
    for _ in range(CROPS):
        side = rng.choice(SIDES)
        left, top = (rng.randint(0, side - LATENTS) for _ in range(2))
        small, large = (
            world.picture(data, stem, scale * side).crop(
                (scale * left, scale * top, scale * (left + LATENTS), scale * (top + LATENTS))
            )
            for scale in (1, 4)
        )
        found.append((small, large))
    return found


def train_x4(args: argparse.Namespace) -> None:
    """From small pictures with up to 350 steps of noise on them, told how many, to the latents of large ones."""
    told, vae = Told(args), autoencoder(args)
    rng = random.Random(f"{args.seed}/crops")
    pairs = [pair for thing in told.things for pair in crops(args.data, thing.stem, rng)]
    small = as_tensor([pair[0] for pair in pairs]).view(-1, CROPS, 3, LATENTS, LATENTS)
    large = X4_SCALE * latents(vae, as_tensor([pair[1] for pair in pairs])).view(-1, CROPS, 4, LATENTS, LATENTS)
    power = large.var()
    torch.manual_seed(args.seed)
    unet = upscaler_networks.new_x4().to(memory_format=torch.channels_last)
    training = Training({"unet": unet}, args, average=0.998)
    kept = networks.alphas_cumprod(*upscaler_networks.X4_BETAS)

    def noised(clean: Tensor, steps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        noise, share = torch.randn_like(clean), kept[steps].view(-1, 1, 1, 1)
        return share.sqrt() * clean + (1 - share).sqrt() * noise, noise, share

    def losses(step: int) -> Losses:
        chosen = turn(step, args.batch, len(small), args.seed)
        which = torch.randint(CROPS, (args.batch,))
        context, _ = told(step, chosen, last=True)
        clean = large[chosen, which]
        levels = spread(args.batch, 0, LEVELS) // torch.randint(1, 9, (args.batch,))
        beside, _, _ = noised(small[chosen, which], levels)
        steps = spread(args.batch)
        noisy, noise, share = noised(clean, steps)
        velocity = share.sqrt() * noise - (1 - share).sqrt() * clean
        out = unet(nhwc(noisy, beside), steps, context, class_labels=levels).sample
        # Min-SNR weights (gamma 5) for latents as faint as these are
        weights = torch.minimum(share, 5 * (1 - share) / power)
        return {"loss": (weights * (out - velocity) ** 2).mean()}

    def publish(report: Report) -> None:
        networks.save_network(unet, args.out / "unet")
        networks.save_json(upscaler_networks.X4_LOW_RES_SCHEDULER, args.out / "low_res_scheduler" / "scheduler_config.json")
        parts = {**networks.PARTS, "low_res_scheduler": ("diffusers", "DDPMScheduler")}
        settings = {"max_noise_level": LEVELS - 1, **networks.UNSAFE, "watermarker": [None, None]}
        del settings["requires_safety_checker"]
        networks.save_index(args.out, "StableDiffusionUpscalePipeline", parts, upscaler_networks.X4_SCHEDULER, settings)
        networks.save_json({"latents_scaled_by": X4_SCALE, **report}, args.out / "training.json")

    training.run(losses, publish)


RECIPES: Final[Recipes] = {
    "x2": Recipe(train_x2, "x2-latent-upscaler", 8, 2e-3, 4200),
    "x4": Recipe(train_x4, "x4-upscaler", 8, 2e-3, 3600),
}


if __name__ == "__main__":
    command(RECIPES, __doc__)
