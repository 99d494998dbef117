"""Prompt-to-prompt beside attention maps that are made, replaced and applied one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from unrolled import Model, classifier_free, encode_text
from unrolled.examples.prompt_to_prompt import prompt_to_prompt


@pytest.mark.parametrize("cross", [True, False])
@pytest.mark.parametrize("self_", [True, False])
@torch.no_grad()
def test_it_is_the_sources_maps_on_the_targets_values(tiny: Model, through_maps: Any, cross: bool, self_: bool) -> None:
    cond, uncond = encode_text(tiny, ["a rose", "a tulip"]), encode_text(tiny, ["", ""])
    plain = classifier_free(tiny.denoiser, cond, uncond, 5.0)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).expand(2, -1, -1, -1)
    place = (x, 2.0, 400.0)

    def replaced(is_cross: bool, maps: Tensor, heads: int) -> Tensor:
        if cross if is_cross else self_:
            maps[-heads:] = maps[-2 * heads : -heads]
        return maps

    edited = prompt_to_prompt(plain, tiny.unet, cross_until=1.0 if cross else 3.0, self_until=1.0 if self_ else 3.0)
    ours, alone = edited(*place).out, plain(*place).out
    with through_maps(tiny.unet, replaced):
        expected = plain(*place).out
    assert (ours - expected).abs().max() < 1e-4 * expected.abs().max()
    assert torch.equal(ours[0], alone[0])
    assert torch.equal(ours[1], alone[1]) != (cross or self_)
