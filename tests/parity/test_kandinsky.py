"""Kandinsky's decoders against diffusers' text-to-image, image-to-image and inpainting pipelines: fp32, same noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.kandinsky2_2 import pipeline_kandinsky2_2_inpainting
from PIL import Image
from torch import Tensor
from unrolled.core.conditioning import Conditioning
from unrolled.core.denoiser import UNetDenoiser
from unrolled.core.errors import BadInput
from unrolled.core.guidance import classifier_free
from unrolled.core.latents import Latents
from unrolled.core.loading import Model
from unrolled.core.loop import denoise
from unrolled.core.noise import DiffusersNoise
from unrolled.stages.decode import decode, decode_tensor
from unrolled.stages.image import encode_image
from unrolled.stages.inpaint import Downsample, inpaint_channels, keep_known, known, latent_mask, with_channels
from unrolled.stages.noise import add_noise, noise, start_step, unit_noise
from unrolled.stages.pictures import to_tensor

TOLERANCE = 1e-4
Run = Callable[..., Any]
SMALL = {"variance_type": "fixed_small"}
LEARNED = {"variance_type": "learned_range"}
CLASSES = {"ddim": "DDIMScheduler", "ddpm": "DDPMScheduler", "euler": "EulerDiscreteScheduler"}
SOLVERS: list[tuple[str, dict[str, Any]]] = [
    ("ddpm", SMALL),
    ("ddpm", LEARNED),
    ("ddpm", LEARNED | {"clip_sample": True}),
    ("ddim", {}),
    ("euler", {}),
]


@pytest.fixture(scope="session")
def embeds() -> tuple[Conditioning, Conditioning]:
    """Two embeddings to paint, and two to be guided away from."""
    pair = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    return Conditioning(image_embeds=pair[:2]), Conditioning(image_embeds=pair[2:])


@pytest.fixture(scope="session")
def theirs(tiny_kandinsky: Model, tiny_kandinsky_inpaint: Model, embeds: tuple[Conditioning, Conditioning]) -> Run:
    """diffusers' pipeline of a kind on our networks, with one or two images."""

    def run(kind: str, name: str, options: dict[str, Any], steps: int, seeds: Sequence[int] = (3,), **arguments: Any) -> Any:
        model = tiny_kandinsky_inpaint if kind == "Inpaint" else tiny_kandinsky
        # A DDIM or Euler that remembers a learned variance would be handed all 8 channels, and fail.
        config = {key: value for key, value in model.scheduler.items() if key != "variance_type"}
        scheduler = getattr(diffusers, CLASSES[name]).from_config(config | options)
        pipeline = getattr(diffusers, f"KandinskyV22{kind}Pipeline")(unet=model.unet, movq=model.vae, scheduler=scheduler)
        cond, uncond = (_first(c, len(seeds)).image_embeds for c in embeds)
        return _quiet(pipeline)(
            image_embeds=cond,
            negative_image_embeds=uncond,
            num_inference_steps=steps,
            generator=DiffusersNoise.seeded(*seeds).generator,
            **({"height": 64, "width": 64, "output_type": "latent"} | arguments),
        ).images

    return run


@pytest.fixture(scope="session")
def ours(tiny_kandinsky: Model, tiny_kandinsky_inpaint: Model, embeds: tuple[Conditioning, Conditioning]) -> Run:
    """The same by hand: text to image, image to image with a picture or latents, inpainting with a mask too."""

    def run(
        name: str,
        options: dict[str, Any],
        steps: int,
        seeds: Sequence[int] = (3,),
        *,
        size: tuple[int, int] = (64, 64),
        scale: float = 4.0,
        image: Any = None,
        strength: float = 1.0,
        mask: Image.Image | None = None,
        downsample: Downsample = "nearest-grown",
        scaled: bool = False,
        loud: bool = True,
    ) -> Latents:
        model = tiny_kandinsky_inpaint if mask else tiny_kandinsky
        source, hooks = DiffusersNoise.seeded(*seeds), []
        schedule = model.schedule(steps, name, **options)[start_step(steps, strength, faithful=True) :]
        cond, uncond = (_first(c, len(seeds)) for c in embeds)
        clean = image if image is None or isinstance(image, Latents) else encode_image(model, image, seeds=seeds)
        if clean is None or mask:
            start = noise(model, schedule, *size, seeds=seeds, source=source)
        else:
            start = add_noise(clean, schedule, unit_noise(clean, source))
        if mask:
            assert clean is not None
            cells = latent_mask(mask, model.space, downsample)
            channels = inpaint_channels(model, image, mask, seeds=seeds, downsample=downsample)
            cond, uncond = with_channels(cond, channels), with_channels(uncond, channels)
            # diffusers takes the first noise level's latents for unit noise, which with Euler they are not.
            unit = start.x if loud and name == "euler" else start.x / (schedule.start_std or 1.0)
            hooks = [keep_known(cells, known(clean, unit, schedule))]
        network = UNetDenoiser(model.unet, scale_input=scaled or name != "euler")
        denoiser = classifier_free(network, cond, uncond, scale)
        return denoise(denoiser, start, schedule, model.solver(steps, name, **options), hooks, source)

    return run


# --- text to image


@pytest.mark.parametrize(("name", "options"), SOLVERS)
@pytest.mark.parametrize("seeds", [(3,), (3, 4)])
def test_text_to_image(
    name: str, options: dict[str, Any], seeds: tuple[int, ...], ours: Run, theirs: Run, distance: Run
) -> None:
    reference = theirs("", name, options, 5, seeds)
    assert distance(ours(name, options, 5, seeds), reference, name) < TOLERANCE


@pytest.mark.parametrize(("name", "options"), SOLVERS)
def test_without_guidance_and_not_square(name: str, options: dict[str, Any], ours: Run, theirs: Run, distance: Run) -> None:
    # Without guidance diffusers cuts no variance off for the schedulers that take none, or hands it on as it is.
    reference = theirs("", name, options, 5, height=64, width=128, guidance_scale=1.0)
    out = ours(name, options, 5, size=(64, 128), scale=1.0)
    assert out.size == (64, 128)
    assert distance(out, reference, name) < TOLERANCE


def test_pixels(tiny_kandinsky: Model, ours: Run, theirs: Run) -> None:
    (reference,) = theirs("", "ddpm", LEARNED, 5, output_type="pil")
    (mine,) = decode(tiny_kandinsky, ours("ddpm", LEARNED, 5))
    assert int(np.abs(np.asarray(mine, int) - np.asarray(reference, int)).max()) <= 1


def test_input_scaling_departs(tiny_kandinsky: Model, ours: Run, theirs: Run, distance: Run) -> None:
    """diffusers never calls scale_model_input: with Euler its UNet sees a standard deviation of 25 instead of 1."""
    seen = list[float]()
    watch = tiny_kandinsky.unet.conv_in.register_forward_pre_hook(lambda _, inputs: seen.append(float(inputs[0].std())))
    try:
        reference, scaled = theirs("", "euler", {}, 5), ours("euler", {}, 5, scaled=True)
    finally:
        watch.remove()
    assert (seen[0], seen[5]) == pytest.approx((25, 1), rel=0.15)
    default = distance(scaled, reference, "euler")
    assert default == pytest.approx(0.56, rel=0.3), f"default is {default:.2e} from diffusers"


def test_a_learned_variance_that_a_solver_does_not_take(
    tiny_kandinsky: Model, embeds: tuple[Conditioning, Conditioning], ours: Run, theirs: Run, distance: Run
) -> None:
    """DDIM made of the checkpoint's own scheduler config fails in diffusers: it is handed the variance too."""
    with pytest.raises(RuntimeError, match=r"size of tensor a \(4\) must match the size of tensor b \(8\)"):
        theirs("", "ddim", LEARNED, 2)
    assert distance(ours("ddim", {}, 2), theirs("", "ddim", {}, 2), "ddim") < TOLERANCE


def test_several_images_without_guidance(
    tiny_kandinsky: Model, embeds: tuple[Conditioning, Conditioning], theirs: Run
) -> None:
    """diffusers crashes; we paint the one embedding for every seed."""
    with pytest.raises(RuntimeError):
        theirs("", "ddpm", SMALL, 2, guidance_scale=1.0, num_images_per_prompt=2)
    schedule, cond = tiny_kandinsky.schedule(2), _first(embeds[0], 1)
    two, one = (
        denoise(
            classifier_free(tiny_kandinsky.denoiser, cond, cond, 1.0),
            noise(tiny_kandinsky, schedule, seeds=seeds),
            schedule,
            tiny_kandinsky.solver(2),
        )
        for seeds in ([5, 6], [6])
    )
    assert torch.allclose(two.x[1:], one.x, atol=1e-5)


def test_sizes_are_refused_and_not_rounded_up(tiny_kandinsky: Model, theirs: Run) -> None:
    assert theirs("", "ddpm", SMALL, 2, height=72, width=64).shape == (1, 4, 16, 8)
    nearest = "sides must be multiples of 64: the nearest sizes are 64x64 and 64x128"
    with pytest.raises(BadInput, match=f"The size asked for is 64x72, but {nearest}"):
        noise(tiny_kandinsky, tiny_kandinsky.schedule(2), 72, 64)
    with pytest.raises(BadInput, match=f"The picture is 64x72, but {nearest}"):
        encode_image(tiny_kandinsky, Image.new("RGB", (64, 72)))


# --- image to image


@pytest.mark.parametrize(("name", "options"), SOLVERS)
@pytest.mark.parametrize("strength", [0.3, 0.8])
def test_image_to_image(
    name: str, options: dict[str, Any], strength: float, picture: Image.Image, ours: Run, theirs: Run, distance: Run
) -> None:
    reference = theirs("Img2Img", name, options, 10, image=picture, strength=strength)
    assert distance(ours(name, options, 10, image=picture, strength=strength), reference, name) < TOLERANCE


def test_image_to_image_of_two(picture: Image.Image, ours: Run, theirs: Run, distance: Run) -> None:
    two = [picture, picture.rotate(90)]
    reference = theirs("Img2Img", "ddpm", LEARNED, 5, (3, 4), image=two, strength=0.6)
    assert distance(ours("ddpm", LEARNED, 5, (3, 4), image=two, strength=0.6), reference, "ddpm") < TOLERANCE


def test_image_to_image_keeps_height_and_width(picture: Image.Image, ours: Run, theirs: Run, distance: Run) -> None:
    """diffusers swaps them while it prepares the picture: a wide one comes out high, squeezed."""
    wide = picture.resize((128, 64))
    reference = theirs("Img2Img", "ddpm", SMALL, 5, image=wide, width=128, height=64, strength=0.6)
    assert reference.shape == (1, 4, 16, 8)
    out = ours("ddpm", SMALL, 5, image=wide, strength=0.6)
    assert out.size == (64, 128)
    # With the two of them swapped back by hand it is the same run.
    reference = theirs("Img2Img", "ddpm", SMALL, 5, image=wide, width=64, height=128, strength=0.6)
    assert distance(out, reference, "ddpm") < TOLERANCE


def test_image_to_image_of_latents(tiny_kandinsky: Model, picture: Image.Image, ours: Run, theirs: Run) -> None:
    """Ours starts from them without decoding; diffusers says that it does, and crashes."""
    clean = encode_image(tiny_kandinsky, picture)
    with pytest.raises(RuntimeError):
        theirs("Img2Img", "ddpm", SMALL, 5, image=clean.x, strength=0.6)
    assert torch.equal(
        ours("ddpm", SMALL, 5, image=clean, strength=0.6).x, ours("ddpm", SMALL, 5, image=picture, strength=0.6).x
    )


# --- the MoVQ


def test_movq(tiny_kandinsky: Model, picture: Image.Image) -> None:
    movq, clean = tiny_kandinsky.vae, encode_image(tiny_kandinsky, [picture, picture.rotate(90)], seeds=[1, 2])
    with torch.no_grad():
        codes = movq.encode(to_tensor([picture, picture.rotate(90)])).latents
        pixels = movq.decode(codes, force_not_quantize=True).sample
        quantized = movq.decode(codes).sample
    assert _apart(clean.x, codes) < TOLERANCE
    assert _apart(decode_tensor(tiny_kandinsky, clean), pixels) < TOLERANCE
    assert _apart(pixels, quantized) > 0.1


# --- inpainting


@pytest.mark.parametrize(("name", "options"), SOLVERS)
def test_inpainting(
    name: str, options: dict[str, Any], picture: Image.Image, mask: Image.Image, ours: Run, theirs: Run, distance: Run
) -> None:
    reference = theirs("Inpaint", name, options, 5, image=picture, mask_image=mask)
    assert distance(ours(name, options, 5, image=picture, mask=mask), reference, name) < TOLERANCE


@pytest.mark.parametrize("seeds", [(3,), (3, 4)])
def test_inpainting_not_square_and_several(
    seeds: tuple[int, ...], picture: Image.Image, mask: Image.Image, ours: Run, theirs: Run, distance: Run
) -> None:
    wide, strip = picture.resize((128, 64)), mask.resize((128, 64), Image.Resampling.NEAREST)
    several = {"num_images_per_prompt": 1, "image": [wide] * len(seeds), "mask_image": [strip] * len(seeds)}
    reference = theirs("Inpaint", "ddpm", LEARNED, 5, seeds, height=64, width=128, **several)
    out = ours("ddpm", LEARNED, 5, seeds, size=(64, 128), image=wide, mask=strip)
    assert distance(out, reference, "ddpm") < TOLERANCE


def test_the_mask_departs(picture: Image.Image, mask: Image.Image, ours: Run, theirs: Run, distance: Run) -> None:
    """diffusers looks at one pixel of a cell, and then grows what is repainted by a cell; ours repaints what is white."""
    reference = theirs("Inpaint", "ddpm", SMALL, 5, image=picture, mask_image=mask)
    default = distance(ours("ddpm", SMALL, 5, image=picture, mask=mask, downsample="max"), reference, "ddpm")
    assert default == pytest.approx(0.92, rel=0.3), f"default is {default:.2e} from diffusers"


def test_a_grown_mask_is_diffusers(tiny_kandinsky: Model) -> None:
    white = Image.fromarray((np.random.default_rng(0).random((128, 192)) < 0.15).astype(np.uint8) * 255)
    corners = latent_mask(white, tiny_kandinsky.space, "nearest")
    kept = pipeline_kandinsky2_2_inpainting.prepare_mask(1 - corners)
    assert 0 < kept.mean() < 0.9
    assert torch.equal(latent_mask(white, tiny_kandinsky.space, "nearest-grown"), 1 - kept)


def test_each_picture_keeps_its_own(
    tiny_kandinsky_inpaint: Model, picture: Image.Image, mask: Image.Image, ours: Run, theirs: Run, distance: Run
) -> None:
    """diffusers puts the first picture's kept part into all."""
    two = [picture, picture.rotate(90)]
    reference = theirs("Inpaint", "ddpm", SMALL, 5, (3, 4), image=two, mask_image=[mask, mask])
    out = ours("ddpm", SMALL, 5, (3, 4), image=two, mask=mask)
    keep = 1 - latent_mask(mask, tiny_kandinsky_inpaint.space, "nearest-grown")
    clean = encode_image(tiny_kandinsky_inpaint, two, seeds=[3, 4]).x
    assert torch.allclose(out.x * keep, clean * keep, atol=1e-5)
    assert torch.allclose(reference * keep, clean[:1] * keep, atol=1e-5)
    default = distance(out, reference, "ddpm")
    assert default == pytest.approx(0.0125, rel=0.3), f"default is {default:.2e} from diffusers"


def test_the_kept_parts_noise_departs(
    picture: Image.Image, mask: Image.Image, ours: Run, theirs: Run, distance: Run
) -> None:
    """diffusers puts the kept part back with noise 25 times as loud as Euler's sigma says: it clones its scaled latents."""
    reference = theirs("Inpaint", "euler", {}, 5, image=picture, mask_image=mask)
    default = distance(ours("euler", {}, 5, image=picture, mask=mask, loud=False), reference, "euler")
    assert default == pytest.approx(0.084, rel=0.3), f"default is {default:.2e} from diffusers"


def _apart(ours: Tensor | None, theirs: Tensor) -> float:
    assert ours is not None
    return float((ours - theirs).abs().max() / theirs.abs().max())


def _first(conditioning: Conditioning, count: int) -> Conditioning:
    assert conditioning.image_embeds is not None
    return Conditioning(image_embeds=conditioning.image_embeds[:count])


def _quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
