"""Complete SDXL checkpoints of a few thousand random parameters, for tests and benchmarks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Final

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from .tiny import TOKENIZER

WIDTHS: Final = (32, 48)
POOLED: Final = 40
IDS_WIDTH: Final = 8

SDXL_SCHEDULER: Final[dict[str, object]] = {
    "_class_name": "EulerDiscreteScheduler",
    "_diffusers_version": "0.19.0.dev0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "interpolation_type": "linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
    "use_karras_sigmas": False,
}


def write_tiny_sdxl(folder: Path, refiner: bool = False) -> Path:
    """A complete base, or its refiner; VAE downscale 8, native size 64 px.

    As with the published pair both have one VAE and one second text encoder, the second tokenizer pads with
    "!", and the refiner has no first ones and takes an aesthetic score in place of the target size.
    """
    torch.manual_seed(0)
    parts = {"text_encoder_2": CLIPTextModelWithProjection(_text(WIDTHS[1], projection_dim=POOLED)), "vae": _vae()}
    if not refiner:
        parts["text_encoder"] = CLIPTextModel(_text(WIDTHS[0]))
    parts["unet"] = _unet(refiner)
    for name, part in parts.items():
        part.save_pretrained(folder / name, safe_serialization=True)
    shutil.copytree(TOKENIZER, folder / "tokenizer_2")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        file = folder / "tokenizer_2" / name
        file.write_text(json.dumps({**json.loads(file.read_text()), "pad_token": "!"}))
    if not refiner:
        shutil.copytree(TOKENIZER, folder / "tokenizer")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SDXL_SCHEDULER))
    (folder / "model_index.json").write_text(json.dumps(_index(refiner)))
    return folder


def _text(width: int, **more: int) -> CLIPTextConfig:
    vocabulary = json.loads((TOKENIZER / "vocab.json").read_text())
    end = vocabulary["<|endoftext|>"]
    return CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=width,
        intermediate_size=37,
        num_hidden_layers=5,
        num_attention_heads=4,
        bos_token_id=vocabulary["<|startoftext|>"],
        eos_token_id=end,
        pad_token_id=end,
        **more,
    )


def _unet(refiner: bool) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        cross_attention_dim=WIDTHS[1] if refiner else sum(WIDTHS),
        attention_head_dim=4,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=IDS_WIDTH,
        projection_class_embeddings_input_dim=POOLED + (5 if refiner else 6) * IDS_WIDTH,
    )


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        sample_size=64,
        scaling_factor=0.13025,
        force_upcast=True,
    )


def _index(refiner: bool) -> dict[str, object]:
    first = {"text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"]}
    return {
        "_class_name": "StableDiffusionXLImg2ImgPipeline" if refiner else "StableDiffusionXLPipeline",
        "_diffusers_version": "0.19.0.dev0",
        "feature_extractor": [None, None],
        "force_zeros_for_empty_prompt": not refiner,
        "image_encoder": [None, None],
        **({"requires_aesthetics_score": True} if refiner else {}),
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        **({name: [None, None] for name in first} if refiner else first),
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
