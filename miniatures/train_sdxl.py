"""Train the SDXL miniatures on a CPU: `sdxl-vae`, `sdxl-decoder`, `sdxl-base`, `sdxl-refiner`, in this order.

The text encoders are frozen ones from elsewhere: SD 1.5's and the text half of the Kandinsky miniatures' CLIP.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Final

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image, ImageFilter
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from . import networks, sdxl_networks, words, world
from .denoising import EMPTY
from .pictures import as_tensor, latents
from .sdxl_networks import SIZE
from .train import likeness, turn
from .training import Losses, Recipe, Recipes, Report, Training, command

CROP: Final = 64
SHIFT: Final = 0.1
BANK: Final = 24  # captions a thing has, encoded once and for all
# What the base learns to draw: as much as half an hour of half a core suffices for.
_DRAWN: Final = """
cat, dog, lion, dragon, butterfly, sunflower, red apple, house, castle, mountain, earth, car, rocket, sun
dewdrop, wave, robot, astronaut, wizard
"""
VIEWS: Final = (8, 1, 1)  # how often a thing is seen whole, shrunk, cropped
GOOD: Final = 6.0
BAD: Final = 2.5
REFINED: Final = 200  # of the training's thousand steps


# --- the autoencoder ------------------------------------------------------------------------------------------


def pieces(pictures: Sequence[Tensor], size: int, rng: random.Random) -> Tensor:
    """A square out of each picture, every other one mirrored."""
    cut = []
    for picture in pictures:
        top, left = (rng.randint(0, SIZE - size) for _ in range(2))
        piece = picture[:, top : top + size, left : left + size]
        cut.append(piece.flip(-1) if rng.random() < 0.5 else piece)
    return torch.stack(cut).contiguous(memory_format=torch.channels_last)


def train_vae(args: argparse.Namespace) -> None:
    """On pieces of all the emoji; every fourth step on whole pictures, fewer of them. Half are from the world."""
    things = [thing.stem for thing in world.things(args.data)]
    others = sorted(path.stem for path in world.assets(args.data).glob("*.webp") if "1f3f" not in path.stem)
    mine, all_of_them = (as_tensor([world.picture(args.data, s, SIZE) for s in stems]) for stems in (things, others))
    torch.manual_seed(args.seed)
    vae = sdxl_networks.new_vae().to(memory_format=torch.channels_last)
    training = Training({"vae": vae}, args, average=0.995)

    def losses(step: int) -> Losses:
        rng = random.Random(f"{args.seed}/{step}")
        size, half = (SIZE, args.batch // 8) if step % 4 == 3 else (CROP, args.batch // 2)
        batch = pieces([*rng.choices(list(mine), k=half), *rng.choices(list(all_of_them), k=half)], size, rng)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(batch).latent_dist
            mean, logvar = posterior.mean.float(), posterior.logvar.float()
            decoded = vae.decode(mean + torch.randn_like(mean) * (0.5 * logvar).exp()).sample
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        rebuilt = likeness(decoded.float(), batch)
        return {"loss": rebuilt + 1e-3 * kl, "rebuilt": rebuilt.detach(), "kl": kl.detach()}

    def publish(report: Report) -> None:
        vae.register_to_config(scaling_factor=round(1 / latents(vae, mine[::4]).std().item(), 5))
        networks.save_network(vae, args.out / "vae")
        networks.save_json(report, args.out / "vae-training.json")

    training.run(losses, publish)


def train_decoder(args: argparse.Namespace) -> None:
    """The decoder alone once more, on the world's latents, which stay as they are."""
    mine = as_tensor([world.picture(args.data, thing.stem, SIZE) for thing in world.things(args.data)])
    vae = AutoencoderKL.from_pretrained(args.out / "vae", torch_dtype=torch.float32)
    vae.requires_grad_(False)
    vae.decoder.requires_grad_(True)
    vae.to(memory_format=torch.channels_last)
    clean = latents(vae, mine)
    training = Training({"vae": vae}, args, average=0.99)

    def losses(step: int) -> Losses:
        chosen = turn(step, args.batch, len(mine), args.seed)
        noise = 0.1 * clean.std() * torch.rand(args.batch, 1, 1, 1) * torch.randn_like(clean[chosen])
        with torch.autocast("cpu", torch.bfloat16):
            decoded = vae.decode((clean[chosen] + noise).contiguous(memory_format=torch.channels_last)).sample
        return {"loss": likeness(decoded.float(), mine[chosen])}

    def publish(report: Report) -> None:
        networks.save_network(vae, args.out / "vae")
        networks.save_json(report, args.out / "decoder-training.json")

    training.run(losses, publish)


# --- what both denoisers share --------------------------------------------------------------------------------


class Sentences:
    """What frozen text encoders make of captions: their last but one states side by side, and the second's summary."""

    def __init__(self, models: Path, both: bool) -> None:
        self.tokenizer = words.load_tokenizer(models / "sd-1.5" / "tokenizer")
        second = models / "kandinsky-2.2-prior" / "text_encoder"
        self.encoders = [CLIPTextModelWithProjection.from_pretrained(second, dtype=torch.float32)]
        if both:
            self.encoders.insert(0, CLIPTextModel.from_pretrained(models / "sd-1.5" / "text_encoder", dtype=torch.float32))

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """The context and the summary of each text."""
        ids = self.tokenizer(
            list(texts), padding="max_length", max_length=words.LENGTH, truncation=True, return_tensors="pt"
        ).input_ids
        with torch.no_grad():
            said = [encoder(ids, output_hidden_states=True) for encoder in self.encoders]
        return torch.cat([one.hidden_states[-2] for one in said], -1), said[-1].text_embeds


def spread(count: int, low: int = 0, high: int = networks.TRAIN_STEPS) -> Tensor:
    """Training steps in [low, high), one from each of as many equal parts, shuffled."""
    return (low + (torch.randperm(count) + torch.rand(count)) / count * (high - low)).long()


def bank(say: Sentences, things: Sequence[world.Thing], count: int, rng: random.Random) -> tuple[Tensor, Tensor]:
    """Contexts and summaries of as many captions of each thing."""
    said = [say([world.caption(thing, rng) for _ in range(count)]) for thing in things]
    return torch.stack([context for context, _ in said]), torch.stack([summary for _, summary in said])


def noise_loss(
    unet: UNet2DConditionModel, clean: Tensor, steps: Tensor, context: Tensor, summary: Tensor, ids: Tensor
) -> Tensor:
    """The error of the predicted noise, weighted like the picture's where there is neither much noise nor little.

    That is min-SNR (gamma 5), and as much for the noisiest steps: there the outlines are drawn, and unweighted
    hardly anybody learns from the words what to draw.
    """
    kept = networks.alphas_cumprod()[steps].view(-1, 1, 1, 1)
    # Pure noise is on average zero and a page on average white: a shifted noise keeps the one from being read as the other
    noise = torch.randn_like(clean) + SHIFT * torch.randn(*clean.shape[:2], 1, 1)
    ratio = kept / (1 - kept)
    noisy = (kept.sqrt() * clean + (1 - kept).sqrt() * noise).contiguous(memory_format=torch.channels_last)
    beside = {"text_embeds": summary, "time_ids": ids}
    predicted: Tensor = unet(noisy, steps, context, added_cond_kwargs=beside).sample
    return (ratio.clamp(0.25, 5) / ratio * (predicted - noise) ** 2).mean()


def codes(args: argparse.Namespace, pictures: Sequence[Image.Image]) -> Tensor:
    """Latents of pictures in the units the denoisers work in."""
    vae = AutoencoderKL.from_pretrained(args.models / "sdxl-base" / "vae", torch_dtype=torch.float32).eval()
    factor: float = vae.config.scaling_factor
    return latents(vae, as_tensor(pictures)) * factor


# --- the base -------------------------------------------------------------------------------------------------


def views(data: Path, stem: str, rng: random.Random) -> list[tuple[Image.Image, tuple[int, ...]]]:
    """A thing whole, shrunk and enlarged again, and cropped, each with what SDXL is told about its sizes."""
    small, large = rng.randint(24, 96), rng.randint(SIZE + 16, SIZE + 64)
    top, left = rng.randint(0, large - SIZE), rng.randint(0, large - SIZE)
    shrunk = world.picture(data, stem, small).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    cropped = world.picture(data, stem, large).crop((left, top, left + SIZE, top + SIZE))
    return [
        (world.picture(data, stem, SIZE), (SIZE, SIZE, 0, 0, SIZE, SIZE)),
        (shrunk, (small, small, 0, 0, SIZE, SIZE)),
        (cropped, (large, large, top, left, SIZE, SIZE)),
    ]


def train_base(args: argparse.Namespace) -> None:
    """From nothing; one caption in ten is empty, and that means zeros to SDXL."""
    drawn = {name.strip() for name in _DRAWN.replace("\n", ",").split(",")}
    things = [thing for thing in world.things(args.data) if thing.name in drawn]
    rng = random.Random(f"{args.seed}/views")
    contexts, summaries = bank(Sentences(args.models, both=True), things, BANK, rng)
    seen = [view for thing in things for view in views(args.data, thing.stem, rng)]
    clean = codes(args, [picture for picture, _ in seen]).view(-1, len(VIEWS), 4, SIZE // 4, SIZE // 4)
    ids = torch.tensor([sizes for _, sizes in seen]).view(-1, len(VIEWS), 6)
    torch.manual_seed(args.seed)
    unet = sdxl_networks.new_base().to(memory_format=torch.channels_last)
    training = Training({"unet": unet}, args, average=0.995)

    def losses(step: int) -> Losses:
        rng = random.Random(f"{args.seed}/{step}")
        chosen = turn(step, args.batch, len(things), args.seed)
        which = rng.choices(range(len(VIEWS)), VIEWS, k=args.batch)
        words_of = torch.randint(BANK, (args.batch,))
        told = (torch.rand(args.batch, 1) >= EMPTY).float()
        context, summary = contexts[chosen, words_of] * told[:, :, None], summaries[chosen, words_of] * told
        return {"loss": noise_loss(unet, clean[chosen, which], spread(args.batch), context, summary, ids[chosen, which])}

    def publish(report: Report) -> None:
        networks.save_network(unet, args.out / "unet")
        networks.save_index(
            args.out,
            "StableDiffusionXLPipeline",
            sdxl_networks.BASE_PARTS,
            sdxl_networks.SCHEDULER,
            {**sdxl_networks.NO_PICTURES, "force_zeros_for_empty_prompt": True},
        )
        networks.save_json({"things": [thing.name for thing in things], **report}, args.out / "training.json")

    training.run(losses, publish)


# --- the refiner ----------------------------------------------------------------------------------------------


def spoiled(picture: Image.Image, rng: random.Random) -> Image.Image:
    """A picture of aesthetic score 2.5: blurred, or squeezed into a small JPEG, or noisy."""
    kind = rng.choice(("blurred", "squeezed", "noisy"))
    if kind == "blurred":
        return picture.filter(ImageFilter.GaussianBlur(rng.uniform(1, 3)))
    if kind == "squeezed":
        file = BytesIO()
        picture.save(file, "JPEG", quality=rng.randint(5, 20))
        return Image.open(file).convert("RGB")
    noise = Image.merge("RGB", [Image.effect_noise(picture.size, rng.uniform(60, 120)) for _ in range(3)])
    return Image.blend(picture, noise, rng.uniform(0.1, 0.3))


def train_refiner(args: argparse.Namespace) -> None:
    """Three quarters of each batch below step 200, a quarter above; a quarter of the pictures are spoiled.

    The real one knows the low-noise fifth only.  This one also has to inpaint from pure noise.
    """
    things, say = world.things(args.data), Sentences(args.models, both=False)
    contexts, summaries = bank(say, things, BANK // 3, random.Random(args.seed))
    nothing, no_summary = say([""])
    good = [world.picture(args.data, thing.stem, SIZE) for thing in things]
    rng = random.Random(f"{args.seed}/spoiled")
    clean = torch.stack([codes(args, good), codes(args, [spoiled(picture, rng) for picture in good])], 1)
    torch.manual_seed(args.seed)
    unet = sdxl_networks.new_refiner().to(memory_format=torch.channels_last)
    training = Training({"unet": unet}, args, average=0.995)

    def losses(step: int) -> Losses:
        rng = random.Random(f"{args.seed}/{step}")
        chosen = turn(step, args.batch, len(things), args.seed)
        bad = [int(rng.random() < 0.25) for _ in chosen]
        words_of, told = torch.randint(BANK // 3, (args.batch,)), torch.rand(args.batch, 1) >= EMPTY
        context = torch.where(told[:, :, None], contexts[chosen, words_of], nothing)
        summary = torch.where(told, summaries[chosen, words_of], no_summary)
        scores = [(BAD if spoilt else GOOD) + rng.uniform(-0.5, 0.5) for spoilt in bad]
        ids = torch.tensor([(SIZE, SIZE, 0, 0, score) for score in scores])
        many = args.batch * 3 // 4
        steps = torch.cat([spread(many, 0, REFINED), spread(args.batch - many, REFINED)])
        return {"loss": noise_loss(unet, clean[chosen, bad], steps, context, summary, ids)}

    def publish(report: Report) -> None:
        networks.save_network(unet, args.out / "unet")
        networks.save_index(
            args.out,
            "StableDiffusionXLImg2ImgPipeline",
            sdxl_networks.REFINER_PARTS,
            sdxl_networks.SCHEDULER,
            {**sdxl_networks.NO_PICTURES, "force_zeros_for_empty_prompt": False, "requires_aesthetics_score": True},
        )
        steps = {"0 to 199": "three quarters of each batch", "200 to 999": "a quarter of each batch"}
        networks.save_json({"training_steps_drawn": steps, **report}, args.out / "training.json")

    training.run(losses, publish)


RECIPES: Final[Recipes] = {
    "sdxl-vae": Recipe(train_vae, "sdxl-base", 16, 2e-3, 1000),
    "sdxl-decoder": Recipe(train_decoder, "sdxl-base", 4, 1e-3, 500),
    "sdxl-base": Recipe(train_base, "sdxl-base", 8, 2e-3, 6000),
    "sdxl-refiner": Recipe(train_refiner, "sdxl-refiner", 8, 2e-3, 800),
}


if __name__ == "__main__":
    command(RECIPES, __doc__)
