"""The quality gate: do the miniatures draw what they are asked for?

64 captions are drawn from the world and each is generated once.  A picture counts when, of all the
world's pictures, the captioned one is its nearest neighbour in the autoencoder's scaled latents.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch
from diffusers import AutoencoderKL
from PIL import Image, ImageDraw

from ..core.guidance import classifier_free
from ..core.loading import load
from ..core.loop import denoise
from ..stages.decode import decode
from ..stages.noise import noise
from ..stages.text import encode_text
from . import networks, world
from .pictures import as_tensor, latents, pixels

HERE: Final = Path(__file__).parent
COUNT: Final = 64
NEEDED: Final = 56
SOLVER: Final = "dpm++2m"
CAPTION_HEIGHT: Final = 34

# Prompts from elsewhere, as people write them: shown below the gate's pictures and judged by eye.
FOREIGN: Final = (
    "Astronaut in a jungle, cold color palette, muted colors, detailed, 8k",
    "concept art digital painting of an elven castle, inspired by lord of the rings, highly detailed, 8k",
    "a red barn at sunset",
    "macro photograph of a dewdrop on a leaf",
    "a castle",
    "red apple",
    "A CUTE CAT",
    "a photograph of a dog, sitting on a bench",
)


def generate(folder: Path, prompts: Sequence[str], steps: int, guidance: float) -> list[Image.Image]:
    """One picture for each prompt, the n-th from seed n."""
    sd = load(str(folder), device="cpu")
    schedule, solver = sd.schedule(steps, SOLVER), sd.solver(steps, SOLVER)
    pictures: list[Image.Image] = []
    for start in range(0, len(prompts), 16):
        some = list(prompts[start : start + 16])
        cond, uncond = encode_text(sd, some), encode_text(sd, [""] * len(some))
        start_from = noise(sd, schedule, seeds=range(start, start + len(some)))
        denoiser = classifier_free(sd.denoiser, cond, uncond, guidance)
        pictures += decode(sd, denoise(denoiser, start_from, schedule, solver))
    return pictures


def nearest(folder: Path, data: Path, things: Sequence[world.Thing], pictures: Sequence[Image.Image]) -> list[int]:
    """For each picture, the thing whose own picture lies nearest in latent space."""
    vae = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32)
    known = latents(vae, pixels(data, [thing.stem for thing in things])).flatten(1)
    made = latents(vae, as_tensor(pictures)).flatten(1)
    return [int(index) for index in (torch.cdist(made, known) * vae.config.scaling_factor).argmin(1)]


def contact_sheet(pictures: Sequence[Image.Image], captions: Sequence[str], wrong: Sequence[bool]) -> Image.Image:
    """Eight to a row at twice their size, captions below; red where the gate says no."""
    cell = 2 * world.SIZE
    rows = -(-len(pictures) // 8)
    sheet = Image.new("RGB", (8 * cell, rows * (cell + CAPTION_HEIGHT)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        x, y = i % 8 * cell, i // 8 * (cell + CAPTION_HEIGHT)
        sheet.paste(picture.resize((cell, cell), Image.Resampling.BICUBIC), (x, y))
        lines = [""]
        for word in caption.split():
            fits = draw.textlength(f"{lines[-1]} {word}", font_size=9) < cell - 4
            lines = [*lines[:-1], f"{lines[-1]} {word}".strip()] if fits else [*lines, word]
        text = "\n".join(lines[:3])
        draw.multiline_text((x + 2, y + cell), text, "red" if wrong[i] else "black", font_size=9, spacing=1)
    return sheet


def main() -> int:
    """Measure, write `quality.json` and the contact sheet, and fail if the gate does."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with the two npm packages, unpacked")
    parser.add_argument("--model", type=Path, default=HERE / "sd-1.5")
    parser.add_argument("--report", type=Path, default=HERE / "quality.json")
    parser.add_argument("--sheet", type=Path, default=HERE.parent / "docs" / "miniatures" / "contact-sheet.png")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=6.0)
    parser.add_argument("--seed", type=int, default=2024)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    things = world.things(args.data)
    rng = random.Random(args.seed)
    chosen = rng.sample(range(len(things)), COUNT)
    captions = [world.caption(things[i], rng) for i in chosen]
    prompts = [*captions, *FOREIGN]
    pictures = generate(args.model, prompts, args.steps, args.guidance)
    found = nearest(args.model, args.data, things, pictures)
    wrong = [i != j for i, j in zip(chosen, found, strict=False)]
    right = COUNT - sum(wrong)

    report = {
        "right": right, "of": COUNT, "needed": NEEDED, "passed": right >= NEEDED,
        "solver": SOLVER, "steps": args.steps, "guidance": args.guidance, "captions_seed": args.seed,
        "wrong": [
            {"caption": captions[k], "asked": things[chosen[k]].name, "nearest": things[found[k]].name}
            for k in range(COUNT) if wrong[k]
        ],
        "foreign": {prompt: things[j].name for prompt, j in zip(FOREIGN, found[COUNT:], strict=True)},
    }  # fmt: skip
    networks.save_json(report, args.report)
    args.sheet.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(pictures, prompts, [*wrong, *[False] * len(FOREIGN)]).save(args.sheet)
    print(f"{right} of {COUNT} captions give the right picture; {NEEDED} are needed")
    return 0 if right >= NEEDED else 1


if __name__ == "__main__":
    sys.exit(main())
