"""ControlNets against diffusers' ControlNet pipelines of Stable Diffusion and SDXL: same weights, same noise, fp32."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import pytest
from PIL import Image, ImageOps
from unrolled.core.companions import load_controlnet
from unrolled.core.conditioning import Conditioning
from unrolled.core.control import Control, between, controlled
from unrolled.core.guidance import classifier_free
from unrolled.core.latents import Latents
from unrolled.core.loading import Model, Shelf
from unrolled.core.loop import denoise
from unrolled.core.noise import DiffusersNoise
from unrolled.core.schedule import Schedule
from unrolled.stages.control import with_control
from unrolled.stages.image import encode_image
from unrolled.stages.inpaint import inpaint_channels, keep_known, keeping_known, known, latent_mask, with_channels
from unrolled.stages.noise import add_noise, noise, start_step, unit_noise
from unrolled.stages.size import with_size
from unrolled.stages.text import encode_text

TOLERANCE = 1e-4
Run = Callable[..., Any]
NETS: dict[str, dict[str, Any]] = {
    "one": {"scales": [1.0]},
    "less": {"scales": [0.4]},
    "not at first": {"scales": [0.8], "starts": [0.25], "ends": [1.0]},
    "to the middle": {"scales": [0.8], "starts": [0.0], "ends": [0.5]},
    "two": {"scales": [0.5, 1.2]},
    "two in turn": {"scales": [0.9, 1.2], "starts": [0.0, 0.5], "ends": [0.5, 0.9]},
}


@pytest.fixture(scope="session")
def edges(picture: Image.Image) -> list[Image.Image]:
    """Four control pictures."""
    return [picture, ImageOps.mirror(picture), ImageOps.invert(picture), ImageOps.flip(picture)]


@pytest.fixture(scope="session")
def shelf() -> Shelf:
    return Shelf(device="cpu")


@pytest.fixture(scope="session")
def networks(shelf: Shelf, controlnet_folders: dict[str, list[Path]], tiny: Model, tiny_sdxl: Model) -> dict[str, list[Any]]:
    """The ControlNets of each system."""
    of = {"sd": tiny, "sdxl": tiny_sdxl}
    return {
        name: [load_controlnet(shelf, str(folder), of[name]) for folder in folders]
        for name, folders in controlnet_folders.items()
    }


@pytest.fixture
def denoiser_of(networks: dict[str, list[Any]]) -> Run:
    """Guided, under ControlNets, in the steps of a run."""

    def build(
        model: Model,
        schedule: Schedule,
        pair: Sequence[Conditioning],
        pictures: Sequence[Any],
        *,
        scales: Sequence[float],
        starts: Sequence[float] = (0.0, 0.0),
        ends: Sequence[float] = (1.0, 1.0),
        guidance_scale: float = 5.0,
        batched: bool = True,
    ) -> Any:
        cond, uncond = (with_control(model, c, pictures[: len(scales)]) for c in pair)
        acts = zip(networks[model.system], scales, starts, ends, strict=False)
        controls = [Control(net, between(schedule, scale, start, end)) for net, scale, start, end in acts]
        network = controlled(model.denoiser, controls)
        return classifier_free(network, cond, uncond, guidance_scale, batched=batched)

    return build


@pytest.fixture
def theirs(networks: dict[str, list[Any]], pipeline_of: Run, tiny_folder: Path, tiny_sdxl_folder: Path) -> Run:
    """A ControlNet pipeline's latents."""
    folders = {"sd": tiny_folder, "sdxl": tiny_sdxl_folder}

    def run(
        name: str,
        system: str,
        model: Model,
        scales: Sequence[float],
        starts: Sequence[float] = (0.0, 0.0),
        ends: Sequence[float] = (1.0, 1.0),
        *,
        components: dict[str, Any] | None = None,
        solver: str = "DDIMScheduler",
        pictures: Sequence[Any],
        prompts: Sequence[str] = ("a red apple",),
        seeds: Sequence[int] = (3,),
        guidance_scale: float = 5.0,
        **more: Any,
    ) -> Any:
        count = len(scales)
        nets = networks[system][:count]
        kind = getattr(diffusers, name)
        checks = {} if system == "sdxl" else {"safety_checker": None}
        pipeline = kind.from_pretrained(
            folders[system], controlnet=nets if count > 1 else nets[0], **checks, **components or {}
        )
        pipeline.scheduler = getattr(diffusers, solver).from_config(model.scheduler)
        pipeline.set_progress_bar_config(disable=True)
        shown = pictures[:count] if count > 1 else pictures[0]
        if count > 1 and isinstance(shown[0], list):  # diffusers wants them by image
            shown = [list(images) for images in zip(*shown, strict=True)]
        return pipeline(
            list(prompts),
            num_inference_steps=4,
            generator=DiffusersNoise.seeded(*seeds).generator,
            guidance_scale=guidance_scale,
            controlnet_conditioning_scale=list(scales) if count > 1 else scales[0],
            control_guidance_start=list(starts[:count]),
            control_guidance_end=list(ends[:count]),
            output_type="latent",
            **{"control_image" if "image" in more else "image": shown},
            **more,
        ).images

    return run


def far(ours: Latents, theirs: Any, preserving: bool = True) -> float:
    x = ours.x / math.sqrt(1 + ours.sigma**2) if preserving else ours.x
    return float((x - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("nets", NETS)
def test_text_to_image(
    nets: str, batched: bool, tiny: Model, edges: list[Image.Image], denoiser_of: Run, theirs: Run
) -> None:
    schedule, solver = tiny.sampling(4, "ddim")
    source = DiffusersNoise.seeded(3)
    start = noise(tiny, schedule, 64, 64, seeds=[3], source=source)
    pair = encode_text(tiny, "a red apple"), encode_text(tiny, "")
    ours = denoise(denoiser_of(tiny, schedule, pair, edges, batched=batched, **NETS[nets]), start, schedule, solver)
    reference = theirs("StableDiffusionControlNetPipeline", "sd", tiny, pictures=edges, **NETS[nets])
    assert far(ours, reference) < TOLERANCE
    # It is the ControlNets that make the picture, and what they are shown.
    plain = denoise(classifier_free(tiny.denoiser, *pair, 5.0), start, schedule, solver)
    other = denoise(denoiser_of(tiny, schedule, pair, edges[2:], **NETS[nets]), start, schedule, solver)
    assert min(far(plain, reference), far(other, reference)) > 20 * TOLERANCE


@pytest.mark.parametrize("nets", ["one", "two in turn"])
def test_a_picture_for_each_image(nets: str, tiny: Model, edges: list[Image.Image], denoiser_of: Run, theirs: Run) -> None:
    schedule, solver = tiny.sampling(4, "ddim")
    prompts, seeds, pictures = ["a red apple", "a castle"], (1, 2), [edges[:2], edges[2:]]
    start = noise(tiny, schedule, 64, 64, seeds=seeds, source=DiffusersNoise.seeded(*seeds))
    pair = encode_text(tiny, prompts), encode_text(tiny, "")
    ours = denoise(denoiser_of(tiny, schedule, pair, pictures, **NETS[nets]), start, schedule, solver)
    more: dict[str, Any] = {"pictures": pictures, "prompts": prompts, "seeds": seeds}
    assert far(ours, theirs("StableDiffusionControlNetPipeline", "sd", tiny, **more, **NETS[nets])) < TOLERANCE


def test_without_guidance(tiny: Model, edges: list[Image.Image], denoiser_of: Run, theirs: Run) -> None:
    schedule, solver = tiny.sampling(4, "ddim")
    start = noise(tiny, schedule, 64, 64, seeds=[3], source=DiffusersNoise.seeded(3))
    pair = encode_text(tiny, "a red apple"), encode_text(tiny, "")
    ours = denoise(denoiser_of(tiny, schedule, pair, edges, guidance_scale=1.0, **NETS["one"]), start, schedule, solver)
    reference = theirs("StableDiffusionControlNetPipeline", "sd", tiny, pictures=edges, guidance_scale=1.0, **NETS["one"])
    assert far(ours, reference) < TOLERANCE


@pytest.mark.parametrize("nets", ["one", "not at first", "two in turn"])
def test_image_to_image(
    nets: str, tiny: Model, picture: Image.Image, edges: list[Image.Image], denoiser_of: Run, theirs: Run
) -> None:
    schedule, solver = tiny.sampling(4, "ddim")
    schedule = schedule[start_step(4, 0.75, faithful=True) :]
    source = DiffusersNoise.seeded(3)
    clean = encode_image(tiny, picture, seeds=[3], source=source)
    start = add_noise(clean, schedule, unit_noise(clean, source))
    pair = encode_text(tiny, "a red apple"), encode_text(tiny, "")
    ours = denoise(denoiser_of(tiny, schedule, pair, edges[1:], **NETS[nets]), start, schedule, solver)
    more: dict[str, Any] = {"image": picture, "strength": 0.75, "pictures": edges[1:]}
    assert far(ours, theirs("StableDiffusionControlNetImg2ImgPipeline", "sd", tiny, **more, **NETS[nets])) < TOLERANCE


@pytest.mark.parametrize("nets", ["one", "two in turn"])
@pytest.mark.parametrize("channels", [4, 9])
def test_inpaint(
    channels: int,
    nets: str,
    tiny: Model,
    tiny_inpaint: Model,
    picture: Image.Image,
    mask: Image.Image,
    edges: list[Image.Image],
    denoiser_of: Run,
    theirs: Run,
) -> None:
    model = tiny if channels == 4 else tiny_inpaint
    schedule, solver = model.sampling(4, "ddim")
    source, pair = DiffusersNoise.seeded(3), (encode_text(model, "a red apple"), encode_text(model, ""))
    hooks = []
    if channels == 9:
        start = noise(model, schedule, 64, 64, seeds=[3], source=source)
        extra = inpaint_channels(model, picture, mask, seeds=[3], source=source, downsample="nearest")
        pair = with_channels(pair[0], extra), with_channels(pair[1], extra)
        denoiser = denoiser_of(model, schedule, pair, edges[1:], **NETS[nets])
    else:
        clean = encode_image(model, picture, seeds=[3], source=source)
        start = noise(model, schedule, 64, 64, seeds=[3], source=source)
        unit = start.x / (schedule.start_std or schedule.sigmas[0])
        cells, known_at = latent_mask(mask, model.space, "nearest"), known(clean, unit, schedule)
        denoiser = keeping_known(
            denoiser_of(model, schedule, pair, edges[1:], **NETS[nets]), cells, known_at, schedule.sigmas[0]
        )
        hooks = [keep_known(cells, known_at)]
    ours = denoise(denoiser, start, schedule, solver, hooks)
    more: dict[str, Any] = {"image": picture, "mask_image": mask, "strength": 1.0, "pictures": edges[1:]}
    parts = {"unet": model.unet, "vae": model.vae}
    reference = theirs("StableDiffusionControlNetInpaintPipeline", "sd", model, components=parts, **more, **NETS[nets])
    assert far(ours, reference) < TOLERANCE


@pytest.mark.parametrize("nets", ["one", "two in turn"])
@pytest.mark.parametrize("strength", [None, 0.75])
def test_sdxl(
    nets: str,
    strength: float | None,
    tiny_sdxl: Model,
    picture: Image.Image,
    edges: list[Image.Image],
    denoiser_of: Run,
    theirs: Run,
) -> None:
    model = tiny_sdxl
    schedule, solver = model.sampling(4, "euler")
    source = DiffusersNoise.seeded(3)
    pair = [with_size(model, encode_text(model, prompt), 64, 64) for prompt in ("a red apple", None)]
    more: dict[str, Any] = {}
    if strength is None:
        start = noise(model, schedule, 64, 64, seeds=[3], source=source)
    else:
        schedule = schedule[start_step(4, strength, faithful=True) :]
        clean = encode_image(model, picture, seeds=[3], source=source)
        start = add_noise(clean, schedule, unit_noise(clean, source))
        more = {"image": picture, "strength": strength}
    ours = denoise(denoiser_of(model, schedule, pair, edges[1:], **NETS[nets]), start, schedule, solver)
    name = f"StableDiffusionXLControlNet{'' if strength is None else 'Img2Img'}Pipeline"
    reference = theirs(name, "sdxl", model, pictures=edges[1:], solver="EulerDiscreteScheduler", **more, **NETS[nets])
    assert far(ours, reference, preserving=False) < TOLERANCE


def test_sdxl_stopped_early(tiny_sdxl: Model, edges: list[Image.Image], denoiser_of: Run, theirs: Run) -> None:
    """The fractions are those of the whole schedule."""
    whole, solver = tiny_sdxl.sampling(4, "euler")
    start = noise(tiny_sdxl, whole, 64, 64, seeds=[3], source=DiffusersNoise.seeded(3))
    pair = [with_size(tiny_sdxl, encode_text(tiny_sdxl, prompt), 64, 64) for prompt in ("a red apple", None)]
    part = whole[: whole.index(training_time=0.8)]
    assert len(part) == 3
    ours = denoise(denoiser_of(tiny_sdxl, whole, pair, edges, **NETS["to the middle"]), start, part, solver)
    more: dict[str, Any] = {"solver": "EulerDiscreteScheduler", "denoising_end": 0.8, "pictures": edges}
    reference = theirs("StableDiffusionXLControlNetPipeline", "sdxl", tiny_sdxl, **more, **NETS["to the middle"])
    assert far(ours, reference, preserving=False) < TOLERANCE
