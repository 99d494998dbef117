"""Complete upscaler checkpoints of a few thousand random parameters, for tests and benchmarks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from .tiny import TOKENIZER
from .upscaler_networks import X2_SCHEDULER, X4_LOW_RES_SCHEDULER, X4_SCHEDULER

_HIDDEN = 32
_NO_CHECKER: dict[str, object] = {"feature_extractor": [None, None], "safety_checker": [None, None]}


def write_tiny_x2(folder: Path) -> Path:
    """The latent upscaler: the published UNet's blocks and levels, VAE downscale 8; enlarges multiples of 32 px."""
    torch.manual_seed(2)
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=8,
        out_channels=5,
        down_block_types=("KDownBlock2D", *["KCrossAttnDownBlock2D"] * 3),
        mid_block_type=None,
        up_block_types=(*["KCrossAttnUpBlock2D"] * 3, "KUpBlock2D"),
        block_out_channels=(32, 32, 64, 64),  # groups of 32 channels are normed together
        layers_per_block=2,
        attention_head_dim=16,
        cross_attention_dim=_HIDDEN,
        act_fn="gelu",
        norm_num_groups=None,
        conv_in_kernel=1,
        conv_out_kernel=1,
        time_embedding_type="fourier",
        time_cond_proj_dim=128 + _HIDDEN,
        resnet_time_scale_shift="scale_shift",
    )
    _save(folder, unet, _vae(levels=4, scaling=0.18215), {"scheduler": X2_SCHEDULER})
    return _index(folder, "StableDiffusionLatentUpscalePipeline", scheduler=["diffusers", "EulerDiscreteScheduler"])


def write_tiny_x4(folder: Path) -> Path:
    """The ×4 upscaler: sees the picture itself beside the latents, VAE downscale 4."""
    torch.manual_seed(4)
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=7,
        out_channels=4,
        down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * 3),
        up_block_types=(*["CrossAttnUpBlock2D"] * 3, "UpBlock2D"),
        block_out_channels=(16, 32, 32, 32),
        layers_per_block=1,
        attention_head_dim=2,
        cross_attention_dim=_HIDDEN,
        use_linear_projection=True,
        num_class_embeds=1000,
        only_cross_attention=(True, True, True, False),
        norm_num_groups=8,
    )
    _save(
        folder,
        unet,
        _vae(levels=3, scaling=0.08333),
        {"scheduler": X4_SCHEDULER, "low_res_scheduler": X4_LOW_RES_SCHEDULER},
    )
    return _index(
        folder,
        "StableDiffusionUpscalePipeline",
        **_NO_CHECKER,
        watermarker=[None, None],
        scheduler=["diffusers", "DDIMScheduler"],
        low_res_scheduler=["diffusers", "DDPMScheduler"],
        max_noise_level=350,
    )


def _vae(levels: int, scaling: float) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8, 16, 16)[:levels],
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        latent_channels=4,
        sample_size=64,
        scaling_factor=scaling,
    )


def _save(folder: Path, unet: Any, vae: Any, schedulers: dict[str, dict[str, object]]) -> None:
    vocabulary = json.loads((TOKENIZER / "vocab.json").read_text())
    end = vocabulary["<|endoftext|>"]
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(vocabulary),
            hidden_size=_HIDDEN,
            intermediate_size=37,
            num_hidden_layers=5,
            num_attention_heads=4,
            bos_token_id=vocabulary["<|startoftext|>"],
            eos_token_id=end,
            pad_token_id=end,
        )
    )
    # The ×2 UNet norms its context, so that only a norm with weights shows whether the encoder's was before it.
    torch.nn.init.uniform_(getattr(text, "text_model", text).final_layer_norm.weight, 0.5, 1.5)
    for name, part in [("text_encoder", text), ("unet", unet), ("vae", vae)]:
        part.save_pretrained(folder / name, safe_serialization=True)
    shutil.copytree(TOKENIZER, folder / "tokenizer")
    for name, options in schedulers.items():
        (folder / name).mkdir()
        (folder / name / "scheduler_config.json").write_text(json.dumps(options))


def _index(folder: Path, pipeline: str, **more: object) -> Path:
    index = {
        "_class_name": pipeline,
        "_diffusers_version": "0.38.0",
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        **more,
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder
