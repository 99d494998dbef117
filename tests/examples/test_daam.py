"""DAAM beside attention maps that are made in full, scaled up and added one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from unrolled import Conditioning, Model, classifier_free, encode_text
from unrolled.examples.daam import tokens_of, watched


@torch.no_grad()
def test_it_is_the_sum_of_the_scaled_maps(tiny: Model, through_maps: Any) -> None:
    prompt = "a castle on a hill"
    context = encode_text(tiny, prompt).context
    assert context is not None
    loud = Conditioning(context=100 * context)  # for maps with peaks, at whose feet bicubic scaling goes below 0
    denoiser = classifier_free(tiny.denoiser, loud, encode_text(tiny, ""), 5.0)
    tokens = tokens_of(tiny, prompt, "hill")
    noises = torch.randn(2, 1, 4, 8, 12, generator=torch.Generator().manual_seed(0))

    def run() -> list[Tensor]:
        return [denoiser(x, sigma, 300.0).out for x, sigma in zip(noises, (5.0, 1.0), strict=True)]

    with watched(tiny.unet, tokens, 8, 12) as heat:
        seen = run()
    assert all(torch.equal(*pair) for pair in zip(seen, run(), strict=True))

    expected: list[Tensor] = []

    def kept(cross: bool, maps: Tensor, heads: int) -> Tensor:
        if cross:
            one = maps[-heads:, :, tokens[0]].mean(0).view(1, 1, {96: 8, 24: 4}[maps.shape[1]], -1)
            expected.append(F.interpolate(one, (8, 12), mode="bicubic")[0, 0].clamp_min(0))
        return maps

    with through_maps(tiny.unet, kept):
        run()
    assert len(expected) == 2 * 4
    total = torch.stack(expected).sum(0)
    assert (heat[0] - total).abs().max() < 1e-5 * total.max()


@pytest.mark.parametrize(("word", "tokens"), [("a", [1]), ("castle", [2]), ("hill", [5])])
def test_a_words_tokens_are_found_behind_the_start_of_text(tiny: Model, word: str, tokens: list[int]) -> None:
    assert tokens_of(tiny, "a castle on a hill", word).tolist() == tokens


def test_a_word_may_be_several_tokens(tiny: Model) -> None:
    tokens = tokens_of(tiny, "a blue zyzzyva", "zyzzyva")
    assert tiny.tokenizer.decode([tiny.tokenizer("a blue zyzzyva").input_ids[i] for i in tokens]).strip() == "zyzzyva"
    assert len(tokens) > 1
