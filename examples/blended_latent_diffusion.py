"""Blended latent diffusion: another thing in one part of a picture, by a model that was never taught to inpaint.

Avrahami et al., Blended Latent Diffusion, arXiv:2206.02779, algorithm 1:
``z_t = m z_fg,t + (1 - m) z_bg,t`` after every step, z_bg the picture's latents under noise of level t.

The seam: the loop goes on from whatever ``step.x`` is set to. (:func:`keep_known` is built in: this with one noise for the
run, as inpainting has it.)
The picture: what is given; the upper part of what the new prompt alone would paint, pasted in; that part blended at every
step: it goes over into what lies below, the owl into the snowman, the castle into its hill, and pales.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from unrolled import (
    Latents,
    Noise,
    Step,
    classifier_free,
    composite,
    decode,
    denoise,
    encode_image,
    encode_text,
    grid,
    latent_mask,
    load,
    noise,
    resize,
)


def blended(clean: Latents, mask: Tensor) -> Callable[[Step], None]:
    """A hook that keeps ``clean`` where the mask is 0 and lets the prompt have what is under its ones."""
    fresh = Noise(clean.seeds, "background")

    def hook(step: Step) -> None:
        unit = fresh(step.x.shape, "step", step.index).to(step.x)
        step.x = torch.lerp(clean.x + step.sigma_next * unit, step.x, mask.to(step.x))

    return hook


def main(folder: str = "outputs") -> None:
    """Change the upper part of three pictures."""
    sd = load("sd-1.5")  # load("sd-1.5", models="hub") for the real model
    schedule, solver = sd.sampling(steps=25)
    seeds, uncond = range(3), encode_text(sd, "")
    start = noise(sd, schedule, seeds=seeds)
    old = classifier_free(sd.denoiser, encode_text(sd, ["an astronaut", "an island", "a snowman"]), uncond, 4.0)
    new = classifier_free(sd.denoiser, encode_text(sd, ["a panda", "a castle", "an owl"]), uncond, 2.0)
    given = decode(sd, denoise(old, start, schedule, solver))
    upper = Image.new("L", given[0].size)
    ImageDraw.Draw(upper).rectangle((0, 0, 63, 37), fill="white")

    hook = blended(encode_image(sd, given, seeds=seeds), latent_mask(upper, sd.space))
    alone = decode(sd, denoise(new, start, schedule, solver))
    pasted = [composite(picture, other, upper) for picture, other in zip(given, alone, strict=True)]
    changed = decode(sd, denoise(new, start, schedule, solver, [hook]))
    labels = ["given"] * 3 + ["pasted"] * 3 + ["blended"] * 3
    Path(folder).mkdir(parents=True, exist_ok=True)
    sheet = grid([resize(picture, size=(128, 128)) for picture in [*given, *pasted, *changed]], columns=3, labels=labels)
    sheet.save(Path(folder) / "blended_latent_diffusion.webp", quality=85)


if __name__ == "__main__":
    main(*sys.argv[1:])
