import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from unrolled.core.errors import NonFinite, Note
from unrolled.core.latents import Latents
from unrolled.core.loading import Model
from unrolled.stages import decode as decoding
from unrolled.stages.decode import decode, decode_tensor
from unrolled.stages.image import encode_image


def spied(monkeypatch: pytest.MonkeyPatch, owner: Any, method: str) -> list[torch.Tensor]:
    """The first argument of every call from now on."""
    seen: list[torch.Tensor] = []
    real = getattr(owner, method)

    def call(z: torch.Tensor, *args: Any, **options: Any) -> Any:
        seen.append(z)
        return real(z, *args, **options)

    monkeypatch.setattr(owner, method, call)
    return seen


def some_latents(model: Model, batch: int = 1, cells: tuple[int, int] = (8, 8)) -> Latents:
    x = torch.randn(batch, 4, *cells, generator=torch.Generator().manual_seed(0))
    return Latents(x, model.space, seeds=tuple(range(batch)))


@pytest.fixture
def in_dtype(tiny: Model, tiny_sdxl: Model) -> Callable[..., Model]:
    """A tiny model with its own copy of the VAE in another dtype."""

    def make(dtype: torch.dtype, force_upcast: bool = True, spread: float = 1.0, sdxl: bool = False) -> Model:
        model = tiny_sdxl if sdxl else tiny
        vae = torch.nn.Module.to(copy.deepcopy(model.vae), dtype)
        vae.register_to_config(force_upcast=force_upcast)
        vae.decoder.conv_in.weight.mul_(spread)
        return replace(model, vae=vae, dtype=dtype)

    return make


def pixels(pictures: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(p) for p in pictures]).astype(int)


@pytest.mark.parametrize(("batch", "cells"), [(1, (8, 8)), (3, (8, 8)), (1, (4, 12))])
def test_equals_diffusers(tiny: Model, batch: int, cells: tuple[int, int]) -> None:
    latents = some_latents(tiny, batch, cells)
    with torch.no_grad():
        image = tiny.vae.decode(latents.x / tiny.vae.config.scaling_factor, return_dict=False)[0]
    theirs = VaeImageProcessor(vae_scale_factor=8).postprocess(image, output_type="pil")
    ours = decode(tiny, latents)
    assert {p.size for p in ours} == {(8 * cells[1], 8 * cells[0])}
    assert {p.mode for p in ours} == {"RGB"}
    torch.testing.assert_close(decode_tensor(tiny, latents), image, atol=1e-5, rtol=1e-4)
    assert np.abs(pixels(ours) - pixels(theirs)).max() <= 1
    assert len(np.unique(pixels(ours))) > 20


def test_a_picture_does_not_change_with_its_batch(tiny: Model) -> None:
    latents = some_latents(tiny, 3)
    assert decode(tiny, latents)[1].tobytes() == decode(tiny, latents[1:2])[0].tobytes()


def test_the_space_is_checked_for_pictures_too(tiny: Model, picture: Image.Image) -> None:
    there_and_back = decode(tiny, encode_image(tiny, picture))
    assert there_and_back[0].size == picture.size


def local(vae: AutoencoderKL) -> AutoencoderKL:
    """Without the norms and the attention that look at the whole picture, so that tiles can agree with it."""
    vae.decoder.mid_block.attentions[0] = None
    for module in list(vae.decoder.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, torch.nn.GroupNorm):
                setattr(module, name, torch.nn.Identity())
    return vae


def test_tiles_equal_the_whole(in_dtype: Callable[..., Model], monkeypatch: pytest.MonkeyPatch) -> None:
    model = in_dtype(torch.float32)
    local(model.vae).tile_latent_min_size, model.vae.tile_sample_min_size = 32, 256
    latents, decoded = some_latents(model, cells=(48, 64)), spied(monkeypatch, model.vae.decoder, "forward")
    whole, tiles = decode_tensor(model, latents, tiled=False), decode_tensor(model, latents, tiled=True)
    shapes = [tuple(z.shape[-2:]) for z in decoded]
    assert shapes[0] == (48, 64)
    assert len(shapes) == 1 + 2 * 3
    assert max(map(max, shapes[1:])) == 32
    assert tiles.shape == whole.shape == (1, 3, 384, 512)
    assert float((tiles - whole).abs().mean()) < 0.01 * float(whole.std())
    assert model.vae.use_tiling is False


def test_tiles_are_those_of_diffusers(in_dtype: Callable[..., Model]) -> None:
    model = in_dtype(torch.float32)
    latents = some_latents(model, cells=(12, 20))
    ours, whole = decode_tensor(model, latents, tiled=True), decode_tensor(model, latents, tiled=False)
    model.vae.enable_tiling()
    with torch.no_grad():
        torch.testing.assert_close(ours, model.vae.decode(latents.unscaled, return_dict=False)[0])
    assert not torch.allclose(ours, whole)


def test_only_large_pictures_are_tiled_by_default(in_dtype: Callable[..., Model], monkeypatch: pytest.MonkeyPatch) -> None:
    model = in_dtype(torch.float32)
    monkeypatch.setattr(decoding, "TILE_FROM", 256 * 256)
    seen = spied(monkeypatch, model.vae, "tiled_decode")
    decode(model, some_latents(model, cells=(32, 32)))
    assert not seen
    decode(model, some_latents(model, cells=(32, 33)))
    assert [z.shape for z in seen] == [(1, 4, 32, 33)]


def test_tiling_of_the_callers_is_left_as_it_was(in_dtype: Callable[..., Model]) -> None:
    model = in_dtype(torch.float32)
    model.vae.enable_tiling()
    decode(model, some_latents(model))
    assert model.vae.use_tiling is True


# --- precision


@pytest.mark.parametrize(
    ("dtype", "force_upcast", "sdxl", "runs_in"),
    [
        (torch.float16, True, True, torch.float32),
        (torch.float16, False, True, torch.float16),
        (torch.float16, True, False, torch.float16),
        (torch.bfloat16, True, True, torch.bfloat16),
        (torch.float32, True, True, torch.float32),
    ],
)
def test_the_upcast_rule(
    in_dtype: Callable[..., Model],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    dtype: torch.dtype,
    force_upcast: bool,
    sdxl: bool,
    runs_in: torch.dtype,
) -> None:
    model = in_dtype(dtype, force_upcast, sdxl=sdxl)
    weights = {name: t.clone() for name, t in model.vae.state_dict().items()}
    seen = spied(monkeypatch, model.vae.decoder, "forward")
    assert decode_tensor(model, some_latents(model)).dtype == torch.float32
    assert [z.dtype for z in seen] == [runs_in]
    assert not caplog.records
    assert model.vae.dtype == dtype
    assert all(t.dtype == weights[n].dtype and torch.equal(t, weights[n]) for n, t in model.vae.state_dict().items())


def test_the_vae_is_given_back_after_a_fault(in_dtype: Callable[..., Model], monkeypatch: pytest.MonkeyPatch) -> None:
    model = in_dtype(torch.float16, sdxl=True)

    def fail(*args: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model.vae.decoder, "forward", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        decode(model, some_latents(model), tiled=True)
    assert model.vae.dtype == torch.float16
    assert model.vae.use_tiling is False


def test_overflow_in_half_precision_is_decoded_again_and_said(in_dtype: Callable[..., Model]) -> None:
    model = in_dtype(torch.float16, force_upcast=False, spread=3e4)
    latents = some_latents(model, 2)
    with torch.no_grad():
        assert not model.vae.decode(latents.unscaled[:1].half(), return_dict=False)[0].isfinite().all()
    with pytest.warns(Note) as caught:
        pictures = decode(model, latents)
    message = "The VAE gave NaN in torch.float16; the picture was decoded again in float32."
    assert {str(w.message) for w in caught} == {message}
    assert model.vae.dtype == torch.float16
    full = replace(model, vae=copy.deepcopy(model.vae).float())
    assert np.abs(pixels(pictures) - pixels(decode(full, latents))).max() <= 1


def test_not_finite_in_float32_either(in_dtype: Callable[..., Model]) -> None:
    model = in_dtype(torch.float32)
    model.vae.decoder.conv_out.bias.fill_(float("nan"))
    with pytest.raises(
        NonFinite, match=r"The VAE decoder gave NaN or infinity in float32: its weights or the latents' scale"
    ):
        decode(model, some_latents(model))
    half = replace(model, vae=copy.deepcopy(model.vae).half())
    half.vae.register_to_config(force_upcast=False)
    with pytest.raises(NonFinite, match=r"The VAE decoder gave NaN or infinity in half precision and in float32\."):
        decode(half, some_latents(half))
    half.vae.register_to_config(force_upcast=True)
    with pytest.raises(NonFinite, match="The VAE decoder gave NaN or infinity"):
        decode(half, some_latents(half))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_latents_that_are_not_finite(tiny: Model, value: float) -> None:
    latents = some_latents(tiny, 2)
    latents.x[1, 0, 0, 0] = value
    with pytest.raises(
        NonFinite, match="The latents to decode hold NaN or infinity: the fault lies in the denoising before"
    ):
        decode(tiny, latents)


def test_decoding_needs_no_more_than_the_latents_file(tiny: Model, tmp_path: Path) -> None:
    latents = some_latents(tiny)
    latents.save(tmp_path / "l.safetensors")
    assert decode(tiny, Latents.load(tmp_path / "l.safetensors"))[0].tobytes() == decode(tiny, latents)[0].tobytes()
