"""DeepCache beside the shallow part of the UNet, called block by block."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from unrolled import Model, conditioned, encode_text, load
from unrolled.examples.deepcache import deepcache


def shallow(model: Model, x: Tensor, sigma: float, timestep: float, deep: Tensor) -> Tensor:
    """The UNet's output where all that the last up block takes from below is ``deep``."""
    unet, context = model.unet, encode_text(model, "a castle").context
    inside = unet.conv_in(x / (1 + sigma**2) ** 0.5)
    time = unet.time_embedding(unet.time_proj(torch.tensor([timestep])))
    _, skips = unet.down_blocks[0](inside, time)
    last = unet.up_blocks[-1]
    out = last(deep, (inside, *skips)[: len(last.resnets)], time, encoder_hidden_states=context)
    result: Tensor = unet.conv_out(unet.conv_act(unet.conv_norm_out(out)))
    return result


@torch.no_grad()
def test_a_shallow_evaluation_is_its_blocks_on_what_was_kept(tiny: Model) -> None:
    plain = conditioned(tiny.denoiser, encode_text(tiny, "a castle"))
    cached = deepcache(plain, tiny.unet, whole={4.0, 1.0})
    x, y = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    kept: list[Tensor] = []
    with tiny.unet.up_blocks[-2].register_forward_hook(lambda block, inputs, out: kept.append(out)):
        assert torch.equal(cached(x, 4.0, 600.0).out, plain(x, 4.0, 600.0).out)
    ours, expected = cached(y, 2.0, 400.0).out, shallow(tiny, y, 2.0, 400.0, kept[0])
    assert (ours - expected).abs().max() < 1e-5 * expected.abs().max()
    assert not torch.allclose(ours, plain(y, 2.0, 400.0).out)
    assert torch.equal(cached(y, 1.0, 200.0).out, plain(y, 1.0, 200.0).out)  # anew, and nothing is left in the UNet


@torch.no_grad()
def test_the_share_of_operations_that_its_description_states() -> None:
    model = load("sd-1.5", device="cpu")
    cached = deepcache(conditioned(model.denoiser, encode_text(model, "a castle")), model.unet, whole={4.0})
    flops = []
    for sigma in (4.0, 2.0):
        with FlopCounterMode(display=False) as counter:
            cached(torch.zeros(1, 4, 16, 16), sigma, 500.0)
        flops.append(counter.get_total_flops())
    assert round(flops[1] / flops[0], 2) == 0.39
