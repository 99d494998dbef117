"""Complete checkpoints of the published structures with random weights, for benchmarks: gigabytes each."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch

from .tiny import TOKENIZER

CROSS, PLAIN, CROSS_UP, PLAIN_UP = "CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"
_SDXL: Final = {
    "sample_size": 128,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
}
UNETS: Final[dict[str, dict[str, Any]]] = {
    "sd-1.5": {
        "sample_size": 64,
        "down_block_types": [CROSS, CROSS, CROSS, PLAIN],
        "up_block_types": [PLAIN_UP, CROSS_UP, CROSS_UP, CROSS_UP],
        "block_out_channels": [320, 640, 1280, 1280],
        "attention_head_dim": 8,
        "cross_attention_dim": 768,
    },
    "sdxl-base": {
        **_SDXL,
        "down_block_types": [PLAIN, CROSS, CROSS],
        "up_block_types": [CROSS_UP, CROSS_UP, PLAIN_UP],
        "block_out_channels": [320, 640, 1280],
        "attention_head_dim": [5, 10, 20],
        "cross_attention_dim": 2048,
        "transformer_layers_per_block": [1, 2, 10],
        "projection_class_embeddings_input_dim": 2816,
    },
    "sdxl-refiner": {
        **_SDXL,
        "down_block_types": [PLAIN, CROSS, CROSS, PLAIN],
        "up_block_types": [PLAIN_UP, CROSS_UP, CROSS_UP, PLAIN_UP],
        "block_out_channels": [384, 768, 1536, 1536],
        "attention_head_dim": [6, 12, 24, 24],
        "cross_attention_dim": 1280,
        "transformer_layers_per_block": 4,
        "projection_class_embeddings_input_dim": 2560,
    },
}
VAE: Final = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "sample_size": 512,
}
TEXT: Final = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
TEXT_2: Final = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
SCHEDULER: Final = {
    "_class_name": "EulerDiscreteScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "timestep_spacing": "leading",
}


def write_full_size(folder: Path, structure: str, seed: int, dtype: torch.dtype, shared: Path | None = None) -> Path:
    """A complete checkpoint of "sd-1.5", "sdxl-base" or "sdxl-refiner".

    Args:
        shared: another such checkpoint, whose text encoders and VAE it has (hard links, so no room on disk).
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(seed)
    end = json.loads((TOKENIZER / "vocab.json").read_text())["<|endoftext|>"]
    ids = {"bos_token_id": end - 1, "eos_token_id": end, "pad_token_id": end}
    refiner, xl = structure == "sdxl-refiner", structure != "sd-1.5"
    scaling = 0.13025 if xl else 0.18215
    makers: dict[str, Callable[[], torch.nn.Module]] = {
        "unet": lambda: UNet2DConditionModel(**UNETS[structure]),
        "vae": lambda: AutoencoderKL(**VAE, scaling_factor=scaling),
    }
    if not refiner:
        makers["text_encoder"] = lambda: CLIPTextModel(CLIPTextConfig(**TEXT, **ids))
    if xl:
        makers["text_encoder_2"] = lambda: CLIPTextModelWithProjection(CLIPTextConfig(**TEXT_2, **ids))
    index: dict[str, Any] = {"_class_name": "StableDiffusionXLPipeline" if xl else "StableDiffusionPipeline"}
    index |= {"_diffusers_version": "0.38.0", "scheduler": ["diffusers", SCHEDULER["_class_name"]]}
    index |= {"requires_aesthetics_score": refiner, "force_zeros_for_empty_prompt": not refiner} if xl else {}
    index |= {
        name: [None, None]
        for name in ("feature_extractor", "image_encoder", "safety_checker")
        if not (xl and name == "safety_checker")
    }
    index |= {"text_encoder": [None, None], "tokenizer": [None, None]} if refiner else {}
    for name, make in makers.items():
        if name != "unet" and shared is not None:
            shutil.copytree(shared / name, folder / name, copy_function=os.link)
        else:
            network = _random(make, dtype)
            network.save_pretrained(folder / name, safe_serialization=True, max_shard_size="20GB")
        transformers = name.startswith("text")
        kind = json.loads((folder / name / "config.json").read_text())
        index[name] = ["transformers", kind["architectures"][0]] if transformers else ["diffusers", kind["_class_name"]]
        if transformers:
            tokenizer = name.replace("text_encoder", "tokenizer")
            shutil.copytree(TOKENIZER, folder / tokenizer)
            index[tokenizer] = ["transformers", "CLIPTokenizer"]
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def _random(make: Callable[[], torch.nn.Module], dtype: torch.dtype) -> Any:
    """Matrices small, norms one, biases zero: finite through any depth."""
    with torch.device("meta"):
        network = make()
    network = torch.nn.Module.to(network, dtype).to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.02)
            else:
                parameter.fill_(float("norm" in name and name.endswith("weight")))
        for _, buffer in network.named_buffers():  # the encoders' position_ids
            buffer.copy_(torch.arange(buffer.numel()).view_as(buffer))
    return network
