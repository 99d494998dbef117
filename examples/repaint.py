"""RePaint: fill a hole by going down the noise, back up a stretch and down again, until hole and rest agree.

Lugmayr et al., RePaint: Inpainting using Denoising Diffusion Probabilistic Models, arXiv:2201.09865, algorithm 1:
``x_{t-1} = m known_{t-1} + (1 - m) unknown_{t-1}`` (eq. 8), and back up with ``x_t ~ N(sqrt(1 - beta) x_{t-1}, beta)``.

The seam: a run is a function of latents and a schedule, so that a stretch ``schedule[a:b]`` is run as often as one likes;
in ``x = x0 + sigma * noise`` the way back up adds noise and nothing else.
The picture: a parrot without its middle, filled by a model that is told nothing, with every step taken once above and every
stretch but the first run six times below: there, and only there, it sees what the rest is of.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from PIL import Image, ImageDraw
from torch import Tensor
from unrolled import (
    DDPM,
    Denoiser,
    Latents,
    Noise,
    Schedule,
    Step,
    classifier_free,
    conditioned,
    decode,
    denoise,
    encode_image,
    encode_text,
    grid,
    keep_known,
    known,
    latent_mask,
    load,
    noise,
    resize,
)


def repaint(
    denoiser: Denoiser, start: Latents, schedule: Schedule, clean: Latents, mask: Tensor, jump: int = 5, times: int = 6
) -> Latents:
    """``clean`` with its masked part painted anew; every stretch of ``jump`` steps but the first is run ``times`` times."""
    latents = start
    for first in range(0, len(schedule), jump):
        stretch = schedule[first : first + jump]
        for time in range(times if first else 1):
            fresh = Noise(start.seeds, f"time {time}")
            if time:
                up = math.sqrt(stretch.sigmas[0] ** 2 - latents.sigma**2)
                x = latents.x + up * fresh(latents.x.shape, "up", stretch.first).to(latents.x)
                latents = replace(latents, x=x, sigma=stretch.sigmas[0])
            latents = denoise(denoiser, latents, stretch, DDPM(), [kept(clean, mask, schedule, fresh)], fresh)
    return latents


def kept(clean: Latents, mask: Tensor, schedule: Schedule, fresh: Noise) -> Callable[[Step], None]:
    """A hook that puts the known part back after each step, under noise of that step's own."""

    def hook(step: Step) -> None:
        unit = fresh(step.x.shape, "known", step.index).to(step.x)
        keep_known(mask, known(clean, unit, schedule))(step)

    return hook


def main(folder: str = "outputs") -> None:
    """Fill one hole three times each way."""
    sd = load("sd-1.5")  # load("sd-1.5", models="hub") for the real model
    cond, uncond = encode_text(sd, "a parrot"), encode_text(sd, "")
    schedule, solver = sd.sampling(steps=25)
    picture = decode(sd, denoise(classifier_free(sd.denoiser, cond, uncond, 4.0), noise(sd, schedule), schedule, solver))[0]
    hole = Image.new("L", picture.size)
    ImageDraw.Draw(hole).rectangle((0, 16, 63, 47), fill="white")

    seeds, schedule = range(3), sd.schedule(25, "ddpm")
    clean, mask, start = (
        encode_image(sd, picture, seeds=seeds),
        latent_mask(hole, sd.space),
        noise(sd, schedule, seeds=seeds),
    )
    denoiser = conditioned(sd.denoiser, uncond)  # nobody says what to fill it with
    given = Image.composite(Image.new("RGB", picture.size, "grey"), picture, hole)
    pictures = []
    for times in (1, 6):
        pictures += [given, *decode(sd, repaint(denoiser, start, schedule, clean, mask, times=times))]
    labels = ["given", *["each step once"] * 3, "given", *["each stretch 6 times"] * 3]
    Path(folder).mkdir(parents=True, exist_ok=True)
    sheet = grid([resize(picture, size=(128, 128)) for picture in pictures], columns=4, labels=labels)
    sheet.save(Path(folder) / "repaint.webp", quality=85)


if __name__ == "__main__":
    main(*sys.argv[1:])
