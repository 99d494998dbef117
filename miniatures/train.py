"""Train the miniatures on a CPU: `vae`, `text-to-image`, `decoder`, `inpainting`, each from what came before.

A training that was killed goes on from its last checkpoint: run the same command again.
"""

from __future__ import annotations

import argparse
import random
from functools import lru_cache
from typing import Final

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate
from transformers import CLIPTextModel

from . import networks, words, world
from .denoising import Denoising, hole
from .pictures import latents, pixels
from .training import Losses, Recipe, Recipes, Report, Training, command

HOLES: Final = 16


@lru_cache(maxsize=4)
def shuffled(size: int, seed: str) -> list[int]:
    """One pass over the world, in its own order."""
    return random.Random(seed).sample(range(size), size)


def turn(step: int, batch: int, size: int, seed: int) -> list[int]:
    """Which things a step trains on: pass after pass over all of them."""
    places = range(step * batch, (step + 1) * batch)
    return [shuffled(size, f"{seed}/{place // size}")[place % size] for place in places]


# --- the autoencoder ------------------------------------------------------------------------------------------


def likeness(ours: Tensor, theirs: Tensor) -> Tensor:
    """L1 between pictures, between their gradients and between their colours, at three scales.

    The gradients make it sharp without an adversary; without the colours everything stays brown for long.
    """
    total = ours.new_zeros(())
    for scale in range(3):
        if scale:
            ours, theirs = avg_pool2d(ours, 2), avg_pool2d(theirs, 2)
        difference = ours - theirs
        total = total + difference.abs().mean() + (difference - difference.roll(1, 1)).abs().mean()
        total = total + difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()
    return total


def disturbed(picture: Tensor, rng: random.Random) -> Tensor:
    """Mirrored, shifted, or with a grey hole like those that inpainting cuts."""
    if rng.random() < 0.5:
        picture = picture.flip(-1)
    if rng.random() < 0.3:
        picture = picture.roll((rng.randint(-6, 6), rng.randint(-6, 6)), (1, 2))
    if rng.random() < 0.3:
        picture = picture.clone()
        (top, bottom), (left, right) = (sorted(rng.choices(range(world.SIZE + 1), k=2)) for _ in range(2))
        picture[:, top:bottom, left:right] = 0
    return picture


def train_vae(args: argparse.Namespace) -> None:
    """On all the emoji but for the skin tones, half of each batch from the world; then the latents are measured."""
    things = [thing.stem for thing in world.things(args.data)]
    others = sorted(path.stem for path in world.assets(args.data).glob("*.webp") if "1f3f" not in path.stem)
    mine, all_of_them = pixels(args.data, things), pixels(args.data, others)
    vae = networks.new_vae().to(memory_format=torch.channels_last)
    training = Training({"vae": vae}, args, average=0.995)

    def losses(step: int) -> Losses:
        rng = random.Random(f"{args.seed}/{step}")
        half = args.batch // 2
        chosen = [*rng.choices(list(mine), k=half), *rng.choices(list(all_of_them), k=args.batch - half)]
        batch = torch.stack([disturbed(picture, rng) for picture in chosen])
        batch = batch.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(batch).latent_dist
            mean, logvar = posterior.mean.float(), posterior.logvar.float()
            decoded = vae.decode(mean + torch.randn_like(mean) * (0.5 * logvar).exp()).sample
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        rebuilt = likeness(decoded.float(), batch)
        return {"loss": rebuilt + 1e-3 * kl, "rebuilt": rebuilt.detach(), "kl": kl.detach()}

    def publish(report: Report) -> None:
        vae.register_to_config(scaling_factor=round(1 / latents(vae, mine).std().item(), 5))
        networks.save_network(vae, args.out / "vae")
        networks.save_json(report, args.out / "vae-training.json")

    training.run(losses, publish)


def train_decoder(args: argparse.Namespace) -> None:
    """The decoder alone, afterwards and on the world alone: what the denoisers learned from stays as it was."""
    mine = pixels(args.data, [thing.stem for thing in world.things(args.data)])
    vae = AutoencoderKL.from_pretrained(args.text_to_image / "vae", torch_dtype=torch.float32)
    vae.requires_grad_(False)
    vae.decoder.requires_grad_(True)
    vae.to(memory_format=torch.channels_last)
    codes = latents(vae, mine)
    training = Training({"vae": vae}, args, average=0.99)

    def losses(step: int) -> Losses:
        chosen = turn(step, args.batch, len(mine), args.seed)
        noisy = codes[chosen] + 0.1 * codes.std() * torch.rand(args.batch, 1, 1, 1) * torch.randn_like(codes[chosen])
        with torch.autocast("cpu", torch.bfloat16):
            decoded = vae.decode(noisy.contiguous(memory_format=torch.channels_last)).sample
        return {"loss": likeness(decoded.float(), mine[chosen])}

    def publish(report: Report) -> None:
        networks.save_network(vae, args.out / "vae")
        networks.save_json(report, args.out / "decoder-training.json")

    training.run(losses, publish)


# --- the denoisers --------------------------------------------------------------------------------------------


def train_text_to_image(args: argparse.Namespace) -> None:
    """The tokenizer's vocabulary first; then text encoder and UNet together, from nothing."""
    task = Denoising(args)
    rng = random.Random(args.seed)
    folder = args.out / "tokenizer"
    words.train_tokenizer((world.caption(rng.choice(task.things), rng) for _ in range(40_000)), folder)
    tokenizer = words.load_tokenizer(folder)
    torch.manual_seed(args.seed)
    text_encoder = networks.new_text_encoder(tokenizer)
    unet = networks.new_unet().to(memory_format=torch.channels_last)
    training = Training({"text_encoder": text_encoder, "unet": unet}, args, average=0.999)

    def losses(step: int) -> Losses:
        chosen = turn(step, args.batch, len(task.things), args.seed)
        text = text_encoder(task.tokens(tokenizer, step, chosen)).last_hidden_state
        return {"loss": task.loss(unet, task.clean[chosen], text)}

    def publish(report: Report) -> None:
        networks.save_network(text_encoder, args.out / "text_encoder")
        networks.save_network(unet, args.out / "unet")
        networks.save_index(args.out, "StableDiffusionPipeline")
        networks.save_json(report, args.out / "training.json")

    training.run(losses, publish)


def train_inpainting(args: argparse.Namespace) -> None:
    """The text-to-image UNet learns to look at five more channels: the mask and the masked picture."""
    task = Denoising(args)
    tokenizer = words.load_tokenizer(args.text_to_image / "tokenizer")
    text_encoder = CLIPTextModel.from_pretrained(args.text_to_image / "text_encoder", dtype=torch.float32)
    narrow = UNet2DConditionModel.from_pretrained(args.text_to_image / "unet", torch_dtype=torch.float32)
    unet = networks.widened(narrow).to(memory_format=torch.channels_last)
    training = Training({"unet": unet}, args, average=0.99)

    # Encoding the masked pictures costs as much as a training step, so each thing gets its holes once and for all.
    rng = random.Random(f"{args.seed}/holes")
    masks = torch.stack([torch.stack([hole(rng) for _ in range(HOLES)]) for _ in task.things])
    around = torch.stack([task.scaled(one * (cut < 0.5)) for one, cut in zip(task.pictures, masks, strict=True)])
    small = interpolate(masks.flatten(0, 1), size=around.shape[-2:]).view(len(masks), HOLES, 1, *around.shape[-2:])

    def losses(step: int) -> Losses:
        chosen = turn(step, args.batch, len(task.things), args.seed)
        which = torch.randint(HOLES, (args.batch,))
        with torch.no_grad():
            text = text_encoder(task.tokens(tokenizer, step, chosen)).last_hidden_state
        return {"loss": task.loss(unet, task.clean[chosen], text, small[chosen, which], around[chosen, which])}

    def publish(report: Report) -> None:
        networks.save_network(unet, args.out / "unet")
        networks.save_index(args.out, "StableDiffusionInpaintPipeline")
        networks.save_json(report, args.out / "training.json")

    training.run(losses, publish)


RECIPES: Final[Recipes] = {
    "vae": Recipe(train_vae, "sd-1.5", 16, 1.5e-3, 1900),
    "text-to-image": Recipe(train_text_to_image, "sd-1.5", 32, 1e-3, 4300),
    "decoder": Recipe(train_decoder, "sd-1.5", 16, 5e-4, 400),
    "inpainting": Recipe(train_inpainting, "sd-1.5-inpainting", 32, 5e-4, 700),
}


if __name__ == "__main__":
    command(RECIPES, __doc__)
