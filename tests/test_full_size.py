"""The real structure of Stable Diffusion 1.5, with random weights, through the whole pipeline at 512x512."""

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from unrolled.chains.chain import TextToImage
from unrolled.chains.jobs import text_to_image
from unrolled.core.latents import LatentSpace
from unrolled.core.loading import Model
from unrolled.core.source import MINIATURES
from unrolled.stages.decode import decode

UNET = {
    "sample_size": 64,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "block_out_channels": (320, 640, 1280, 1280),
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
}
VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
}
CLIP = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}


def random_weights(module: torch.nn.Module) -> torch.nn.Module:
    """Matrices small, norms one, biases zero: finite through any depth."""
    module = module.to_empty(device="cpu").eval()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.02)
            else:
                parameter.zero_()
        for part in module.modules():
            if isinstance(part, torch.nn.GroupNorm | torch.nn.LayerNorm):
                torch.nn.init.ones_(part.weight)
    return module.requires_grad_(False)


@pytest.fixture(scope="module")
def full_size() -> Model:
    torch.manual_seed(0)
    with torch.device("meta"):
        unet, vae = UNet2DConditionModel(**UNET), AutoencoderKL(**VAE)
    assert sum(p.numel() for p in unet.parameters()) == 859_520_964
    assert sum(p.numel() for p in vae.parameters()) == 83_653_863
    tokenizer = CLIPTokenizer.from_pretrained(MINIATURES / "sd-1.5" / "tokenizer")
    scheduler = {"_class_name": "PNDMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return Model(
        name="full size",
        tokenizer=tokenizer,
        text_encoder=CLIPTextModel(CLIPTextConfig(**CLIP)).eval(),
        unet=random_weights(unet),
        vae=random_weights(vae),
        scheduler=scheduler | {"skip_prk_steps": True, "steps_offset": 1, "set_alpha_to_one": False},
        space=LatentSpace("AutoencoderKL", 4, 8, 0.18215, "random"),
        fingerprints={},
        device=torch.device("cpu"),
        dtype=torch.float32,
    )


@pytest.mark.slow
def test_two_steps_at_512(full_size: Model) -> None:
    latents = text_to_image(full_size, TextToImage(prompt="a castle", steps=2, solver="dpm++2m"), [0])
    assert latents.x.shape == (1, 4, 64, 64)
    assert latents.is_clean
    (picture,) = decode(full_size, latents)
    assert picture.size == (512, 512)
    assert len(picture.getcolors(512 * 512) or []) > 1
