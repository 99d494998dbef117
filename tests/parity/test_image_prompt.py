"""IP-Adapters against diffusers' ``load_ip_adapter``: same weights, same noise, fp32."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
from PIL import Image
from transformers import CLIPImageProcessorPil
from unrolled.core.companions import load_controlnet, load_image_adapter
from unrolled.core.conditioning import Conditioning
from unrolled.core.control import Control, controlled
from unrolled.core.guidance import classifier_free
from unrolled.core.image_adapter import image_prompted
from unrolled.core.latents import Latents
from unrolled.core.loading import Model, Shelf
from unrolled.core.loop import denoise
from unrolled.core.noise import DiffusersNoise
from unrolled.stages.control import with_control
from unrolled.stages.image import encode_image
from unrolled.stages.image_prompt import with_image_prompt
from unrolled.stages.noise import add_noise, noise, start_step, unit_noise
from unrolled.stages.size import with_size
from unrolled.stages.text import encode_text

TOLERANCE = 1e-4
Run = Callable[..., Any]
SOLVERS = {"sd": "ddim", "sdxl": "euler"}
KINDS = ["sd", "sd-plus", "sdxl", "sdxl-plus"]


@pytest.fixture
def theirs(tiny_folder: Path, tiny_sdxl_folder: Path, image_adapter_files: dict[str, Path], tiny: Model) -> Run:
    """A pipeline's latents with an IP-Adapter loaded."""
    folders = {"sd": tiny_folder, "sdxl": tiny_sdxl_folder}

    def run(name: str, kind: str, model: Model, scale: float, **given: Any) -> Any:
        system = model.system
        parts = {"controlnet": given.pop("controlnet")} if "controlnet" in given else {}
        checks = {} if system == "sdxl" else {"safety_checker": None}
        pipeline = getattr(diffusers, name).from_pretrained(folders[system], **checks, **parts)
        scheduler = {"sd": diffusers.DDIMScheduler, "sdxl": diffusers.EulerDiscreteScheduler}[system]
        pipeline.scheduler = scheduler.from_config(model.scheduler)
        pipeline.set_progress_bar_config(disable=True)
        file = image_adapter_files[kind]
        side = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
        pipeline.register_modules(feature_extractor=CLIPImageProcessorPil(**side))
        pipeline.load_ip_adapter(file.parent, subfolder="", weight_name=file.name)
        pipeline.set_ip_adapter_scale(scale)
        return pipeline(
            "a red apple",
            num_inference_steps=4,
            generator=DiffusersNoise.seeded(3).generator,
            output_type="latent",
            **given,
        ).images

    return run


def distance(ours: Latents, theirs: Any, model: Model) -> float:
    x = ours.x / math.sqrt(1 + ours.sigma**2) if model.system == "sd" else ours.x
    return float((x - theirs).abs().max() / theirs.abs().max())


def prompted(model: Model) -> tuple[Conditioning, Conditioning]:
    if model.system == "sd":
        return encode_text(model, "a red apple"), encode_text(model, "")
    cond, uncond = (with_size(model, encode_text(model, prompt), 64, 64) for prompt in ("a red apple", None))
    return cond, uncond


@pytest.mark.parametrize("guidance_scale", [5.0, 1.0])
@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("kind", KINDS)
def test_text_to_image(
    kind: str,
    scale: float,
    guidance_scale: float,
    tiny: Model,
    tiny_sdxl: Model,
    picture: Image.Image,
    image_adapter_files: dict[str, Path],
    theirs: Run,
) -> None:
    model = {"sd": tiny, "sdxl": tiny_sdxl}[kind.partition("-")[0]]
    adapter = load_image_adapter(Shelf(device="cpu"), str(image_adapter_files[kind]), model)
    schedule, solver = model.sampling(4, SOLVERS[model.system])
    start = noise(model, schedule, 64, 64, seeds=[3], source=DiffusersNoise.seeded(3))
    wide = picture.resize((96, 64))
    cond, uncond = prompted(model)
    with image_prompted(model, adapter, scale):
        pair = with_image_prompt(adapter, cond, wide), with_image_prompt(adapter, uncond, None)
        ours = denoise(classifier_free(model.denoiser, *pair, guidance_scale), start, schedule, solver)
    name = f"StableDiffusion{'XL' * (model.system == 'sdxl')}Pipeline"
    reference = theirs(name, kind, model, scale, height=64, width=64, guidance_scale=guidance_scale, ip_adapter_image=wide)
    assert distance(ours, reference, model) < TOLERANCE
    plain = denoise(classifier_free(model.denoiser, cond, uncond, guidance_scale), start, schedule, solver)
    assert distance(plain, reference, model) > 0.01  # it is the adapter that makes the picture


def test_image_to_image_under_a_controlnet(
    tiny: Model,
    picture: Image.Image,
    image_adapter_files: dict[str, Path],
    controlnet_folders: dict[str, list[Path]],
    theirs: Run,
) -> None:
    shelf = Shelf(device="cpu")
    network = load_controlnet(shelf, str(controlnet_folders["sd"][0]), tiny)
    adapter = load_image_adapter(shelf, str(image_adapter_files["sd-plus"]), tiny)
    schedule, solver = tiny.sampling(4, "ddim")
    schedule, source = schedule[start_step(4, 0.75, faithful=True) :], DiffusersNoise.seeded(3)
    clean = encode_image(tiny, picture, seeds=[3], source=source)
    start = add_noise(clean, schedule, unit_noise(clean, source))
    with image_prompted(tiny, adapter, 0.7):
        cond, uncond = prompted(tiny)
        pair = with_image_prompt(adapter, cond, picture), with_image_prompt(adapter, uncond, None)
        pair = with_control(tiny, pair[0], [picture]), with_control(tiny, pair[1], [picture])
        denoiser = classifier_free(controlled(tiny.denoiser, [Control(network, 0.9)]), *pair, 5.0)
        ours = denoise(denoiser, start, schedule, solver)
    reference = theirs(
        "StableDiffusionControlNetImg2ImgPipeline",
        "sd-plus",
        tiny,
        0.7,
        controlnet=copy.deepcopy(network),
        image=picture,
        control_image=picture,
        strength=0.75,
        controlnet_conditioning_scale=0.9,
        guidance_scale=5.0,
        ip_adapter_image=picture,
    )
    assert distance(ours, reference, tiny) < TOLERANCE
