"""Kandinsky's MoVQ, which encodes without a posterior and decodes without tiles, and the sizes its UNet takes."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from PIL import Image
from unrolled.core.errors import BadInput, NonFinite, Note
from unrolled.core.loading import Model
from unrolled.stages import decode as decoding
from unrolled.stages.decode import decode, decode_tensor
from unrolled.stages.image import encode_image
from unrolled.stages.inpaint import inpaint_channels, latent_mask
from unrolled.stages.pictures import to_tensor


def test_latents_are_the_same_for_every_seed(tiny_kandinsky: Model, picture: Image.Image) -> None:
    two = encode_image(tiny_kandinsky, picture, seeds=[1, 2]).x
    torch.testing.assert_close(two[:1], two[1:])
    torch.testing.assert_close(encode_image(tiny_kandinsky, picture, posterior="mode").x, two[:1])


def test_large_pictures_are_decoded_whole(
    tiny_kandinsky: Model, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    clean = encode_image(tiny_kandinsky, picture)
    whole = decode_tensor(tiny_kandinsky, clean)
    monkeypatch.setattr(decoding, "TILE_FROM", 10)
    assert torch.equal(decode_tensor(tiny_kandinsky, clean), whole)
    assert torch.equal(decode_tensor(tiny_kandinsky, clean, tiled=False), whole)
    with pytest.raises(BadInput, match=r"^The MoVQ of .* cannot decode in tiles: leave tiled out\.$"):
        decode(tiny_kandinsky, clean, tiled=True)


def test_overflow_in_half_precision_is_decoded_again(tiny_kandinsky: Model, picture: Image.Image) -> None:
    clean = encode_image(tiny_kandinsky, picture)
    half = replace(tiny_kandinsky, vae=copy.deepcopy(tiny_kandinsky.vae).half())
    half.vae.decoder.conv_norm_out.conv_y.weight.fill_(6e4)
    with pytest.warns(Note, match=r"The VAE gave NaN in torch\.float16; the picture was decoded again in float32\."):
        again = decode_tensor(half, clean)
    assert bool(torch.isfinite(again).all())
    assert half.vae.dtype == torch.float16


def test_an_encoder_that_overflows_is_named(tiny_kandinsky: Model, picture: Image.Image) -> None:
    model = replace(tiny_kandinsky, vae=copy.deepcopy(tiny_kandinsky.vae))
    model.vae.encoder.conv_in.weight.fill_(torch.nan)
    with pytest.raises(NonFinite, match=r"The VAE encoder gave NaN or infinity in float32"):
        encode_image(model, picture)


def test_inpaint_channels_in_kandinskys_order(
    tiny_kandinsky_inpaint: Model, picture: Image.Image, mask: Image.Image
) -> None:
    channels = inpaint_channels(tiny_kandinsky_inpaint, picture, mask, seeds=[1, 2])
    assert channels.shape == (2, 5, 8, 8)
    at_hand = encode_image(tiny_kandinsky_inpaint, picture, seeds=[1, 2])
    assert torch.equal(inpaint_channels(tiny_kandinsky_inpaint, picture, mask, seeds=[1, 2], clean=at_hand), channels)
    keep = 1 - latent_mask(mask, tiny_kandinsky_inpaint.space)
    whole = tiny_kandinsky_inpaint.vae.encode(to_tensor(picture)).latents
    torch.testing.assert_close(channels[1:, :4], whole * keep)
    torch.testing.assert_close(channels[1:, 4:], keep)


def test_masks_of_other_sizes(tiny_kandinsky_inpaint: Model, picture: Image.Image, mask: Image.Image) -> None:
    small = (picture.resize((72, 64)), mask.resize((72, 64)))
    with pytest.raises(BadInput, match="The mask is 72x64, but sides must be multiples of 64: the nearest sizes are 64x64"):
        inpaint_channels(tiny_kandinsky_inpaint, *small)
