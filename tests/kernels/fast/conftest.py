"""Every system's tiny network, copied for the test, and what to call it with."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from unrolled.core.conditioning import Conditioning
from unrolled.core.loading import Model

SYSTEMS = [
    "tiny", "tiny_inpaint", "tiny_sdxl", "tiny_refiner", "tiny_kandinsky", "tiny_kandinsky_inpaint", "tiny_x2", "tiny_x4",
]  # fmt: skip


@pytest.fixture(params=SYSTEMS)
def model(request: pytest.FixtureRequest) -> Model:
    """A tiny model of a system, its networks the test's own."""
    shared: Model = request.getfixturevalue(request.param)
    return replace(shared, unet=copy.deepcopy(shared.unet), vae=copy.deepcopy(shared.vae))


@pytest.fixture
def sd(tiny: Model) -> Model:
    return replace(tiny, unet=copy.deepcopy(tiny.unet), vae=copy.deepcopy(tiny.vae))


def conditioning(model: Model, seed: int, batch: int = 1) -> Conditioning:
    """Random, of all that the model's UNet takes."""
    config, draw = model.unet.config, torch.Generator().manual_seed(seed)

    def some(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=draw)

    given: dict[str, Tensor] = {}
    if config.encoder_hid_dim_type is None:
        given["context"] = some(77, config.cross_attention_dim)
    if config.addition_embed_type == "text_time":
        ids = 5 if model.scored else 6
        pooled = config.projection_class_embeddings_input_dim - ids * config.addition_time_embed_dim
        given |= {"pooled": some(pooled), "time_ids": 64 * some(ids).abs()}
    if config.addition_embed_type == "image":
        given["image_embeds"] = some(config.encoder_hid_dim)
    if config.num_class_embeds:
        given["class_labels"] = torch.full((batch,), 20)
    if config.time_cond_proj_dim:
        given["pooled"] = some(config.time_cond_proj_dim - 128)
    if config.in_channels > 4:
        given["channels"] = some(config.in_channels - 4, 16, 16)
    return Conditioning(**given)


@pytest.fixture
def call() -> Callable[..., Tensor]:
    """One call of a model's denoiser on fixed inputs, 16x16 latents; the conditioning is the same object every time."""
    made: dict[tuple[int, int], Conditioning] = {}

    def denoise(model: Model, *, seed: int = 0, batch: int = 2, denoiser: Any = None, sigma: float = 3.0) -> Tensor:
        x = torch.randn(batch, 4, 16, 16, generator=torch.Generator().manual_seed(seed + 100))
        with torch.no_grad():
            cond = made.setdefault((seed, batch), conditioning(model, seed, batch))
            return (denoiser or model.denoiser)(x, sigma, 400.0, cond).out

    return denoise


@pytest.fixture
def conditioning_of() -> Callable[..., Conditioning]:
    return conditioning


@pytest.fixture
def off() -> Callable[[Tensor, Tensor], float]:
    """How far one tensor is from another, as a part of the largest number."""
    return lambda a, b: float((a - b).abs().max() / b.abs().max())
