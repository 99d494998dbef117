"""What examples are compared with: diffusers' pipelines on tiny weights, and attention maps made in full."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.models.attention_processor import Attention
from torch import Tensor
from unrolled import Conditioning, Denoiser, DiffusersNoise, Model, denoise, encode_text, noise

EditMaps = Callable[[bool, Tensor, int], Tensor]
"""``(cross, maps, heads) -> maps``, each (batch * heads, queries, keys)."""


@contextmanager
def _through_maps(unet: Any, edit: EditMaps) -> Iterator[None]:
    def attend(layer: Attention, x: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any) -> Tensor:
        context = x if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (layer.head_to_batch_dim(part) for part in (layer.to_q(x), layer.to_k(context), layer.to_v(context)))
        maps = edit(encoder_hidden_states is not None, layer.get_attention_scores(q, k), layer.heads)
        out: Tensor = layer.to_out[0](layer.batch_to_head_dim(maps @ v))
        return out

    before = unet.attn_processors
    unet.set_attn_processor(attend)
    try:
        yield
    finally:
        unet.set_attn_processor(before)


@pytest.fixture(scope="session")
def through_maps() -> Callable[[Any, EditMaps], AbstractContextManager[None]]:
    """Within it, a UNet's layers make their maps in full and apply what ``edit`` makes of them."""
    return _through_maps


PROMPT, STEPS = "a castle", 6


@pytest.fixture
def theirs(tiny: Model, tiny_folder: Path) -> Callable[..., Tensor]:
    """The latents that a pipeline of diffusers ends at: the tiny checkpoint, noise of seed 0, by default DDIM."""

    def run(pipeline: Any, scheduler: Any = None, made_with: dict[str, Any] | None = None, **options: Any) -> Tensor:
        made_with = {"use_safetensors": True, "requires_safety_checker": False, **(made_with or {})}
        pipe = pipeline.from_pretrained(tiny_folder, **made_with)
        pipe.scheduler = scheduler or DDIMScheduler.from_config(tiny.scheduler)
        pipe.set_progress_bar_config(disable=True)
        options["generator"] = torch.Generator().manual_seed(0)
        latents: Tensor = pipe(PROMPT, num_inference_steps=STEPS, output_type="latent", **options).images
        return latents

    return run


@pytest.fixture
def ours(tiny: Model) -> Callable[..., Tensor]:
    """The same of a denoiser in our loop."""

    def run(denoiser: Denoiser, solver: str = "ddim", height: int = 64, width: int = 64) -> Tensor:
        schedule, stepper = tiny.sampling(STEPS, solver)
        start = noise(tiny, schedule, height, width, source=DiffusersNoise.seeded(0))
        return denoise(denoiser, start, schedule, stepper).clean

    return run


@pytest.fixture
def texts(tiny: Model) -> tuple[Conditioning, Conditioning]:
    """The prompt and none."""
    return encode_text(tiny, PROMPT), encode_text(tiny, "")
