"""Complete Kandinsky 2.2 checkpoints of some hundred thousand random parameters, for tests and benchmarks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import PriorTransformer, UNet2DConditionModel, VQModel
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPVisionConfig, CLIPVisionModelWithProjection

from .kandinsky_networks import DECODER_INDEX, DECODER_SCHEDULER, IMAGE_PROCESSOR, PRIOR_INDEX, PRIOR_SCHEDULER
from .tiny import TOKENIZER
from .world import SIZE

WIDTH = 32
"""Of the embeddings, of pictures and prompts alike."""


def write_tiny_prior(folder: Path) -> Path:
    """The prior with its tokenizer, text encoder, image encoder (64 px) and image processor."""
    torch.manual_seed(0)
    vocabulary = json.loads((TOKENIZER / "vocab.json").read_text())
    end = vocabulary["<|endoftext|>"]
    shape = {"hidden_size": WIDTH, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = CLIPTextModelWithProjection(
        CLIPTextConfig(
            **shape,
            projection_dim=WIDTH,
            vocab_size=len(vocabulary),
            bos_token_id=vocabulary["<|startoftext|>"],
            eos_token_id=end,
            pad_token_id=end,
        )
    )
    image = CLIPVisionModelWithProjection(CLIPVisionConfig(**shape, projection_dim=WIDTH, image_size=SIZE, patch_size=16))
    prior = PriorTransformer(
        num_attention_heads=4,
        attention_head_dim=8,
        num_layers=1,
        embedding_dim=WIDTH,
        num_embeddings=77,
        additional_embeddings=4,
    )
    with torch.no_grad():
        for weight in prior.transformer_blocks.parameters():
            weight *= 4  # else it hardly looks at what it shall denoise
    torch.nn.init.normal_(prior.clip_mean, std=0.3)
    torch.nn.init.uniform_(prior.clip_std, 0.5, 1.5)
    for name, part in [("text_encoder", text), ("image_encoder", image), ("prior", prior)]:
        part.save_pretrained(folder / name, safe_serialization=True)
    shutil.copytree(TOKENIZER, folder / "tokenizer")
    _write(folder / "image_processor" / "preprocessor_config.json", IMAGE_PROCESSOR)
    _write(folder / "scheduler" / "scheduler_config.json", PRIOR_SCHEDULER)
    _write(folder / "model_index.json", PRIOR_INDEX)
    return folder


def write_tiny_kandinsky(folder: Path, inpaint: bool = False) -> Path:
    """A decoder with its MoVQ; downscale 8, native size 64 px, sides multiples of 64 as of the published one."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=9 if inpaint else 4,
        out_channels=8,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        block_out_channels=(16, 32),
        layers_per_block=1,
        attention_head_dim=8,
        cross_attention_dim=WIDTH,
        encoder_hid_dim=WIDTH,
        encoder_hid_dim_type="image_proj",
        addition_embed_type="image",
        resnet_time_scale_shift="scale_shift",
        norm_num_groups=8,
    )
    movq = VQModel(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 32, 32, 32),  # its spatial norms come in groups of 32
        layers_per_block=1,
        latent_channels=4,
        vq_embed_dim=4,
        num_vq_embeddings=64,
        norm_num_groups=8,
        norm_type="spatial",
        sample_size=SIZE,
    )
    unet.save_pretrained(folder / "unet", safe_serialization=True)
    movq.save_pretrained(folder / "movq", safe_serialization=True)
    _write(folder / "scheduler" / "scheduler_config.json", DECODER_SCHEDULER)
    index = {"_class_name": "KandinskyV22InpaintPipeline"} if inpaint else {}
    _write(folder / "model_index.json", DECODER_INDEX | index)
    return folder


def _write(file: Path, content: Mapping[str, object]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))
