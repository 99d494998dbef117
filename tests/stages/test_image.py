"""Pictures to latents."""

import copy
from dataclasses import replace

import pytest
import torch
from PIL import Image
from unrolled.core.errors import BadInput, NonFinite, Note
from unrolled.core.loading import Model, load
from unrolled.stages.image import encode_image
from unrolled.stages.pictures import to_tensor


def test_mode_is_the_posteriors_mean_in_the_models_scale(tiny: Model, picture: Image.Image) -> None:
    ours = encode_image(tiny, picture, posterior="mode")
    theirs = tiny.vae.encode(to_tensor(picture)).latent_dist.mean * tiny.vae.config.scaling_factor
    assert ours.is_clean
    torch.testing.assert_close(ours.x, theirs)


def test_a_sample_depends_on_the_images_own_seed_alone(tiny: Model, picture: Image.Image) -> None:
    batch = encode_image(tiny, picture, seeds=[3, 4])
    alone = encode_image(tiny, picture, seeds=[4])
    torch.testing.assert_close(batch.x[1:], alone.x)
    assert not torch.equal(batch.x[0], batch.x[1])


def test_sizes_and_counts_that_do_not_fit(tiny: Model, picture: Image.Image) -> None:
    with pytest.raises(BadInput, match="is 61x64, but sides must be multiples of 8"):
        encode_image(tiny, picture.crop((0, 0, 61, 64)))
    with pytest.raises(BadInput, match="2 pictures were given with 3 seeds"):
        encode_image(tiny, [picture, picture], seeds=[1, 2, 3])


def test_an_encoder_that_overflows_is_named(tiny_folder: str, picture: Image.Image) -> None:
    model = load(str(tiny_folder), device="cpu")
    model.vae.encoder.conv_in.weight.data.fill_(torch.nan)
    with pytest.raises(NonFinite, match=r"The VAE encoder gave NaN or infinity in float32"):
        encode_image(model, picture)


def test_an_encoder_that_overflows_in_half_precision_is_run_again_and_said(tiny_folder: str, picture: Image.Image) -> None:
    model = load(str(tiny_folder), device="cpu")
    full = encode_image(model, picture, posterior="mode").x
    half = replace(model, vae=copy.deepcopy(model.vae))
    half.vae.encoder.conv_in.weight.mul_(3e5)
    torch.nn.Module.to(half.vae, torch.float16)
    with pytest.warns(Note, match=r"The VAE gave NaN in torch\.float16; the picture was encoded again in float32"):
        x = encode_image(half, picture, posterior="mode").x
    assert half.vae.dtype == torch.float16
    assert x.isfinite().all()
    assert x.shape == full.shape
