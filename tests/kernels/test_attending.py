"""Looking into attention: what an edit sees, what it changes, and that nothing of it stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from unrolled import Conditioning, Model, attending, encode_text, noise
from unrolled.core.errors import BadInput
from unrolled.kernels.attending import Attend, Place
from unrolled.kernels.fast import optimise
from unrolled.kernels.networks import set_attention


def plain(place: Place, q: Tensor, k: Tensor, v: Tensor, attend: Attend) -> Tensor:
    return attend(q, k, v)


@pytest.fixture
def predict(tiny: Model) -> Callable[[], Tensor]:
    x = noise(tiny, tiny.schedule(4), seeds=[0]).x
    cond: Conditioning = encode_text(tiny, "a red house")
    return lambda: tiny.denoiser(x, 3.0, 500.0, cond).out


def test_an_edit_that_changes_nothing_changes_nothing(tiny: Model, predict: Callable[[], Tensor]) -> None:
    before = predict()
    with torch.no_grad(), attending(tiny.unet, plain):
        assert torch.equal(predict(), before)


def test_every_layer_is_seen_once_with_its_tokens(tiny: Model, predict: Callable[[], Tensor]) -> None:
    seen: list[tuple[Place, int, int]] = []

    def look(place: Place, q: Tensor, k: Tensor, v: Tensor, attend: Attend) -> Tensor:
        seen.append((place, q.shape[1], k.shape[1]))
        assert q.shape[2:] == k.shape[2:] == v.shape[2:]
        return attend(q, k, v)

    with attending(tiny.unet, look):
        predict()
    layers = [name for name, module in tiny.unet.named_modules() if name.endswith(("attn1", "attn2"))]
    assert sorted(place.name for place, _, _ in seen) == sorted(layers)
    assert all(place.cross == place.name.endswith("attn2") for place, _, _ in seen)
    assert all((keys == 77) if place.cross else (keys == queries) for place, queries, keys in seen)


def test_what_an_edit_gives_is_what_the_layer_gives(tiny: Model, predict: Callable[[], Tensor]) -> None:
    """The definition, written out, is as torch's own; another value is not."""

    def by_hand(place: Place, q: Tensor, k: Tensor, v: Tensor, attend: Attend) -> Tensor:
        share = torch.einsum("bmhd,bnhd->bhmn", q, k).mul(q.shape[-1] ** -0.5).softmax(-1)
        return torch.einsum("bhmn,bnhd->bmhd", share, v)

    before = predict()
    with attending(tiny.unet, by_hand):
        torch.testing.assert_close(predict(), before, atol=1e-5, rtol=1e-5)
    with attending(tiny.unet, lambda place, q, k, v, attend: torch.zeros_like(q)):
        assert not torch.allclose(predict(), before, atol=1e-3)


def test_it_is_gone_afterwards_even_after_a_fault(tiny: Model, predict: Callable[[], Tensor]) -> None:
    before, processors = predict(), dict(tiny.unet.attn_processors)

    def fail(place: Place, q: Tensor, k: Tensor, v: Tensor, attend: Attend) -> Tensor:
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"), attending(tiny.unet, fail):
        predict()
    assert tiny.unet.attn_processors == processors
    assert torch.equal(predict(), before)


def test_places_can_be_chosen_and_edits_lie_in_one_another(tiny: Model, predict: Callable[[], Tensor]) -> None:
    asked: list[str] = []

    def say(word: str) -> Any:
        def edit(place: Place, q: Tensor, k: Tensor, v: Tensor, attend: Attend) -> Tensor:
            asked.append(word)
            return attend(q, k, v)

        return edit

    only = [name for name in dict(tiny.unet.named_modules()) if name.endswith("attn2")][:1]
    with attending(tiny.unet, say("outer")), attending(tiny.unet, say("inner"), lambda place: place.name in only):
        predict()
    assert asked.count("inner") == 1
    assert asked[asked.index("inner") + 1] == "outer"


def test_a_prior_and_a_decoder_of_kandinsky_are_seen_too(tiny_kandinsky: Model) -> None:
    crosses: set[bool] = set()

    def look(place: Place, q: Tensor, k: Tensor, v: Tensor, attend: Attend) -> Tensor:
        assert k.shape[1] > q.shape[1]
        crosses.add(place.cross)
        return attend(q, k, v)

    x = noise(tiny_kandinsky, tiny_kandinsky.schedule(4), seeds=[0]).x
    width = tiny_kandinsky.unet.config.encoder_hid_dim
    cond = Conditioning(image_embeds=torch.randn(1, width, generator=torch.Generator().manual_seed(0)))
    before = tiny_kandinsky.denoiser(x, 3.0, 500.0, cond).out
    with attending(tiny_kandinsky.unet, look):
        assert torch.equal(tiny_kandinsky.denoiser(x, 3.0, 500.0, cond).out, before)
    assert crosses == {True}


def test_an_optimised_network_is_seen_as_well(tiny: Model, predict: Callable[[], Tensor]) -> None:
    before = predict()
    with (
        optimise(tiny.unet),
        attending(tiny.unet, lambda place, q, k, v, attend: torch.zeros_like(q)),
        pytest.warns(UserWarning, match="attention processor"),
    ):
        assert not torch.allclose(predict(), before, atol=1e-3)


def test_an_attention_that_cannot_be_looked_into_says_so(tiny: Model, predict: Callable[[], Tensor]) -> None:
    set_attention(tiny.unet, "reference")
    try:
        with attending(tiny.unet, plain), pytest.raises(BadInput, match="AttnProcessor, which cannot be looked into: load"):
            predict()
    finally:
        set_attention(tiny.unet, "sdpa")
