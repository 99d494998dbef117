"""What the two upscalers are conditioned by."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from unrolled.core.denoiser import UpscalerDenoiser, conditioned
from unrolled.core.errors import BadInput, SpaceMismatch
from unrolled.core.latents import Latents
from unrolled.core.loading import Model
from unrolled.core.loop import denoise
from unrolled.schedulers import EulerAncestral, Heun
from unrolled.stages.noise import noise
from unrolled.stages.pictures import to_tensor
from unrolled.stages.text import encode_text
from unrolled.stages.upscale import enlarged_size, with_latents, with_low_res


@pytest.fixture
def small(tiny_x2: Model) -> Latents:
    """Clean latents of two pictures of 64x96."""
    return Latents(torch.randn(2, 4, 12, 8, generator=torch.Generator().manual_seed(0)), tiny_x2.space, seeds=(1, 2))


class Told:
    """A UNet that notes what it is told."""

    def __init__(self, unet: Any) -> None:
        self.unet, self.config, self.dtype = unet, unet.config, unet.dtype
        self.calls: list[tuple[Tensor, dict[str, Any]]] = []

    def __call__(self, x: Tensor, timestep: Tensor, **options: Any) -> Any:
        self.calls.append((timestep, options))
        return self.unet(x, timestep, **options)


def test_sizes(tiny_x2: Model, tiny_x4: Model, tiny: Model) -> None:
    assert enlarged_size(tiny_x2, (64, 96)) == (128, 192)
    assert enlarged_size(tiny_x4, (13, 21)) == (52, 84)
    with pytest.raises(
        BadInput, match=r"What is to be enlarged is 80x64, but sides must be multiples of 32: .* 64x64 and 96x64"
    ):
        enlarged_size(tiny_x2, (64, 80))
    with pytest.raises(BadInput, match=r"What is to be enlarged is 64x32, but both sides must be 64 or more\.$"):
        enlarged_size(tiny_x2, (32, 64))
    with pytest.raises(BadInput, match=r"is not the upscaler asked for: the ×2 upscaler enlarges latents \(with_latents\)"):
        enlarged_size(tiny, (64, 64))


def test_latents_are_doubled_pixel_by_pixel(tiny_x2: Model, small: Latents) -> None:
    told = with_latents(tiny_x2, encode_text(tiny_x2, "a castle"), small)
    assert told.channels is not None
    assert torch.equal(told.channels, small.x.repeat_interleave(2, 2).repeat_interleave(2, 3))
    assert {len(getattr(told, name)) for name in told.names()} == {2}


def test_latents_of_a_schedule_that_ends_above_zero_are_taken_as_the_picture(tiny_x2: Model, small: Latents) -> None:
    text = encode_text(tiny_x2, "")
    ended = replace(small, x=small.x * math.sqrt(1 + 0.03**2), sigma=0.03, end=0.03)
    torch.testing.assert_close(with_latents(tiny_x2, text, ended).channels, with_latents(tiny_x2, text, small).channels)


def test_latents_that_do_not_fit(tiny_x2: Model, tiny_x4: Model, tiny: Model, small: Latents) -> None:
    text = encode_text(tiny_x2, "")
    with pytest.raises(BadInput, match=r"Cannot enlarge latents that still hold noise at sigma 1 "):
        with_latents(tiny_x2, text, replace(small, sigma=1.0))
    with pytest.raises(SpaceMismatch, match=r"The upscaler .* works in latent space .* but was given latents of"):
        with_latents(tiny_x2, text, replace(small, space=tiny.space))
    with pytest.raises(BadInput, match=r"is 80x64, but sides must be multiples of 32"):
        with_latents(tiny_x2, text, Latents(torch.zeros(1, 4, 8, 10), tiny_x2.space))
    with pytest.raises(BadInput, match=r"cannot condition 3 images: its batch must be 1 or 3"):
        with_latents(tiny_x2, encode_text(tiny_x2, ["a", "b", "c"]), small)
    with pytest.raises(BadInput, match="is not the upscaler asked for"):
        with_latents(tiny_x4, text, small)


@pytest.mark.parametrize("solver", [None, "dpm++2m", "heun", "euler", "euler-ancestral", "ddim", "ddpm", "pndm"])
def test_the_x2_unet_is_told_the_level_it_is_asked_at(tiny_x2: Model, small: Latents, solver: str | None) -> None:
    """Of every call, Heun's second and PLMS's too: ln(sigma) / 4, in float32; beside it level 0 and the pooled prompt."""
    unet, text, asked = Told(tiny_x2.unet), encode_text(tiny_x2, "a castle"), list[float]()
    network = conditioned(UpscalerDenoiser(unet), with_latents(tiny_x2, text, small[:1]))

    def denoiser(x: Tensor, sigma: float, timestep: float) -> Any:
        asked.append(sigma)
        return network(x, sigma, timestep)

    schedule = tiny_x2.schedule(4, solver)
    start = noise(tiny_x2, schedule, *enlarged_size(tiny_x2, small.size))
    result = denoise(denoiser, start, schedule, tiny_x2.solver(4, solver))
    assert result.is_clean
    assert len(asked) == {"heun": 7, "pndm": 5}.get(solver or "", 4)
    told = [timestep for timestep, _ in unet.calls]
    assert {(t.dtype, t.shape) for t in told} == {(torch.float32, torch.Size([]))}
    assert [float(t) for t in told] == pytest.approx([math.log(sigma) / 4 for sigma in asked], rel=1e-6)
    beside = unet.calls[0][1]["timestep_cond"]
    assert beside.shape[1] == tiny_x2.unet.config.time_cond_proj_dim == 128 + 32
    assert text.pooled is not None
    assert torch.equal(beside[0], torch.cat([torch.ones(64), torch.zeros(64), text.pooled[0]]))


def test_plms_has_nothing_to_be_faithful_to(tiny_x2: Model) -> None:
    """diffusers' PNDM refuses the x2 upscaler's prediction type."""
    assert tiny_x2.solver(4, "pndm", faithful=True) == tiny_x2.solver(4, "pndm")


@pytest.mark.parametrize("solver", [Heun(), EulerAncestral()])
def test_other_solvers_run_on_its_own_levels(tiny_x2: Model, small: Latents, solver: Any) -> None:
    schedule = tiny_x2.schedule(3)
    start = noise(tiny_x2, schedule, *enlarged_size(tiny_x2, small.size), seeds=(1, 2))
    network = conditioned(tiny_x2.denoiser, with_latents(tiny_x2, encode_text(tiny_x2, ""), small))
    assert denoise(network, start, schedule, solver).is_clean


def test_the_x2_unet_knows_nothing_of_sigma_zero(tiny_x2: Model, small: Latents) -> None:
    told = with_latents(tiny_x2, encode_text(tiny_x2, ""), small)
    with pytest.raises(BadInput, match=r"is told ln\(sigma\) and cannot be asked at sigma 0"):
        tiny_x2.denoiser(torch.zeros(2, 4, 24, 16), 0.0, 0.0, told)


@pytest.mark.parametrize(("noise_level", "share"), [(0, 1e-4), (20, 0.002699), (350, 0.3595)])
def test_low_resolution_pictures_are_noised_to_the_level(
    noise_level: int, share: float, tiny_x4: Model, picture: Image.Image
) -> None:
    """By the variance-preserving forward process; ``share`` of the variance is noise."""
    told = with_low_res(tiny_x4, encode_text(tiny_x4, ""), picture, noise_level=noise_level)
    assert told.class_labels is not None
    assert told.channels is not None
    assert told.class_labels.tolist() == [noise_level]
    assert told.class_labels.dtype == torch.int64
    noise_on_it = told.channels - math.sqrt(1 - share) * to_tensor(picture)
    assert float(noise_on_it.square().mean()) == pytest.approx(share, rel=0.05)


def test_the_noise_is_the_images_own(tiny_x4: Model, picture: Image.Image) -> None:
    """An image of a batch sees what it sees alone, and under any prompt."""

    def channels(prompt: str, *seeds: int, stream: str = "") -> Tensor:
        held = with_low_res(tiny_x4, encode_text(tiny_x4, prompt), picture, seeds=seeds, stream=stream).channels
        assert held is not None
        return held

    first, second = channels("", 1, 2)
    assert not torch.equal(first, second)
    assert torch.equal(second, channels("a castle", 2)[0])
    assert not torch.equal(second, channels("", 2, stream="another")[0])


def test_the_noise_on_the_picture_is_not_the_runs_own(tiny_x4: Model, picture: Image.Image) -> None:
    asked: list[str] = []

    def source(
        shape: Sequence[int], purpose: str, step: int = 0, draw: int = 0, levels: tuple[float, float] | None = None
    ) -> Tensor:
        asked.append(purpose)
        return torch.zeros(*shape)

    with_low_res(tiny_x4, encode_text(tiny_x4, ""), picture, source=source)
    noise(tiny_x4, tiny_x4.schedule(2), source=source)
    assert asked == ["low resolution", "latents"]


def test_several_prompts_pictures_and_seeds(tiny_x4: Model, picture: Image.Image) -> None:
    text = encode_text(tiny_x4, ["a castle", "an apple"])
    told = with_low_res(tiny_x4, text, [picture, picture.rotate(90)], seeds=(1, 2))
    assert {len(getattr(told, name)) for name in told.names()} == {2}
    with pytest.raises(BadInput, match="2 pictures were given with 3 seeds"):
        with_low_res(tiny_x4, text, [picture, picture], seeds=(1, 2, 3))
    with pytest.raises(BadInput, match="cannot condition 3 images"):
        with_low_res(tiny_x4, text, picture, seeds=(1, 2, 3))


@pytest.mark.parametrize("level", [-1, 351, 20.5])
def test_noise_levels_that_were_never_trained(level: Any, tiny_x4: Model, picture: Image.Image) -> None:
    with pytest.raises(BadInput, match=rf"is a whole number from 0 to 350, got {level}\.$"):
        with_low_res(tiny_x4, encode_text(tiny_x4, ""), picture, noise_level=level)
    lower = replace(tiny_x4, index={**tiny_x4.index, "max_noise_level": 100})
    with pytest.raises(BadInput, match="from 0 to 100, got 101"):
        with_low_res(lower, encode_text(tiny_x4, ""), picture, noise_level=101)


def test_only_the_x4_upscaler_takes_pictures(tiny_x2: Model, picture: Image.Image) -> None:
    with pytest.raises(BadInput, match=r"is not the upscaler asked for: .* the ×4 one pictures \(with_low_res\)\.$"):
        with_low_res(tiny_x2, encode_text(tiny_x2, ""), picture)
