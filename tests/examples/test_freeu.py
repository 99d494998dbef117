"""FreeU beside diffusers' own."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel
from unrolled.examples.freeu import freeu


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    """Four levels, so that two up blocks are weighed and two are not, of different widths."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(8, 16, 24, 32),
        layers_per_block=2,
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
    ).eval()


@torch.no_grad()
def test_it_is_diffusers_freeu(unet: UNet2DConditionModel) -> None:
    generator = torch.Generator().manual_seed(1)
    given = (torch.randn(2, 4, 16, 16, generator=generator), 300, torch.randn(2, 5, 8, generator=generator))
    plain = unet(*given).sample
    with freeu(unet, b=(1.3, 1.6), s=(0.8, 0.1)):
        ours = unet(*given).sample
    assert torch.equal(unet(*given).sample, plain)
    unet.enable_freeu(s1=0.8, s2=0.1, b1=1.3, b2=1.6)
    theirs = unet(*given).sample
    unet.disable_freeu()
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()
    assert (ours - plain).abs().max() > 1e-2 * plain.abs().max()
