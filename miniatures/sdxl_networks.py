"""The networks of the SDXL miniatures: the published ones' structure, narrowed until each fits in a megabyte or two."""

from __future__ import annotations

from typing import Final

from diffusers import AutoencoderKL, UNet2DConditionModel

from .networks import BETA_END, BETA_START, HIDDEN, PARTS, TRAIN_STEPS

SIZE: Final = 128
IDS_WIDTH: Final = 32

SCHEDULER: Final[dict[str, object]] = {
    "_class_name": "EulerDiscreteScheduler",
    "_diffusers_version": "0.19.0.dev0",
    "beta_end": BETA_END,
    "beta_schedule": "scaled_linear",
    "beta_start": BETA_START,
    "clip_sample": False,
    "interpolation_type": "linear",
    "num_train_timesteps": TRAIN_STEPS,
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
    "use_karras_sigmas": False,
}
SECOND: Final[dict[str, tuple[str | None, str | None]]] = {
    "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
    "tokenizer_2": ("transformers", "CLIPTokenizer"),
}
BASE_PARTS: Final = {**PARTS, **SECOND}
REFINER_PARTS: Final = {**BASE_PARTS, "text_encoder": (None, None), "tokenizer": (None, None)}
NO_PICTURES: Final[dict[str, object]] = {"feature_extractor": [None, None], "image_encoder": [None, None]}


def new_vae() -> AutoencoderKL:
    """SDXL's own autoencoder: 128 × 128 pixels to 4 × 32 × 32 latents, 0.68 M parameters."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=SIZE,
        force_upcast=True,
    )


def new_base() -> UNet2DConditionModel:
    """The base: three levels, transformers at the lower two, more of them at the lowest, 1.0 M parameters."""
    return UNet2DConditionModel(
        sample_size=SIZE // 4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(16, 24, 48),
        layers_per_block=1,
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(1, 1, 3),  # the number of heads, as everywhere in Stable Diffusion
        cross_attention_dim=2 * HIDDEN,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=IDS_WIDTH,
        projection_class_embeddings_input_dim=HIDDEN + 6 * IDS_WIDTH,
        norm_num_groups=8,
    )


def new_refiner() -> UNet2DConditionModel:
    """The refiner: four levels, transformers at the middle two, one text encoder, five numbers, 0.6 M parameters."""
    return UNet2DConditionModel(
        sample_size=SIZE // 4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(24, 24, 32, 32),
        layers_per_block=1,
        transformer_layers_per_block=1,
        attention_head_dim=(1, 1, 2, 2),
        cross_attention_dim=HIDDEN,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=IDS_WIDTH,
        projection_class_embeddings_input_dim=HIDDEN + 5 * IDS_WIDTH,
        norm_num_groups=8,
    )
