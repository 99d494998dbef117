"""Guidance at some noise levels only.

Kynkäänniemi et al., Applying Guidance in a Limited Interval Improves Sample and Distribution Quality in Diffusion Models,
arXiv:2404.07724: ``uncond + w (cond - uncond)`` with ``w = guidance_scale`` where ``low < sigma <= high``, else 1.

The seam: :func:`classifier_free` takes a guidance scale that depends on sigma; at 1 it leaves out the unconditional pass.
The picture: guidance 12 everywhere mottles and dents; in the paper's interval for SDXL outlines and surfaces are whole.
"""

import sys
from collections.abc import Callable
from pathlib import Path

from unrolled import classifier_free, decode, denoise, encode_text, grid, load, noise, resize

PROMPTS = ["a castle", "a parrot", "a rose", "an astronaut"]


def between(low: float, high: float, guidance_scale: float) -> Callable[[float], float]:
    """``guidance_scale`` at noise levels above ``low`` up to ``high``, elsewhere 1."""
    return lambda sigma: guidance_scale if low < sigma <= high else 1.0


def main(folder: str = "outputs") -> None:
    """Paint both."""
    sd = load("sd-1.5")  # load("sd-1.5", models="hub") for the real model
    cond, uncond = encode_text(sd, PROMPTS), encode_text(sd, "")
    schedule, solver = sd.sampling(steps=25)
    start = noise(sd, schedule, seeds=range(4))
    pictures = []
    for scale in (12.0, between(0.28, 5.42, 12.0)):
        denoiser = classifier_free(sd.denoiser, cond, uncond, scale)
        pictures += decode(sd, denoise(denoiser, start, schedule, solver))
    labels = ["everywhere"] * 4 + ["0.28 to 5.42"] * 4
    Path(folder).mkdir(parents=True, exist_ok=True)
    sheet = grid([resize(picture, size=(128, 128)) for picture in pictures], columns=4, labels=labels)
    sheet.save(Path(folder) / "guidance_interval.webp", quality=85)


if __name__ == "__main__":
    main(*sys.argv[1:])
