"""Going back: new noise, and down again, which forgets the errors made above.

Xu et al., Restart Sampling for Improving Generative Processes, arXiv:2306.14878: from ``low`` up to ``high`` by
``x + sqrt(high^2 - low^2) * unit noise`` and down again by the ordinary solver, ``times`` over.

The seam: a run is a value. Parts of a schedule are schedules, and latents say how noisy they are.
The picture: no prompt, 65 evaluations each. Euler's method paints a ghost, two lumps and mist; going back four times ends
at other pictures: one falling apart, a flamingo, a lump and a Christmas tree.
"""

import math
import sys
from dataclasses import replace
from pathlib import Path

from unrolled import (
    Denoiser,
    Euler,
    Latents,
    Schedule,
    Solver,
    conditioned,
    decode,
    denoise,
    encode_text,
    grid,
    load,
    noise,
    resize,
    unit_noise,
)


def restarted(
    denoiser: Denoiser, latents: Latents, schedule: Schedule, solver: Solver, low: float, high: float, times: int
) -> Latents:
    """As :func:`denoise`, but between the schedule's levels at or just below ``low`` and ``high`` it goes ``times`` more."""
    first, last = schedule.index(sigma=high), schedule.index(sigma=low)
    low, high = schedule.sigmas[last], schedule.sigmas[first]
    latents = denoise(denoiser, latents, schedule[:last], solver)
    for time in range(times):
        latents = latents.handed_on(f"restart {time}")  # noise of its own, and nothing remembered
        x = latents.x + math.sqrt(high**2 - low**2) * unit_noise(latents)
        latents = denoise(denoiser, replace(latents, x=x, sigma=high), schedule[first:last], solver)
    return denoise(denoiser, latents, schedule[last:], solver)


def main(folder: str = "outputs") -> None:
    """Paint both."""
    sd = load("sd-1.5")  # load("sd-1.5", models="hub") for the real model
    plain = conditioned(sd.denoiser, encode_text(sd, ""))
    short, long = (sd.schedule(steps, "euler", use_karras_sigmas=True) for steps in (25, 65))
    ordinary = denoise(plain, noise(sd, long, seeds=range(4)), long, Euler())
    again = restarted(plain, noise(sd, short, seeds=range(4)), short, Euler(), low=1.0, high=10.0, times=4)
    pictures = decode(sd, ordinary) + decode(sd, again)
    labels = ["plain"] * 4 + ["restarted"] * 4
    Path(folder).mkdir(parents=True, exist_ok=True)
    sheet = grid([resize(picture, size=(128, 128)) for picture in pictures], columns=4, labels=labels)
    sheet.save(Path(folder) / "restart_sampling.webp", quality=85)


if __name__ == "__main__":
    main(*sys.argv[1:])
