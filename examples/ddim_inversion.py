"""From a picture to the noise it would have been made of.

Song et al., Denoising Diffusion Implicit Models, arXiv:2010.02502, sect. 4.3: DDIM's step, which is Euler's, upwards,
``x + (high - low) eps(x)``, with the noise estimated at ``low`` and the network told the timestep of ``high``.

The seam: a denoiser is a callable and a schedule plain floats, so that a loop of one's own is three lines.
The picture: four pictures; from their noise and back; from their noise by another prompt, which keeps the cat's ginger and
some of the apple's and the rose's colour; and that prompt from other noise.
"""

import math
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch
from unrolled import (
    Denoiser,
    Euler,
    Latents,
    Schedule,
    classifier_free,
    conditioned,
    decode,
    denoise,
    encode_text,
    grid,
    load,
    noise,
    resize,
)

PROMPTS = ["a cat", "a red apple", "a castle", "a rose"]
OTHERS = ["a dog", "a green apple", "a church", "a tulip"]


def inverted(denoiser: Denoiser, picture: Latents, schedule: Schedule) -> Latents:
    """Latents at the schedule's first level that Euler's method takes to ``picture``, but for the error of its steps."""
    x = picture.clean * math.sqrt(1 + schedule.sigmas[-1] ** 2)
    with torch.no_grad():
        for low, high in pairwise(reversed(schedule.sigmas)):
            x = x + (high - low) * denoiser(x, low, schedule.timestep_at(high)).eps
    return replace(picture, x=x, sigma=schedule.sigmas[0], end=schedule.finished_at)


def main(folder: str = "outputs") -> None:
    """Paint all four."""
    sd = load("sd-1.5")  # load("sd-1.5", models="hub") for the real model
    schedule = sd.schedule(steps=50, solver="ddim")
    cond, other, uncond = encode_text(sd, PROMPTS), encode_text(sd, OTHERS), encode_text(sd, "")
    guided = classifier_free(sd.denoiser, cond, uncond, guidance_scale=3.0)  # paints what the network alone would not
    picture = denoise(guided, noise(sd, schedule, seeds=range(4)), schedule, Euler())
    plain, changed = conditioned(sd.denoiser, cond), conditioned(sd.denoiser, other)
    noisy, fresh = inverted(plain, picture, schedule), noise(sd, schedule, seeds=range(4, 8))
    pictures = decode(sd, picture)
    for denoiser, start in ((plain, noisy), (changed, noisy), (changed, fresh)):
        pictures += decode(sd, denoise(denoiser, start, schedule, Euler()))
    labels = ["picture"] * 4 + ["and back"] * 4 + ["other prompt"] * 4 + ["other noise"] * 4
    Path(folder).mkdir(parents=True, exist_ok=True)
    sheet = grid([resize(picture, size=(128, 128)) for picture in pictures], columns=4, labels=labels)
    sheet.save(Path(folder) / "ddim_inversion.webp", quality=85)


if __name__ == "__main__":
    main(*sys.argv[1:])
