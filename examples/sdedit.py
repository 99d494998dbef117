"""SDEdit: a few strokes become a picture, if noise hides what is wrong with them and little else.

Meng et al., SDEdit: Guided Image Synthesis and Editing with Stochastic Differential Equations,
arXiv:2108.01073, algorithm 1: ``x(t0) = x_guide + sigma(t0) z``, then the reverse process from t0 to 0 as if from nothing.

The seam: latents know their noise level, and the loop takes a schedule from any level on (``schedule.starting_at``).
The picture: strokes, and the apple made of them: with little noise it is theirs and blotchy, with much the model's own.
"""

import sys
from pathlib import Path

from PIL import Image, ImageDraw
from unrolled import (
    Denoiser,
    EulerAncestral,
    Latents,
    Schedule,
    add_noise,
    classifier_free,
    decode,
    denoise,
    encode_image,
    encode_text,
    grid,
    load,
    resize,
)


def sdedit(denoiser: Denoiser, guide: Latents, schedule: Schedule, sigma: float) -> Latents:
    """The guide, hidden by noise up to ``sigma`` and denoised from there, with noise of each step's own (an SDE's)."""
    rest = schedule.starting_at(sigma)
    return denoise(denoiser, add_noise(guide, rest), rest, EulerAncestral())


def strokes() -> Image.Image:
    """A red ball with a brown stalk, as one paints it with a mouse."""
    picture = Image.new("RGB", (64, 64), "white")
    draw = ImageDraw.Draw(picture)
    draw.ellipse((14, 20, 54, 60), fill=(200, 40, 40))
    draw.line((34, 20, 40, 6), fill=(90, 60, 30), width=3)
    return picture


def main(folder: str = "outputs") -> None:
    """Paint from four noise levels."""
    sd = load("sd-1.5")  # load("sd-1.5", models="hub") for the real model
    schedule = sd.schedule(40)
    guide = strokes()
    pictures, labels = [guide], ["strokes"]
    denoiser = classifier_free(sd.denoiser, encode_text(sd, "a red apple"), encode_text(sd, ""), 4.0)
    for sigma in (0.2, 0.4, 0.8, 3.2):
        pictures += decode(sd, sdedit(denoiser, encode_image(sd, guide), schedule, sigma))
        labels.append(f"from sigma {sigma:g}")
    Path(folder).mkdir(parents=True, exist_ok=True)
    sheet = grid([resize(picture, size=(128, 128)) for picture in pictures], columns=5, labels=labels)
    sheet.save(Path(folder) / "sdedit.webp", quality=85)


if __name__ == "__main__":
    main(*sys.argv[1:])
