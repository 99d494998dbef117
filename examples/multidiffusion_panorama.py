"""MultiDiffusion: a picture wider than the model can paint, from overlapping windows that agree at every step.

Bar-Tal et al., MultiDiffusion: Fusing Diffusion Paths for Controlled Image Generation, arXiv:2302.08113, eq. 5:
the next x is at every place the mean of what the windows that cover it make of theirs.

The seam: a denoiser is a callable ``(x, sigma, timestep) -> Prediction``, and so is one that asks another window by window;
steps are linear in the clean estimate, so that the mean of the estimates gives the mean of the steps.
The picture: a mountain and a pine tree four times as wide as the model was trained on, above in one piece, which it
stretches, below in windows, of which each wants one. (It knows things on white alone, hence the pale seams.)
"""

import sys
from pathlib import Path

import torch
from torch import Tensor
from unrolled import Denoiser, Prediction, classifier_free, decode, denoise, encode_text, grid, load, noise


def panorama(denoiser: Denoiser, window: int, stride: int) -> Denoiser:
    """The mean of clean estimates in windows ``window`` latents wide, one every ``stride`` and one at the end."""

    def denoise(x: Tensor, sigma: float, timestep: float) -> Prediction:
        end = x.shape[-1] - window
        lefts = sorted({*range(0, end, stride), end})
        views = torch.cat([x[..., left : left + window] for left in lefts])
        total, count = torch.zeros_like(x), torch.zeros_like(x)
        for left, x0 in zip(lefts, denoiser(views, sigma, timestep).x0.chunk(len(lefts)), strict=True):
            total[..., left : left + window] += x0
            count[..., left : left + window] += 1
        return Prediction.from_x0(total / count, x, sigma)

    return denoise


def main(folder: str = "outputs") -> None:
    """Paint both, twice."""
    sd = load("sd-1.5")  # load("sd-1.5", models="hub") for the real model
    schedule, solver = sd.sampling(steps=20)
    start = noise(sd, schedule, height=64, width=256, seeds=[1])
    columns = []
    for prompt in ("a mountain", "a pine tree"):
        plain = classifier_free(sd.denoiser, encode_text(sd, prompt), encode_text(sd, ""), 4.0)
        runs = [denoise(denoiser, start, schedule, solver) for denoiser in (plain, panorama(plain, window=16, stride=8))]
        columns.append([decode(sd, run)[0] for run in runs])
    pictures = [picture for row in zip(*columns, strict=True) for picture in row]
    labels = ["in one piece"] * 2 + ["in windows"] * 2
    Path(folder).mkdir(parents=True, exist_ok=True)
    sheet = grid(pictures, columns=2, labels=labels)
    sheet.save(Path(folder) / "multidiffusion_panorama.webp", quality=85)


if __name__ == "__main__":
    main(*sys.argv[1:])
