"""Guidance away from what the network paints with its self-attention switched off.

Ahn et al., Self-Rectifying Diffusion Sampling with Perturbed-Attention Guidance, arXiv:2403.17377:
``guided + scale (cond - perturbed)``, where ``perturbed`` is ``cond`` with the identity for self-attention maps.

The seams: the denoiser, wrapped so that it asks the network once more, and :func:`attending` while it does.
The picture: no prompt and no guidance, and the same perturbed: the ghost gets arms, and mist becomes a bridge at night;
the two lumps become other lumps.
"""

import sys
from dataclasses import replace
from pathlib import Path

from torch import Tensor
from unrolled import (
    Conditioning,
    Denoiser,
    Model,
    Prediction,
    attending,
    conditioned,
    decode,
    denoise,
    encode_text,
    grid,
    load,
    noise,
    resize,
)


def perturbed(denoiser: Denoiser, model: Model, cond: Conditioning, scale: float, layers: str = "mid_block") -> Denoiser:
    """``denoiser``, guided or not, with perturbed-attention guidance in the self-attention of ``layers``."""

    def denoise(x: Tensor, sigma: float, timestep: float) -> Prediction:
        here = denoiser(x, sigma, timestep)
        with attending(model.unet, lambda place, q, k, v, attend: v, lambda place: layers in place.name and not place.cross):
            worse = model.denoiser(x, sigma, timestep, cond).out
        better = here.out if here.cond is None else here.cond
        return replace(here, out=here.out + scale * (better - worse))

    return denoise


def main(folder: str = "outputs") -> None:
    """Paint both."""
    sd = load("sd-1.5")  # load("sd-1.5", models="hub") for the real model
    text = encode_text(sd, "")
    schedule, solver = sd.sampling(steps=25)
    start = noise(sd, schedule, seeds=range(4))
    plain = conditioned(sd.denoiser, text)
    pictures = []
    for denoiser in (plain, perturbed(plain, sd, text, scale=3.0)):
        pictures += decode(sd, denoise(denoiser, start, schedule, solver))
    labels = ["plain"] * 4 + ["perturbed"] * 4
    Path(folder).mkdir(parents=True, exist_ok=True)
    sheet = grid([resize(picture, size=(128, 128)) for picture in pictures], columns=4, labels=labels)
    sheet.save(Path(folder) / "perturbed_attention_guidance.webp", quality=85)


if __name__ == "__main__":
    main(*sys.argv[1:])
