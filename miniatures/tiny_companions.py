"""ControlNets and IP-Adapters of a few thousand random parameters for the tiny checkpoints, for tests and benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

EMBEDDING, STATES, TOKENS = 24, 32, 4
"""Widths of the image encoder's embedding and of its states, and tokens made of a picture."""


def write_tiny_controlnet(folder: Path, model: Path, seed: int = 0) -> Path:
    """A ControlNet for the UNet of a tiny checkpoint; unlike a fresh one it says something of its picture."""
    torch.manual_seed(seed)
    network: Any = ControlNetModel.from_unet(UNet2DConditionModel.from_pretrained(model / "unet"))
    for layer in (*network.controlnet_down_blocks, network.controlnet_mid_block):
        nn.init.normal_(layer.weight, std=0.1)
    for layer in network.controlnet_cond_embedding.modules():
        if isinstance(layer, nn.Conv2d):  # so that the picture does not fade on its way through them
            nn.init.kaiming_normal_(layer.weight)
    network.save_pretrained(folder)
    return folder


def write_tiny_image_adapter(folder: Path, model: Path, plus: bool = False) -> Path:
    """An IP-Adapter for the UNet of a tiny checkpoint as one file, and its image encoder beside it.

    Args:
        plus: the layout whose resampler looks at patches, not at one embedding.

    Returns:
        The file.
    """
    torch.manual_seed(0)
    unet: Any = UNet2DConditionModel.from_pretrained(model / "unet")
    context = unet.config.cross_attention_dim
    weights = {f"image_proj.{key}": value for key, value in (_resampler if plus else _projection)(context).items()}
    crossed = [name.removesuffix(".processor") for name in unet.attn_processors if "attn2" in name]
    for i, name in enumerate(crossed):  # attention to itself has the even numbers
        width = unet.get_submodule(name).to_q.out_features
        for kind in ("k", "v"):
            weights[f"ip_adapter.{2 * i + 1}.to_{kind}_ip.weight"] = torch.randn(width, context) / context**0.5
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"ip-adapter{'-plus' * plus}.safetensors"
    save_file({key: value.contiguous() for key, value in weights.items()}, file)
    shape: dict[str, Any] = {"hidden_size": STATES, "intermediate_size": 37, "num_hidden_layers": 3}
    encoder = CLIPVisionConfig(**shape, num_attention_heads=4, image_size=32, patch_size=8, projection_dim=EMBEDDING)
    CLIPVisionModelWithProjection(encoder).save_pretrained(folder / "image_encoder", safe_serialization=True)
    return file


def _projection(context: int) -> dict[str, Tensor]:
    layers = nn.ModuleDict({"proj": nn.Linear(EMBEDDING, TOKENS * context), "norm": nn.LayerNorm(context)})
    return dict(layers.state_dict())


def _resampler(context: int, depth: int = 4, width: int = 64) -> dict[str, Tensor]:
    """As the first authors name its weights; diffusers takes heads of 64 and a depth of 4 for granted."""
    held: dict[str, Tensor] = {"latents": torch.randn(1, TOKENS, width) / width**0.5}
    layers: dict[str, nn.Module] = {
        "proj_in": nn.Linear(STATES, width), "proj_out": nn.Linear(width, context), "norm_out": nn.LayerNorm(context),
    }  # fmt: skip
    for i in range(depth):
        attention: dict[str, nn.Module] = {"norm1": nn.LayerNorm(width), "norm2": nn.LayerNorm(width)}
        attention |= {"to_q": nn.Linear(width, 64, bias=False), "to_kv": nn.Linear(width, 128, bias=False)}
        attention["to_out"] = nn.Linear(64, width, bias=False)
        layers |= {f"layers.{i}.0.{name}": layer for name, layer in attention.items()}
        feed: dict[str, nn.Module] = {"0": nn.LayerNorm(width), "1": nn.Linear(width, 4 * width, bias=False)}
        feed["3"] = nn.Linear(4 * width, width, bias=False)
        layers |= {f"layers.{i}.1.{name}": layer for name, layer in feed.items()}
    for name, layer in layers.items():
        held |= {f"{name}.{key}": value for key, value in layer.state_dict().items()}
    return held
