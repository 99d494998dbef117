"""DeepCache: the deep part of the UNet changes slowly from step to step, so run it at some steps only.

Ma et al., DeepCache: Accelerating Diffusion Models for Free, arXiv:2312.00858:
every N-th step runs the whole UNet; the steps between take what its deep blocks gave then, and run the shallow ones anew.

The seam: a denoiser that turns a part of its UNet off while it is asked, by sigma; torch's hooks do the remembering.
The picture: what the whole UNet paints, and with it whole at every second, third and fifth step; how far the latents end
from the first, as a part of their norm. A shallow evaluation of the miniature takes 39 % of a whole one's floating-point
operations, as torch counts them; what time that saves was not measured.
"""

import sys
from collections.abc import Collection
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

from torch import Tensor
from unrolled import Denoiser, Prediction, classifier_free, decode, denoise, encode_text, grid, load, noise, resize


def deepcache(denoiser: Denoiser, unet: Any, whole: Collection[float]) -> Denoiser:
    """The denoiser with all but the outermost blocks of its UNet run at the levels ``whole`` only, else as last time."""
    deep = [*unet.down_blocks[1:], unet.mid_block, *unet.up_blocks[:-1]]
    kept: dict[Any, Any] = {}

    def denoise(x: Tensor, sigma: float, timestep: float) -> Prediction:
        with ExitStack() as meanwhile:
            for block in deep:
                if sigma in whole:
                    hook = block.register_forward_hook(lambda block, _, out: kept.update({block: out}))
                    meanwhile.enter_context(hook)
                else:
                    meanwhile.enter_context(patch.object(block, "forward", lambda *_, out=kept[block], **__: out))
            return denoiser(x, sigma, timestep)

    return denoise


def main(folder: str = "outputs") -> None:
    """Paint with the whole UNet at every step, every second, third and fifth."""
    sd = load("sd-1.5")  # load("sd-1.5", models="hub") for the real model
    prompts = ["a castle", "a parrot", "a rose", "an astronaut"]
    denoiser = classifier_free(sd.denoiser, encode_text(sd, prompts), encode_text(sd, ""), 4.0)
    schedule, solver = sd.sampling(steps=30)
    start = noise(sd, schedule, seeds=range(4))
    plain = denoise(denoiser, start, schedule, solver)
    pictures, labels = decode(sd, plain), ["plain"] * 4
    for every in (2, 3, 5):
        whole = schedule.sigmas[:-1:every]
        run = denoise(deepcache(denoiser, sd.unet, whole), start, schedule, solver)
        away = (run.x - plain.x).flatten(1).norm(dim=1) / plain.x.flatten(1).norm(dim=1)
        pictures += decode(sd, run)
        labels += [f"whole at {len(whole)} of {len(schedule)}: {part:.1%} away" for part in away.tolist()]
    Path(folder).mkdir(parents=True, exist_ok=True)
    sheet = grid([resize(picture, size=(128, 128)) for picture in pictures], columns=4, labels=labels)
    sheet.save(Path(folder) / "deepcache.webp", quality=85)


if __name__ == "__main__":
    main(*sys.argv[1:])
