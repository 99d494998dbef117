"""FreeU: a UNet's own features and those its skip connections bring, weighed anew.

Si et al., FreeU: Free Lunch in Diffusion U-Net, arXiv:2309.11497, as diffusers has it (``b`` is constant):
half of the backbone's channels times ``b``, the lowest frequencies of the skip's times ``s``, where the two are joined.

The seam: torch's own hooks on the UNet's modules; the denoiser is made of them, and the loop never knows.
The picture: plain above, FreeU below. The miniature, for which nobody tuned ``b`` and ``s``, gives stronger colours, softer
edges and a grey haze.
"""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fft import fftn, fftshift, ifftn, ifftshift
from unrolled import classifier_free, decode, denoise, encode_text, grid, load, noise, resize


@contextmanager
def freeu(unet: Any, b: tuple[float, float] = (1.2, 1.4), s: tuple[float, float] = (0.9, 0.2)) -> Iterator[None]:
    """Within it, the UNet's first two up blocks weigh what they join by ``b`` and ``s``."""
    width = unet.mid_block.resnets[-1].out_channels
    with ExitStack() as hooks:
        for block, backbone, skip in zip(unet.up_blocks, b, s, strict=False):
            for resnet in block.resnets:  # each takes what the one before it gave, and the skip's behind that
                hooks.enter_context(resnet.register_forward_pre_hook(weighing(width, backbone, skip)))
                width = resnet.out_channels
        yield


def weighing(width: int, b: float, s: float) -> Any:
    """A hook that weighs the first half of the first ``width`` channels and the low frequencies of the others."""

    def hook(resnet: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        half, rest, skip = inputs[0].tensor_split([width // 2, width], dim=1)
        spectrum = fftshift(fftn(skip.float(), dim=(-2, -1)), dim=(-2, -1))
        row, column = (side // 2 for side in skip.shape[-2:])
        spectrum[..., row - 1 : row + 1, column - 1 : column + 1] *= s
        skip = ifftn(ifftshift(spectrum, dim=(-2, -1)), dim=(-2, -1)).real.to(skip)
        return torch.cat([half * b, rest, skip], dim=1), *inputs[1:]

    return hook


def main(folder: str = "outputs") -> None:
    """Paint both."""
    sd = load("sd-1.5")  # load("sd-1.5", models="hub") for the real model
    prompts = ["a castle", "a parrot", "a rose", "an astronaut"]
    denoiser = classifier_free(sd.denoiser, encode_text(sd, prompts), encode_text(sd, ""), 4.0)
    schedule, solver = sd.sampling(steps=20)
    start = noise(sd, schedule, seeds=range(4))
    pictures = decode(sd, denoise(denoiser, start, schedule, solver))
    with freeu(sd.unet):
        pictures += decode(sd, denoise(denoiser, start, schedule, solver))
    labels = ["plain"] * 4 + ["FreeU"] * 4
    Path(folder).mkdir(parents=True, exist_ok=True)
    sheet = grid([resize(picture, size=(128, 128)) for picture in pictures], columns=4, labels=labels)
    sheet.save(Path(folder) / "freeu.webp", quality=85)


if __name__ == "__main__":
    main(*sys.argv[1:])
