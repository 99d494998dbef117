"""The trained miniatures give diffusers' latents and pictures."""

from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from unrolled.chains.chain import Inpaint, TextToImage
from unrolled.chains.jobs import inpaint, text_to_image
from unrolled.core.loading import Model, load
from unrolled.core.noise import DiffusersNoise
from unrolled.core.source import MINIATURES
from unrolled.stages.decode import decode
from unrolled.stages.pictures import read_mask

CLASSES = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "pndm": "PNDMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-ancestral": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "dpm++2m": "DPMSolverMultistepScheduler",
}


@pytest.fixture(scope="module")
def sd() -> Model:
    return load("sd-1.5", device="cpu")


@pytest.fixture(scope="module")
def pipe() -> Any:
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(
        MINIATURES / "sd-1.5", use_safetensors=True, torch_dtype=torch.float32
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("solver", CLASSES)
def test_text_to_image(solver: str, sd: Model, pipe: Any) -> None:
    pipe.scheduler = getattr(diffusers, CLASSES[solver]).from_config(sd.scheduler)
    spec = TextToImage(prompt="a castle", negative_prompt="a dog", steps=6, solver=solver, guidance_scale=6.0, faithful=True)
    ours = text_to_image(sd, spec, [5], source=DiffusersNoise.seeded(5))
    options = {"num_inference_steps": 6, "guidance_scale": 6.0, "generator": torch.Generator().manual_seed(5)}
    theirs = pipe("a castle", negative_prompt="a dog", output_type="latent", **options).images
    x = ours.unscaled * sd.space.scaling
    assert (x - theirs).abs().max() <= 1e-4 * theirs.abs().max()
    options["generator"] = torch.Generator().manual_seed(5)
    picture = pipe("a castle", negative_prompt="a dog", **options).images[0]
    assert _difference(decode(sd, ours)[0], picture) <= 1


def test_inpainting(sd: Model) -> None:
    model = load("sd-1.5-inpainting", device="cpu")
    pipe = diffusers.StableDiffusionInpaintPipeline.from_pretrained(
        MINIATURES / "sd-1.5-inpainting", use_safetensors=True, torch_dtype=torch.float32,
        vae=model.vae, text_encoder=model.text_encoder, tokenizer=model.tokenizer,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(model.scheduler)
    castle = decode(sd, text_to_image(sd, TextToImage(prompt="a castle", steps=6, solver="euler"), [0]))[0]
    mask = read_mask(MINIATURES.parent / "chains" / "inputs" / "mask.png").resize(castle.size)
    mask = mask.point([255 * (v >= 128) for v in range(256)])
    spec = Inpaint(prompt="a dog", mask="", steps=6, solver="euler", guidance_scale=6.0, downsample="nearest")
    ours = inpaint(model, spec, [castle], mask, [5], source=DiffusersNoise.seeded(5))
    theirs = pipe(
        "a dog", image=castle, mask_image=mask, height=castle.height, width=castle.width, num_inference_steps=6,
        guidance_scale=6.0, generator=torch.Generator().manual_seed(5), output_type="latent",
    ).images  # fmt: skip
    assert (ours.x - theirs).abs().max() <= 1e-4 * theirs.abs().max()


def _difference(ours: Image.Image, theirs: Image.Image) -> int:
    return int(np.abs(np.asarray(ours).astype(int) - np.asarray(theirs).astype(int)).max())
