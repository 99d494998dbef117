"""The networks of the upscaler miniatures, in the structure of the published ones and narrow."""

from __future__ import annotations

from typing import Final

from diffusers import UNet2DConditionModel

from .networks import BETA_END, BETA_START, HIDDEN, TRAIN_STEPS

LATENTS: Final = 32
LEVELS: Final = 351  # noise levels of the small picture, 0 to 350
X4_BETAS: Final = (0.0001, 0.02)
X4_SCALE: Final = 0.08333  # diffusers gives every VAE in this pipeline this factor, whatever its own was

_X4_NOISE: Final[dict[str, object]] = {
    "_diffusers_version": "0.8.0",
    "beta_end": X4_BETAS[1],
    "beta_schedule": "scaled_linear",
    "beta_start": X4_BETAS[0],
    "num_train_timesteps": TRAIN_STEPS,
    "trained_betas": None,
}
X4_SCHEDULER: Final[dict[str, object]] = {
    "_class_name": "DDIMScheduler",
    **_X4_NOISE,
    "clip_sample": False,
    "prediction_type": "v_prediction",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}
X4_LOW_RES_SCHEDULER: Final[dict[str, object]] = {
    "_class_name": "DDPMScheduler",
    **_X4_NOISE,
    "clip_sample": True,
    "variance_type": "fixed_small",
}
X2_SCHEDULER: Final[dict[str, object]] = {
    "_class_name": "EulerDiscreteScheduler",
    "_diffusers_version": "0.15.0.dev0",
    "beta_end": BETA_END,
    "beta_schedule": "scaled_linear",
    "beta_start": BETA_START,
    "clip_sample": False,
    "interpolation_type": "log_linear",
    "num_train_timesteps": TRAIN_STEPS,
    "prediction_type": "original_sample",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}


def new_x2() -> UNet2DConditionModel:
    """The latent upscaler: K-blocks, Fourier features of time, a fifth channel nobody reads, 0.41 M parameters."""
    return UNet2DConditionModel(
        sample_size=LATENTS,
        in_channels=8,
        out_channels=5,
        down_block_types=("KDownBlock2D", "KCrossAttnDownBlock2D", "KCrossAttnDownBlock2D"),
        mid_block_type=None,
        up_block_types=("KCrossAttnUpBlock2D", "KCrossAttnUpBlock2D", "KUpBlock2D"),
        block_out_channels=(32, 48, 48),
        layers_per_block=1,
        attention_head_dim=16,
        cross_attention_dim=HIDDEN,
        act_fn="gelu",
        norm_num_groups=None,
        conv_in_kernel=1,
        conv_out_kernel=1,
        time_embedding_type="fourier",
        time_embedding_dim=48,  # as wide as the lowest level: that is how diffusers knows the first block upwards
        time_cond_proj_dim=2 * 64 + HIDDEN,
        resnet_time_scale_shift="scale_shift",
    )


def new_x4() -> UNet2DConditionModel:
    """The ×4 upscaler: sees the small picture beside the latents, told how noisy it is, 0.33 M parameters."""
    return UNet2DConditionModel(
        sample_size=LATENTS,
        in_channels=7,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(16, 24, 24),
        layers_per_block=1,
        attention_head_dim=2,  # the number of heads
        cross_attention_dim=HIDDEN,
        only_cross_attention=(True, True, False),
        use_linear_projection=True,
        num_class_embeds=LEVELS,
        norm_num_groups=8,
    )
