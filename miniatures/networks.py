"""The miniatures' networks: Stable Diffusion's, narrowed until each fits in a few megabytes."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from .world import SIZE

HIDDEN: Final = 128
LATENT_SIZE: Final = SIZE // 4

# Stable Diffusion 1.5's own noise schedule; DPM++ 2M, since PNDM overshoots in networks this sure of themselves.
TRAIN_STEPS: Final = 1000
BETA_START: Final = 0.00085
BETA_END: Final = 0.012
SCHEDULER: Final[dict[str, object]] = {
    "_class_name": "DPMSolverMultistepScheduler",
    "clip_sample": False,  # of no effect for it, but read by DDIM and DDPM, as in the published config
    "_diffusers_version": "0.6.0",
    "beta_end": BETA_END,
    "beta_schedule": "scaled_linear",
    "beta_start": BETA_START,
    "num_train_timesteps": TRAIN_STEPS,
    "prediction_type": "epsilon",
    "steps_offset": 1,
    "trained_betas": None,
}

# A pipeline's networks: the library and the class of each.
PARTS: Final[dict[str, tuple[str | None, str | None]]] = {
    "text_encoder": ("transformers", "CLIPTextModel"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
    "unet": ("diffusers", "UNet2DConditionModel"),
    "vae": ("diffusers", "AutoencoderKL"),
}
UNSAFE: Final[dict[str, object]] = {
    "feature_extractor": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
}


def alphas_cumprod(start: float = BETA_START, end: float = BETA_END) -> Tensor:
    """How much of the picture's variance is left at each of the thousand steps."""
    betas = torch.linspace(start**0.5, end**0.5, TRAIN_STEPS, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0).float()


def new_vae(scaling_factor: float = 1.0) -> AutoencoderKL:
    """The autoencoder: 64 × 64 pixels to 4 × 16 × 16 latents, 2.7 M parameters."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 128),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=SIZE,
        scaling_factor=scaling_factor,
    )


def new_unet(in_channels: int = 4) -> UNet2DConditionModel:
    """The denoiser: two levels, cross attention at the lower one, 2.5 M parameters."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=in_channels,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(64, 96),
        layers_per_block=1,
        cross_attention_dim=HIDDEN,
        attention_head_dim=4,  # the number of heads, as in Stable Diffusion 1.5 (diffusers' historical misnomer)
        norm_num_groups=16,
    )


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """CLIP's text model with two layers, for the miniatures' own vocabulary."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=4 * HIDDEN,
        projection_dim=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def widened(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """The inpainting UNet that a text-to-image UNet is: five more input channels, which it ignores so far."""
    wide = new_unet(in_channels=9)
    state = unet.state_dict()
    weight = state["conv_in.weight"]
    state["conv_in.weight"] = torch.cat([weight, weight.new_zeros(weight.shape[0], 5, *weight.shape[2:])], 1)
    wide.load_state_dict(state)
    return wide


def save_network(network: Any, folder: Path) -> None:
    """Write a network as diffusers would, in half precision; whoever reads the folder sees old or new, not both."""
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".new-") as fresh:
        half = copy.deepcopy(network).half().to(memory_format=torch.contiguous_format)
        half.save_pretrained(fresh)
        config = json.loads(Path(fresh, "config.json").read_text("utf-8"))
        config.pop("_name_or_path", None)  # where it lay on the machine that trained it
        if "dtype" in config:  # what transformers loads it as if nobody says; diffusers' networks have no such entry
            config["dtype"] = "float32"
        save_json(config, Path(fresh, "config.json"))
        folder.mkdir(exist_ok=True)
        for file in Path(fresh).iterdir():
            file.chmod(0o644)
            file.replace(folder / file.name)


def save_json(content: object, path: Path) -> None:
    """Indented JSON, replaced in one go."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    part.replace(path)


def save_index(
    folder: Path,
    pipeline: str,
    parts: Mapping[str, tuple[str | None, str | None]] = PARTS,
    scheduler: Mapping[str, object] = SCHEDULER,
    settings: Mapping[str, object] = UNSAFE,
) -> None:
    """The files of a checkpoint that are not networks: `model_index.json` and the scheduler."""
    index = {
        "_class_name": pipeline,
        "_diffusers_version": "0.6.0",
        **settings,
        "scheduler": ["diffusers", scheduler["_class_name"]],
        **{name: list(where) for name, where in parts.items()},
    }
    save_json(index, folder / "model_index.json")
    save_json(scheduler, folder / "scheduler" / "scheduler_config.json")
