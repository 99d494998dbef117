"""Guidance away from the same picture blurred where the network looks.

Hong et al., Improving Sample Quality of Diffusion Models Using Self-Attention Guidance, arXiv:2210.00939, eq. 16 and 25:
``guided + scale (uncond - worse)``, where ``worse`` is ``uncond`` after x0 was blurred in the cells that get more than the
mean of the middle block's self-attention, and taken back to ``sigma`` with the noise predicted.

The seams: the denoiser, wrapped so that it asks the network once more, and :func:`attending`, which watches the first time.
The picture: no prompt and no guidance, and self-attention guidance: the ghost gets clear eyes, the others more contrast.
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812
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
from unrolled.kernels.attending import Attend, Place

WATCHED = "mid_block.attentions.0.transformer_blocks.0.attn1"


def self_attentive(denoiser: Denoiser, model: Model, uncond: Conditioning, scale: float = 0.75) -> Denoiser:
    """``denoiser``, guided or conditioned by ``uncond``, with self-attention guidance."""

    def denoise(x: Tensor, sigma: float, timestep: float) -> Prediction:
        received: list[Tensor] = []

        def watch(place: Place, q: Tensor, k: Tensor, v: Tensor, attend: Attend) -> Tensor:
            maps = torch.einsum("bqhd,bkhd->bhqk", q, k / q.shape[-1] ** 0.5).softmax(dim=-1)
            received.append(maps.mean(dim=1).sum(dim=1))  # of all heads, by all cells: 1 on average
            return attend(q, k, v)

        with attending(model.unet, watch, lambda place: place.name == WATCHED):
            here = denoiser(x, sigma, timestep)
        plain = here if here.uncond is None else replace(here, out=here.uncond)
        looked_at = received[0][: len(x)] > 1  # guidance's one batch begins with the unconditional half
        part = (x[0, 0].numel() / looked_at.shape[1]) ** 0.5
        cells = looked_at.view(-1, 1, round(x.shape[2] / part), round(x.shape[3] / part))
        mask = F.interpolate(cells.to(x), x.shape[2:])
        clean = torch.lerp(plain.x0, blurred(plain.x0), mask)
        worse = model.denoiser(clean + sigma * plain.eps, sigma, timestep, uncond)
        return replace(here, out=here.out + scale * (plain.out - worse.out))

    return denoise


def blurred(x0: Tensor) -> Tensor:
    """By a Gaussian of one cell's standard deviation, nine cells wide."""
    bell = torch.arange(-4, 5).to(x0).square().div(-2).softmax(dim=0)
    return F.conv2d(F.pad(x0, [4] * 4, "reflect"), bell.outer(bell).expand(x0.shape[1], 1, 9, 9), groups=x0.shape[1])


def main(folder: str = "outputs") -> None:
    """Paint both."""
    sd = load("sd-1.5")  # load("sd-1.5", models="hub") for the real model
    text = encode_text(sd, "")
    schedule, solver = sd.sampling(steps=25)
    start = noise(sd, schedule, seeds=range(4))
    plain = conditioned(sd.denoiser, text)
    pictures = []
    for denoiser in (plain, self_attentive(plain, sd, text)):
        pictures += decode(sd, denoise(denoiser, start, schedule, solver))
    labels = ["plain"] * 4 + ["self-attentive"] * 4
    Path(folder).mkdir(parents=True, exist_ok=True)
    sheet = grid([resize(picture, size=(128, 128)) for picture in pictures], columns=4, labels=labels)
    sheet.save(Path(folder) / "self_attention_guidance.webp", quality=85)


if __name__ == "__main__":
    main(*sys.argv[1:])
