"""Guidance by the gradient of any loss of the clean picture.

Bansal et al., Universal Guidance for Diffusion Models, arXiv:2302.07121, its forward guidance with ``s(t) = scale *
sqrt(1 - alpha_bar)``: here ``eps + scale * sigma * gradient``, the loss's by ``x``, through decoder and network.

The seam: the denoiser, wrapped, with gradients switched on (the loop switches them off).
The picture: no prompt, and the same noise led to blue in the middle: blue it is, and more shapeless still.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from unrolled import Denoiser, Prediction, conditioned, decode, denoise, encode_text, grid, load, noise, resize


def universal(denoiser: Denoiser, loss: Callable[[Tensor], Tensor], scale: float) -> Denoiser:
    """``denoiser`` led to where ``loss`` of x0, one number per image, is small."""

    def denoise(x: Tensor, sigma: float, timestep: float) -> Prediction:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            x0 = denoiser(leaf, sigma, timestep).x0
            (gradient,) = torch.autograd.grad(loss(x0).sum(), leaf)
        return Prediction.from_x0(x0.detach() - scale * sigma**2 * gradient, x, sigma)

    return denoise


def main(folder: str = "outputs") -> None:
    """Paint both."""
    sd = load("sd-1.5")  # load("sd-1.5", models="hub") for the real model
    plain = conditioned(sd.denoiser, encode_text(sd, ""))
    schedule, solver = sd.sampling(steps=25)
    start, edge = noise(sd, schedule, seeds=range(4)), sd.native_size // 4

    def not_blue(x0: Tensor) -> Tensor:
        pixels: Tensor = sd.vae.decode((x0 / sd.space.scaling).to(sd.dtype)).sample
        middle = pixels[:, :, edge:-edge, edge:-edge].mean(dim=(2, 3))
        return (middle - torch.tensor([-1.0, -0.5, 1.0]).to(middle)).square().sum(dim=1)

    pictures = []
    for denoiser in (plain, universal(plain, not_blue, scale=10.0)):
        pictures += decode(sd, denoise(denoiser, start, schedule, solver))
    labels = ["plain"] * 4 + ["blue"] * 4
    Path(folder).mkdir(parents=True, exist_ok=True)
    sheet = grid([resize(picture, size=(128, 128)) for picture in pictures], columns=4, labels=labels)
    sheet.save(Path(folder) / "universal_guidance.webp", quality=85)


if __name__ == "__main__":
    main(*sys.argv[1:])
