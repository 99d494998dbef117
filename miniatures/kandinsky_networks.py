"""The networks of the Kandinsky 2.2 miniatures: the published ones, narrowed until each fits in a megabyte or two."""

from __future__ import annotations

from typing import Final

import torch
from diffusers import PriorTransformer, UNet2DConditionModel, VQModel
from torch import Tensor
from transformers import (
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from .networks import BETA_END, BETA_START, HIDDEN, LATENT_SIZE, TRAIN_STEPS, new_text_encoder
from .world import SIZE

# What CLIP's pictures are shifted and scaled by: its own training pictures' mean and deviation.
CLIP_MEAN: Final = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Final = (0.26862954, 0.26130258, 0.27577711)
IMAGE_PROCESSOR: Final[dict[str, object]] = {
    "image_processor_type": "CLIPImageProcessor",
    "crop_size": {"height": SIZE, "width": SIZE},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": list(CLIP_MEAN),
    "image_std": list(CLIP_STD),
    "resample": 3,
    "rescale_factor": 1 / 255,
    "size": {"shortest_edge": SIZE},
}

PRIOR_SCHEDULER: Final[dict[str, object]] = {
    "_class_name": "UnCLIPScheduler",
    "_diffusers_version": "0.17.0.dev0",
    "clip_sample": True,
    "clip_sample_range": 10.0,
    "num_train_timesteps": TRAIN_STEPS,
    "prediction_type": "sample",
    "variance_type": "fixed_small_log",
}
DECODER_SCHEDULER: Final[dict[str, object]] = {
    "_class_name": "DDPMScheduler",
    "_diffusers_version": "0.17.0.dev0",
    "beta_end": BETA_END,
    "beta_schedule": "linear",
    "beta_start": BETA_START,
    "clip_sample": False,
    "num_train_timesteps": TRAIN_STEPS,
    "prediction_type": "epsilon",
    "thresholding": False,
    "trained_betas": None,
    "variance_type": "learned_range",
}
PRIOR_INDEX: Final[dict[str, object]] = {
    "_class_name": "KandinskyV22PriorPipeline",
    "_diffusers_version": "0.17.0.dev0",
    "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
    "image_processor": ["transformers", "CLIPImageProcessor"],
    "prior": ["diffusers", "PriorTransformer"],
    "scheduler": ["diffusers", "UnCLIPScheduler"],
    "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
}
DECODER_INDEX: Final[dict[str, object]] = {
    "_class_name": "KandinskyV22Pipeline",
    "_diffusers_version": "0.17.0.dev0",
    "movq": ["diffusers", "VQModel"],
    "scheduler": ["diffusers", "DDPMScheduler"],
    "unet": ["diffusers", "UNet2DConditionModel"],
}


def new_text_tower(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    """CLIP's text half, 0.69 M parameters: the text encoder of the other miniatures and a projection."""
    return CLIPTextModelWithProjection(new_text_encoder(tokenizer).config)


def new_image_tower() -> CLIPVisionModelWithProjection:
    """CLIP's image half: 64 × 64 pixels in 64 patches, 0.37 M parameters."""
    config = CLIPVisionConfig(
        hidden_size=96,
        intermediate_size=384,
        projection_dim=HIDDEN,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=8,
    )
    return CLIPVisionModelWithProjection(config)


def new_movq() -> VQModel:
    """The autoencoder: 64 × 64 pixels to 4 × 16 × 16 latents, 0.74 M parameters; every norm of its decoder sees them."""
    return VQModel(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 32, 64),
        layers_per_block=1,
        latent_channels=4,
        vq_embed_dim=4,
        num_vq_embeddings=512,
        norm_num_groups=8,
        norm_type="spatial",
        sample_size=SIZE,
    )


def rescaled(movq: VQModel, factor: float) -> VQModel:
    """The same autoencoder with latents `factor` times as large: Kandinsky's pipelines scale them nowhere."""
    with torch.no_grad():
        for weight in (*movq.quant_conv.parameters(), movq.quantize.embedding.weight):
            weight *= factor
        for name, part in movq.named_modules():
            if name.endswith(("post_quant_conv", "conv_y", "conv_b")):  # the spatial norms read the latents, too
                part.weight /= factor
    return movq


def new_prior() -> PriorTransformer:
    """From a caption's embedding to a picture's: two layers, 0.51 M parameters."""
    return PriorTransformer(
        num_attention_heads=4,
        attention_head_dim=HIDDEN // 4,
        num_layers=2,
        embedding_dim=HIDDEN,
        num_embeddings=77,
        additional_embeddings=4,
    )


def new_decoder(in_channels: int = 4) -> UNet2DConditionModel:
    """From a picture's embedding to its latents, 0.92 M parameters; four more outputs say how sure it is."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=in_channels,
        out_channels=8,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        block_out_channels=(32, 64),
        layers_per_block=1,
        attention_head_dim=16,
        cross_attention_dim=16,
        encoder_hid_dim=HIDDEN,
        encoder_hid_dim_type="image_proj",
        addition_embed_type="image",
        resnet_time_scale_shift="scale_shift",
        norm_num_groups=8,
    )


def widened(decoder: UNet2DConditionModel) -> UNet2DConditionModel:
    """The inpainting decoder that a decoder is: five more input channels, which it ignores so far."""
    wide = new_decoder(in_channels=9)
    state = decoder.state_dict()
    weight = state["conv_in.weight"]
    state["conv_in.weight"] = torch.cat([weight, weight.new_zeros(weight.shape[0], 5, *weight.shape[2:])], 1)
    wide.load_state_dict(state)
    return wide


def normalised(pictures: Tensor) -> Tensor:
    """Pictures in [-1, 1] as CLIP's image processor would hand them over."""
    mean, std = torch.tensor(CLIP_MEAN).view(-1, 1, 1), torch.tensor(CLIP_STD).view(-1, 1, 1)
    return ((pictures + 1) / 2 - mean) / std


def encoded(movq: VQModel, pictures: Tensor) -> Tensor:
    """The latents of pictures."""
    with torch.no_grad():
        return torch.cat([movq.encode(batch).latents for batch in torch.split(pictures, 64)])
