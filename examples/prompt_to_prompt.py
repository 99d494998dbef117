"""Prompt-to-prompt: change a word of the prompt and keep the picture's layout.

Hertz et al., Prompt-to-Prompt Image Editing with Cross Attention Control, arXiv:2208.01626, word swap:
at high noise the target's ``softmax(Q* K*^T / sqrt(d)) V*`` is ``softmax(Q K^T / sqrt(d)) V*``, with the source's map.

The seam: :func:`attending` says what an attention layer makes of its queries, keys and values; here the target's row of
the batch gets the source's queries and keys and keeps its values. Around it a denoiser that does so above a noise level.
The picture: the source; the target painted alone; the target with the source's cross- and self-attention maps to sigma 0.5,
and to the end. The miniature has its pictures by heart and hardly heeds the maps before the end, where the tulip narrows to
the rose, the bus to the car, and both fray.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from unrolled import (
    Denoiser,
    Prediction,
    attending,
    classifier_free,
    decode,
    denoise,
    encode_text,
    grid,
    load,
    noise,
    resize,
)
from unrolled.kernels.attending import Attend, Place


def replaced(place: Place, q: Tensor, k: Tensor, v: Tensor, attend: Attend) -> Tensor:
    """The batch's last row looks where the one before it does (of guidance's rows both are conditional)."""
    q, k = (torch.cat([rows[:-1], rows[-2:-1]]) for rows in (q, k))
    return attend(q, k, v)


def prompt_to_prompt(denoiser: Denoiser, unet: Any, cross_until: float, self_until: float) -> Denoiser:
    """The denoiser of a pair, source and target: above these noise levels they share cross- and self-attention maps."""

    def denoise(x: Tensor, sigma: float, timestep: float) -> Prediction:
        with attending(unet, replaced, lambda place: sigma > (cross_until if place.cross else self_until)):
            return denoiser(x, sigma, timestep)

    return denoise


def main(folder: str = "outputs") -> None:
    """Swap a word three times."""
    sd = load("sd-1.5")  # load("sd-1.5", models="hub") for the real model
    schedule, solver = sd.sampling(steps=20)
    start = noise(sd, schedule, seeds=[0, 0])  # the same for both
    pictures, labels = [], []
    for pair in (["a rose", "a tulip"], ["a car", "a bus"], ["a red apple", "a green apple"]):
        plain = classifier_free(sd.denoiser, encode_text(sd, pair), encode_text(sd, ["", ""]), 4.0)
        pictures += decode(sd, denoise(plain, start, schedule, solver))
        for until in (0.5, 0.0):
            edited = prompt_to_prompt(plain, sd.unet, cross_until=until, self_until=until)
            pictures += decode(sd, denoise(edited, start, schedule, solver))[1:]
        labels += [*pair, "to sigma 0.5", "to the end"]
    Path(folder).mkdir(parents=True, exist_ok=True)
    sheet = grid([resize(picture, size=(128, 128)) for picture in pictures], columns=4, labels=labels)
    sheet.save(Path(folder) / "prompt_to_prompt.webp", quality=85)


if __name__ == "__main__":
    main(*sys.argv[1:])
