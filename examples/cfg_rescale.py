"""Guidance that keeps the conditional prediction's contrast.

Lin et al., Common Diffusion Noise Schedules and Sample Steps are Flawed, arXiv:2305.08891, eq. 14–16:
``guided * (amount * std(cond) / std(guided) + 1 - amount)``, image by image.

The seam: :func:`edited` passes every prediction through a function, and a guided one knows its two parts.
(``classifier_free(..., rescale=0.7)`` is the same thing, built in.)
The picture: guidance 12, and rescaled: with these small networks hardly another picture, mottled and dented as before.
"""

import sys
from dataclasses import replace
from pathlib import Path

from unrolled import Denoiser, Prediction, classifier_free, decode, denoise, edited, encode_text, grid, load, noise, resize

PROMPTS = ["a castle", "a parrot", "a rose", "an astronaut"]


def rescaled(denoiser: Denoiser, amount: float) -> Denoiser:
    """A guided denoiser with its standard deviation taken ``amount`` (0 to 1) of the way to the conditional one's."""

    def change(prediction: Prediction) -> Prediction:
        if prediction.cond is None:  # no guidance at this level
            return prediction
        std, wanted = (out.std(dim=(1, 2, 3), keepdim=True) for out in (prediction.out, prediction.cond))
        return replace(prediction, out=prediction.out * (amount * wanted / std + 1 - amount))

    return edited(denoiser, change)


def main(folder: str = "outputs") -> None:
    """Paint both."""
    sd = load("sd-1.5")  # load("sd-1.5", models="hub") for the real model
    cond, uncond = encode_text(sd, PROMPTS), encode_text(sd, "")
    schedule, solver = sd.sampling(steps=25)
    start = noise(sd, schedule, seeds=range(4))
    guided = classifier_free(sd.denoiser, cond, uncond, guidance_scale=12.0)
    pictures = []
    for denoiser in (guided, rescaled(guided, 0.7)):
        pictures += decode(sd, denoise(denoiser, start, schedule, solver))
    labels = ["guided"] * 4 + ["rescaled"] * 4
    Path(folder).mkdir(parents=True, exist_ok=True)
    sheet = grid([resize(picture, size=(128, 128)) for picture in pictures], columns=4, labels=labels)
    sheet.save(Path(folder) / "cfg_rescale.webp", quality=85)


if __name__ == "__main__":
    main(*sys.argv[1:])
