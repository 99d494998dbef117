"""Train the Kandinsky miniatures on a CPU: `clip`, `movq`, `prior`, `decoder`, `inpaint`, in this order.

A training that was killed goes on from its last checkpoint: run the same command again.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Final

import torch
from diffusers import UnCLIPScheduler, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, cross_entropy, normalize, pad
from transformers import CLIPTextModelWithProjection, CLIPVisionModelWithProjection

from . import kandinsky_networks, networks, words, world
from .kandinsky_denoising import NOTHING, Drawing, Inpainting, embedded, from_folder
from .kandinsky_networks import encoded
from .kandinsky_views import cutouts, on_white, view
from .pictures import pixels
from .train import disturbed, likeness, turn
from .training import Losses, Recipe, Recipes, Report, Training, command

THUMB: Final = 16
CODEBOOK: Final = 200
CROPPED: Final = 0.7


# --- CLIP -----------------------------------------------------------------------------------------------------


class Comparison(nn.Module):
    """What CLIP needs only while it learns: how sharply to compare, and a glimpse of what it remembers."""

    def __init__(self) -> None:
        super().__init__()
        self.sharpness = nn.Parameter(torch.tensor(2.7))
        self.glimpse = nn.Linear(networks.HIDDEN, 3 * THUMB * THUMB)

    def apart(self, ours: Tensor, theirs: Tensor, who: Tensor) -> Tensor:
        """CLIP's loss both ways; the same thing twice in a batch is right twice."""
        scores = self.sharpness.clamp(max=4.6).exp() * normalize(ours) @ normalize(theirs).T
        same = (who[:, None] == who).float()
        right = same / same.sum(1, keepdim=True)
        return 0.5 * (cross_entropy(scores, right) + cross_entropy(scores.T, right))


def train_clip(args: argparse.Namespace) -> None:
    """Captions and pictures of one thing together, those of different things apart.

    A linear map must find the thing's colours and shape in the embedding too: somebody will draw from it.
    """
    things = world.things(args.data)
    stems = [thing.stem for thing in things]
    views = torch.stack([cutouts(args.data, stems, flat) for flat in (False, True)], 1)
    thumbs = adaptive_avg_pool2d(on_white(views[:, 0]), THUMB)
    tokenizer = words.load_tokenizer(args.text_to_image / "tokenizer")
    torch.manual_seed(args.seed)
    text, image = kandinsky_networks.new_text_tower(tokenizer), kandinsky_networks.new_image_tower()
    comparison = Comparison()
    training = Training({"text": text, "image": image, "comparison": comparison}, args, average=0.99)

    def losses(step: int) -> Losses:
        chosen = turn(step, args.batch, len(things), args.seed)
        rng = random.Random(f"{args.seed}/captions/{step}")
        tokens = tokenizer([world.caption(things[i], rng) for i in chosen], padding=True, return_tensors="pt")
        pictures = view(views[chosen, (torch.rand(args.batch) < 0.4).long()])
        with torch.autocast("cpu", torch.bfloat16):
            said = text(tokens.input_ids).text_embeds
            seen = image(kandinsky_networks.normalised(pictures)).image_embeds
        said, seen = said.float(), seen.float()
        contrast = comparison.apart(said, seen, torch.tensor(chosen))
        glimpse = (comparison.glimpse(seen).view(-1, 3, THUMB, THUMB) - thumbs[chosen]).abs().mean()
        return {"loss": contrast + glimpse, "contrast": contrast.detach(), "glimpse": glimpse.detach()}

    def publish(report: Report) -> None:
        networks.save_network(text, args.out / "text_encoder")
        networks.save_network(image, args.out / "image_encoder")
        networks.save_json(kandinsky_networks.IMAGE_PROCESSOR, args.out / "image_processor" / "preprocessor_config.json")
        networks.save_json(report, args.out / "clip-training.json")

    training.run(losses, publish)


# --- MoVQ -----------------------------------------------------------------------------------------------------


def train_movq(args: argparse.Namespace) -> None:
    """On all the emoji, half of each batch from the world; a quarter of the latents goes through the codebook.

    The others get some noise, and are kept near unit deviation: what the decoder draws will not be exact either.
    It begins with quarters of the pictures, which is four times as fast.
    """
    things = [thing.stem for thing in world.things(args.data)]
    others = sorted(path.stem for path in world.assets(args.data).glob("*.webp") if "1f3f" not in path.stem)
    mine, all_of_them = pixels(args.data, things), pixels(args.data, others)
    torch.manual_seed(args.seed)
    movq = kandinsky_networks.new_movq()
    training = Training({"movq": movq}, args, average=0.995)

    def losses(step: int) -> Losses:
        rng = random.Random(f"{args.seed}/{step}")
        half = args.batch // 2
        chosen = [*rng.choices(list(mine), k=half), *rng.choices(list(all_of_them), k=args.batch - half)]
        batch = torch.stack([disturbed(picture, rng) for picture in chosen])
        if step < CROPPED * args.steps:
            top, left = rng.randint(0, world.SIZE // 2), rng.randint(0, world.SIZE // 2)
            batch = batch[:, :, top : top + world.SIZE // 2, left : left + world.SIZE // 2]
        with torch.autocast("cpu", torch.bfloat16):
            codes = movq.encode(batch).latents.float()
        spread = codes.mean((0, 2, 3)) ** 2 + (codes.std((0, 2, 3)) - 1) ** 2
        if step == CODEBOOK:  # it begins with latents met on the way: a random one would hardly be used
            entries = codes.detach().movedim(1, -1).flatten(0, 2)
            movq.quantize.embedding.weight.data = entries[torch.randperm(len(entries))[: movq.quantize.n_e]]
        exact, commitment, _ = movq.quantize(codes)
        noisy = codes + 0.3 * torch.rand(args.batch, 1, 1, 1) * torch.randn_like(codes)
        coarse = (torch.arange(args.batch) % 4 == 0).view(-1, 1, 1, 1) & torch.tensor(step >= CODEBOOK)
        with torch.autocast("cpu", torch.bfloat16):
            decoded = movq.decode(torch.where(coarse, exact, noisy), force_not_quantize=True).sample
        rebuilt = likeness(decoded.float(), batch)
        loss = rebuilt + 0.1 * spread.mean() + 0.1 * commitment * (step >= CODEBOOK)
        return {
            "loss": loss,
            "rebuilt": rebuilt.detach(),
            "spread": spread.mean().detach(),
            "commitment": commitment.detach(),
        }

    def publish(report: Report) -> None:
        kandinsky_networks.rescaled(movq, 1 / encoded(movq, mine).std().item())
        networks.save_network(movq, args.out / "movq")
        networks.save_json(report, args.out / "movq-training.json")

    training.run(losses, publish)


# --- the diffusion prior --------------------------------------------------------------------------------------


def train_prior(args: argparse.Namespace) -> None:
    """From noise to the embedding of the picture that a caption asks for; one caption in ten is empty."""
    things = world.things(args.data)
    tokenizer = words.load_tokenizer(args.text_to_image / "tokenizer")
    text = from_folder(CLIPTextModelWithProjection, args.out / "text_encoder")
    image = from_folder(CLIPVisionModelWithProjection, args.out / "image_encoder")
    embeds = embedded(image, pixels(args.data, [thing.stem for thing in things]))
    mean, std = embeds.mean(0, keepdim=True), embeds.std(0, keepdim=True)
    torch.manual_seed(args.seed)
    prior = kandinsky_networks.new_prior()
    prior.clip_mean.requires_grad_(False).copy_(mean)
    prior.clip_std.requires_grad_(False).copy_(std)
    scheduler = UnCLIPScheduler.from_config(kandinsky_networks.PRIOR_SCHEDULER)
    training = Training({"prior": prior}, args, average=0.995)

    def losses(step: int) -> Losses:
        chosen = turn(step, args.batch, len(things), args.seed)
        rng = random.Random(f"{args.seed}/captions/{step}")
        said = ["" if rng.random() < NOTHING else world.caption(things[i], rng) for i in chosen]
        tokens = tokenizer(said, padding=True, truncation=True, max_length=words.LENGTH, return_tensors="pt")
        spoken = text(tokens.input_ids)
        missing = words.LENGTH - tokens.input_ids.shape[1]  # masked, so that there may be anything
        hidden, mask = pad(spoken.last_hidden_state, (0, 0, 0, missing)), pad(tokens.attention_mask, (0, missing)).bool()
        clean, steps = ((embeds - mean) / std)[chosen], torch.randint(networks.TRAIN_STEPS, (args.batch,))
        noisy = scheduler.add_noise(clean, torch.randn_like(clean), steps)
        drawn = prior(noisy, steps, spoken.text_embeds, hidden, mask).predicted_image_embedding
        return {"loss": ((drawn - clean) ** 2).mean()}

    def publish(report: Report) -> None:
        networks.save_network(prior, args.out / "prior")
        networks.save_json(kandinsky_networks.PRIOR_INDEX, args.out / "model_index.json")
        networks.save_json(kandinsky_networks.PRIOR_SCHEDULER, args.out / "scheduler" / "scheduler_config.json")
        networks.save_json(report, args.out / "prior-training.json")

    training.run(losses, publish)


# --- the decoders ---------------------------------------------------------------------------------------------


def save_decoder(unet: UNet2DConditionModel, folder: Path, pipeline: str, report: Report) -> None:
    """A decoder's checkpoint but for its MoVQ."""
    networks.save_network(unet, folder / "unet")
    networks.save_json({**kandinsky_networks.DECODER_INDEX, "_class_name": pipeline}, folder / "model_index.json")
    networks.save_json(kandinsky_networks.DECODER_SCHEDULER, folder / "scheduler" / "scheduler_config.json")
    networks.save_json(report, folder / "training.json")


def train_decoder(args: argparse.Namespace) -> None:
    """From nothing, to draw what an embedding means."""
    task = Drawing(args)
    torch.manual_seed(args.seed)
    unet = kandinsky_networks.new_decoder()
    training = Training({"unet": unet}, args, average=0.997)

    def losses(step: int) -> Losses:
        chosen = torch.tensor(turn(step, args.batch, len(task.clean), args.seed))
        return {"loss": task.loss(unet, task.clean[chosen], task.embeds(chosen))}

    training.run(losses, lambda report: save_decoder(unet, args.out, "KandinskyV22Pipeline", report))


def train_inpaint(args: argparse.Namespace) -> None:
    """The decoder learns to look at five more channels: what is kept, and where."""
    task = Inpainting(args)
    decoder = from_folder(UNet2DConditionModel, args.models / "kandinsky-2.2-decoder/unet")
    unet = kandinsky_networks.widened(decoder)
    training = Training({"unet": unet}, args, average=0.995)

    def losses(step: int) -> Losses:
        chosen = torch.tensor(turn(step, args.batch, len(task.asked), args.seed))
        embeds = task.embeds(task.asked[chosen])
        return {"loss": task.loss(unet, task.whole[chosen], embeds, task.hidden[chosen], task.keep[chosen])}

    training.run(losses, lambda report: save_decoder(unet, args.out, "KandinskyV22InpaintPipeline", report))


RECIPES: Final[Recipes] = {
    "clip": Recipe(train_clip, "kandinsky-2.2-prior", 64, 1e-3, 2000),
    "movq": Recipe(train_movq, "kandinsky-2.2-decoder", 12, 2e-3, 1120),
    "prior": Recipe(train_prior, "kandinsky-2.2-prior", 32, 2e-3, 600),
    "decoder": Recipe(train_decoder, "kandinsky-2.2-decoder", 32, 2e-3, 4400),
    "inpaint": Recipe(train_inpaint, "kandinsky-2.2-decoder-inpaint", 32, 1e-3, 1200),
}


if __name__ == "__main__":
    command(RECIPES, __doc__)
