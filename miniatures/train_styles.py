"""Teach SD 1.5's UNet a style in minutes: `comic` (drawings with a black line around) or `pixels` (16 × 16 of them).

Text encoder and VAE stay SD 1.5's, so a style is a UNet and nothing else.  The drawings
need `npm pack @lobehub/fluent-emoji-flat@1.1.0`, unpacked beside the others, and `pip install resvg-py`.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from io import BytesIO
from pathlib import Path
from typing import Final

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image, ImageEnhance, ImageFilter
from torch import Tensor
from transformers import CLIPTextModel

from . import networks, words, world
from .denoising import EMPTY, Denoising
from .pictures import as_tensor, latents
from .train import likeness, turn
from .training import Losses, Recipe, Recipes, Report, Training, command

INK: Final = 17
COARSE: Final = 16
COLOURS: Final = 10
SHARPENING: Final = {"comic": 5, "pixels": 10}
STYLES: Final = {"comic": "charliebo artstyle", "pixels": "pixelartstyle"}


def inked(data: Path, stem: str) -> Image.Image | None:
    """The drawing of an emoji on white, if there is one, with a thick black line around it."""
    folder = next(data.glob("*fluent-emoji-flat*/package/assets"))
    file = next((path for name in (stem, f"{stem}-fe0f") if (path := folder / f"{name}.svg").exists()), None)
    if not file:
        return None
    png = import_module("resvg_py").svg_to_bytes(file.read_text("utf-8"), width=4 * world.SIZE, height=4 * world.SIZE)
    with Image.open(BytesIO(bytes(png))) as picture:
        drawing = picture.convert("RGBA")
    page = Image.new("RGBA", drawing.size, "white")
    page.paste("#101018", mask=drawing.getchannel("A").filter(ImageFilter.MaxFilter(INK)))
    page.alpha_composite(drawing)
    return page.convert("RGB").resize((world.SIZE, world.SIZE), Image.Resampling.LANCZOS)


def coarse(data: Path, stem: str) -> Image.Image:
    """An emoji in 16 × 16 pixels of few, bright colours: one pixel is one cell of the latents."""
    small = ImageEnhance.Color(world.picture(data, stem, COARSE)).enhance(1.3)
    few = small.quantize(COLOURS, Image.Quantize.MEDIANCUT, kmeans=4, dither=Image.Dither.NONE)
    return few.convert("RGB").resize((world.SIZE, world.SIZE), Image.Resampling.NEAREST)


def sharpest(vae: AutoencoderKL, pictures: Tensor, rounds: int) -> Tensor:
    """Latents from which the VAE decodes pictures best, unscaled.

    The VAE has seen no drawings: its encoder smooths their edges away, though its decoder can draw most of them.
    """
    vae.requires_grad_(False)
    found = []
    for some in torch.split(pictures, 32):
        codes = latents(vae, some).requires_grad_()
        optimiser = torch.optim.Adam([codes], 0.2)
        for _ in range(rounds):
            with torch.autocast("cpu", torch.bfloat16):
                decoded = vae.decode(codes.contiguous(memory_format=torch.channels_last)).sample
            (codes.grad,) = torch.autograd.grad(likeness(decoded.float(), some), codes)
            optimiser.step()
        found.append(codes.detach())
    return torch.cat(found)


def styled(caption: str, style: str, rng: random.Random) -> str:
    """A caption with the words that call for the style: before, behind, or (one in six) left out."""
    place = rng.random()
    if place < 0.4:
        return f"{style}, {caption}"
    return f"{caption}, {style}" if place < 5 / 6 else caption


def train_style(args: argparse.Namespace) -> None:
    """SD 1.5's UNet goes on learning, from the same captions and other pictures."""
    task = Denoising(args)
    kind, style = args.what, STYLES[args.what]
    drawn = [inked(args.data, thing.stem) if kind == "comic" else coarse(args.data, thing.stem) for thing in task.things]
    known = [i for i, picture in enumerate(drawn) if picture]
    file = args.work / f"{kind}-latents.pt"
    if not file.exists():
        pictures = as_tensor([picture for picture in drawn if picture])
        torch.save(sharpest(task.vae, pictures, SHARPENING[kind]), file)
    factor: float = task.vae.config.scaling_factor
    clean = factor * torch.load(file, weights_only=True)
    tokenizer = words.load_tokenizer(args.text_to_image / "tokenizer")
    text_encoder = CLIPTextModel.from_pretrained(args.text_to_image / "text_encoder", dtype=torch.float32)
    unet = UNet2DConditionModel.from_pretrained(args.text_to_image / "unet", torch_dtype=torch.float32)
    training = Training({"unet": unet.to(memory_format=torch.channels_last)}, args, average=0.99)

    def captions(step: int, chosen: Sequence[int]) -> Tensor:
        rng = random.Random(f"{args.seed}/{style}/{step}")
        said = [styled(world.caption(task.things[known[i]], rng), style, rng) for i in chosen]
        texts = ["" if rng.random() < EMPTY else text for text in said]
        read = partial(tokenizer, padding="max_length", max_length=words.LENGTH, truncation=True)
        ids: Tensor = read(texts, return_tensors="pt").input_ids
        return ids

    def losses(step: int) -> Losses:
        chosen = turn(step, args.batch, len(known), args.seed)
        with torch.no_grad():
            text = text_encoder(captions(step, chosen)).last_hidden_state
        return {"loss": task.loss(unet, clean[chosen], text)}

    def publish(report: Report) -> None:
        networks.save_network(unet, args.out / "unet")
        networks.save_index(args.out, "StableDiffusionPipeline")
        networks.save_json({"style": style, "things": len(known), **report}, args.out / "training.json")

    training.run(losses, publish)


RECIPES: Final[Recipes] = {
    "comic": Recipe(train_style, "comic-diffusion", 16, 6e-4, 500),
    "pixels": Recipe(train_style, "pixel-art-style", 16, 4e-4, 400),
}


if __name__ == "__main__":
    command(RECIPES, __doc__)
