"""The published structures at full size with random weights, and what to call them with: for the benchmarks beside this."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from unrolled.core.conditioning import Conditioning
from unrolled.core.denoiser import ConditionalDenoiser, UNetDenoiser, UpscalerDenoiser
from unrolled.core.prediction import Kind

FULL_SIZE = Path(__file__).parent.parent / "tests" / "full_size.json"


@dataclass(frozen=True)
class Structure:
    """One UNet.

    Args:
        component: its name in tests/full_size.json.
        latents: side of the latents that it was made for.
        tflop: 2 x multiply-adds of one call for one image, in 1e12: torch's FLOP counter on the meta device, at ``latents``.
        gigabytes: its weights in bfloat16.
        pixels: of a latent cell's side.
        kind: what its outputs are.
    """

    component: str
    latents: int
    tflop: float
    gigabytes: float
    pixels: int = 8
    kind: Kind = "epsilon"


STRUCTURES = {
    "sd-1.5": Structure("sd-1.5 unet", 64, 0.803, 1.72),
    "sdxl-base": Structure("sdxl unet", 128, 6.761, 5.13),
    "sdxl-refiner": Structure("sdxl-refiner unet", 128, 7.286, 4.52),
    "kandinsky-2.2": Structure("kandinsky-2.2 unet", 96, 1.993, 2.51),
    "x2": Structure("x2 unet", 128, 1.281, 0.75, kind="v"),
    "x4": Structure("x4 unet", 128, 1.131, 0.95, pixels=4, kind="v"),
}
VAES = {"sd-1.5": "sd-1.5 vae", "sdxl-base": "sdxl vae", "kandinsky-2.2": "kandinsky-2.2 movq", "x4": "x4 vae"}

TINY: dict[str, dict[str, Any]] = {
    "block_out_channels": {"sd-1.5": [32, 32, 64, 64], "sdxl-base": [32, 32, 64], "sdxl-refiner": [32, 32, 64, 64]},
    "attention_head_dim": {"sdxl-base": [2, 2, 4], "sdxl-refiner": [2, 2, 4, 4], "sd-1.5": 2},
}
"""What a structure has less of for ``--check``: widths of a few dozen, all else as published."""


def network(component: str, device: torch.device | str, dtype: torch.dtype, tiny: str | None = None) -> Any:
    """A component with random weights: matrices small, norms one, biases zero, so that numbers stay finite at any depth.

    Args:
        tiny: the structure's name in ``STRUCTURES``, to have it a hundred times smaller.
    """
    import diffusers

    entry = json.loads(FULL_SIZE.read_text(encoding="utf-8"))["components"][component]
    config = entry["config"] | ({} if tiny is None else _smaller(entry["config"], tiny))
    with torch.device("meta"):
        made: Any = getattr(diffusers, entry["class"]).from_config(config)
    made = nn.Module.to(made, dtype).to_empty(device=device).eval().requires_grad_(False)
    draw = torch.Generator(device).manual_seed(0)
    for name, parameter in made.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, min(0.02, parameter[0].numel() ** -0.5), generator=draw)
        else:
            parameter.fill_(float("norm" in name and name.endswith("weight")))
    for module in made.modules():  # filters that are computed, not loaded
        if hasattr(module, "kernel") and isinstance(module.kernel, Tensor):
            row = torch.tensor([[1 / 8, 3 / 8, 3 / 8, 1 / 8]]) * (2 if type(module).__name__ == "KUpsample2D" else 1)
            module.kernel.copy_(row.T @ row)
        if type(module).__name__ == "GaussianFourierProjection":
            module.weight.normal_(generator=draw)
    return made


def _smaller(config: dict[str, Any], name: str) -> dict[str, Any]:
    widths = {2**i: 32 * min(2**i, 2) for i in range(8)}
    least = config["block_out_channels"][0]
    out: dict[str, Any] = {
        "block_out_channels": [widths[1 << int(math.log2(max(1, w // least)))] for w in config["block_out_channels"]]
    }
    out |= {key: found[name] for key, found in TINY.items() if name in found}
    if name in ("kandinsky-2.2", "x2"):
        out["attention_head_dim"] = 16
    if name == "x4":
        out["attention_head_dim"] = 2
    return out


class Compiled:
    """A compiled network with the attributes of the one it was made of."""

    def __init__(self, compiled: Any, unet: Any) -> None:
        self.compiled, self.unet = compiled, unet

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the compiled one is called."""
        return self.compiled(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.unet, name)


def denoiser(name: str, unet: Any) -> ConditionalDenoiser:
    """The structure's UNet as a conditional denoiser."""
    return UpscalerDenoiser(unet) if name == "x2" else UNetDenoiser(unet, STRUCTURES[name].kind)


def conditioning(name: str, unet: Any, side: int, seed: int, dtype: torch.dtype) -> Conditioning:
    """Random, of all that the structure takes, for one image of latents of that side."""
    config, device = unet.config, unet.conv_in.weight.device
    draw = torch.Generator(device).manual_seed(seed)

    def some(*shape: int) -> Tensor:
        return torch.randn(1, *shape, generator=draw, device=device, dtype=dtype)

    given: dict[str, Tensor] = {}
    if config.encoder_hid_dim_type is None:
        given["context"] = some(77, config.cross_attention_dim)
    if config.addition_embed_type == "text_time":
        ids = 5 if name == "sdxl-refiner" else 6
        pooled = config.projection_class_embeddings_input_dim - ids * config.addition_time_embed_dim
        given |= {"pooled": some(pooled), "time_ids": 1024 * some(ids).abs()}
    if config.addition_embed_type == "image":
        given["image_embeds"] = some(config.encoder_hid_dim)
    if config.num_class_embeds:
        given["class_labels"] = torch.full((1,), 20, device=device)
    if config.time_cond_proj_dim:
        given["pooled"] = some(config.time_cond_proj_dim - 128)
    if config.in_channels > 4:
        given["channels"] = some(config.in_channels - 4, side, side)
    return Conditioning(**given)
