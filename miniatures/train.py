"""Train the miniatures on a CPU: `vae`, `text-to-image`, `decoder`, `inpainting`, each from what came before.

A training that was killed goes on from its last checkpoint: run the same command again.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Final

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate, mse_loss
from transformers import CLIPTextModel, CLIPTokenizer

from . import networks, words, world
from .training import Losses, Report, Training

HERE: Final = Path(__file__).parent
HOLES: Final = 32
EMPTY: Final = 0.25
GUIDANCE: Final = 4.0


def pixels(data: Path, stems: Sequence[str]) -> Tensor:
    """The pictures of some emoji as the autoencoder sees them."""
    return as_tensor([world.picture(data, stem) for stem in stems])


def as_tensor(pictures: Sequence[Image.Image]) -> Tensor:
    """N × 3 × 64 × 64 in [-1, 1]."""
    stacked = np.stack([np.asarray(picture) for picture in pictures])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).float() / 127.5 - 1


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


def latents(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """The posterior means of pictures, unscaled."""
    with torch.no_grad():
        return torch.cat([vae.encode(batch).latent_dist.mean for batch in torch.split(pictures, 64)])


# --- the denoisers --------------------------------------------------------------------------------------------


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
        ids, empty = task.tokens(tokenizer, step, chosen)
        text = text_encoder(ids).last_hidden_state
        return {"loss": task.loss(unet, task.clean[chosen], text, empty)}

    def publish(report: Report) -> None:
        networks.save_network(text_encoder, args.out / "text_encoder")
        networks.save_network(unet, args.out / "unet")
        networks.save_index(args.out, "StableDiffusionPipeline")
        networks.save_json(report, args.out / "training.json")

    training.run(losses, publish)


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


def train_inpainting(args: argparse.Namespace) -> None:
    """The text-to-image UNet learns to look at five more channels: the mask and the masked picture."""
    task = Denoising(args)
    tokenizer = words.load_tokenizer(args.text_to_image / "tokenizer")
    text_encoder = CLIPTextModel.from_pretrained(args.text_to_image / "text_encoder", dtype=torch.float32)
    narrow = UNet2DConditionModel.from_pretrained(args.text_to_image / "unet", torch_dtype=torch.float32)
    unet = networks.widened(narrow).to(memory_format=torch.channels_last)
    training = Training({"unet": unet}, args, average=0.998)

    # Encoding the masked pictures costs as much as a training step, so each thing gets its holes once and for all.
    rng = random.Random(f"{args.seed}/holes")
    masks = torch.stack([torch.stack([hole(rng) for _ in range(HOLES)]) for _ in task.things])
    around = torch.stack([task.scaled(one * (cut < 0.5)) for one, cut in zip(task.pictures, masks, strict=True)])
    small = interpolate(masks.flatten(0, 1), size=around.shape[-2:]).view(len(masks), HOLES, 1, *around.shape[-2:])

    def losses(step: int) -> Losses:
        chosen = turn(step, args.batch, len(task.things), args.seed)
        which = torch.randint(HOLES, (args.batch,))
        ids, empty = task.tokens(tokenizer, step, chosen)
        with torch.no_grad():
            text = text_encoder(ids).last_hidden_state
        beside = small[chosen, which], around[chosen, which]
        return {"loss": task.loss(unet, task.clean[chosen], text, empty, *beside)}

    def publish(report: Report) -> None:
        networks.save_network(unet, args.out / "unet")
        networks.save_index(args.out, "StableDiffusionInpaintPipeline")
        networks.save_json(report, args.out / "training.json")

    training.run(losses, publish)


def main() -> None:
    """`python -P -m unrolled.miniatures.train vae --data DATA --work WORK`, and so on."""
    recipes = {
        "vae": (train_vae, "sd-1.5", 16, 1.5e-3, 1650),
        "text-to-image": (train_text_to_image, "sd-1.5", 32, 1e-3, 7000),
        "decoder": (train_decoder, "sd-1.5", 16, 5e-4, 500),
        "inpainting": (train_inpainting, "sd-1.5-inpainting", 32, 5e-4, 2000),
    }
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=recipes)
    parser.add_argument("--data", type=Path, required=True, help="folder with the two npm packages, unpacked")
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints")
    parser.add_argument("--models", type=Path, default=HERE, help="folder for the finished miniatures")
    parser.add_argument("--steps", type=int, help="how many steps in all")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--every", type=int, default=250, help="steps between checkpoints")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    recipe, name, batch, rate, steps = recipes[args.what]
    args.batch, args.lr, args.steps = args.batch or batch, args.lr or rate, args.steps or steps
    args.out, args.text_to_image = args.models / name, args.models / "sd-1.5"
    args.out.mkdir(parents=True, exist_ok=True)
    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    recipe(args)


if __name__ == "__main__":
    main()
