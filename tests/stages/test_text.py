import warnings

import pytest
import torch
from transformers import CLIPTextModel, CLIPTokenizer
from unrolled.core.errors import BadInput, Note
from unrolled.core.loading import Model
from unrolled.stages.text import dropped_text, encode_text

LONG = " ".join(["red", "house", "wave"] * 40)
PROMPTS = ["a red house", "", "an astronaut on a leaf, at sunset"]


def tokens(model: Model, text: str) -> list[int]:
    return list(model.tokenizer(text, add_special_tokens=False).input_ids)


def by_hand(model: Model, prompts: list[str], layer: int = -1) -> torch.Tensor:
    """What diffusers' StableDiffusionPipeline.encode_prompt does."""
    ids = model.tokenizer(prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        if layer == -1:
            return model.text_encoder(ids)[0]  # type: ignore[no-any-return]
        hidden = model.text_encoder(ids, output_hidden_states=True).hidden_states[layer]
        return model.text_encoder.final_layer_norm(hidden)  # type: ignore[no-any-return]


@pytest.mark.parametrize("prompts", [*([p] for p in PROMPTS), PROMPTS])
def test_equals_transformers_called_by_hand(tiny: Model, prompts: list[str]) -> None:
    context = encode_text(tiny, prompts).context
    assert context is not None
    assert context.shape == (len(prompts), 77, 32)
    assert torch.equal(context, by_hand(tiny, prompts))


def test_one_prompt_needs_no_list(tiny: Model) -> None:
    one, listed = encode_text(tiny, "a wave").context, encode_text(tiny, ["a wave"]).context
    assert one is not None
    assert listed is not None
    assert torch.equal(one, listed)


def test_a_prompt_does_not_change_with_its_batch(tiny: Model) -> None:
    context = encode_text(tiny, PROMPTS).context
    assert context is not None
    for prompt, row in zip(PROMPTS, context, strict=True):
        torch.testing.assert_close(encode_text(tiny, prompt).context, row[None])


def test_a_negative_prompt_is_another_prompt(tiny: Model) -> None:
    negative, empty = encode_text(tiny, "blurry").context, encode_text(tiny, "").context
    assert negative is not None
    assert empty is not None
    assert not torch.allclose(negative, empty)


@pytest.mark.parametrize("skip", [0, 1, 2, 4])
def test_clip_skip_takes_an_earlier_layer(tiny: Model, skip: int) -> None:
    context = encode_text(tiny, PROMPTS, clip_skip=skip).context
    assert context is not None
    torch.testing.assert_close(context, by_hand(tiny, PROMPTS, -1 - skip))
    if skip:
        assert not torch.allclose(context, by_hand(tiny, PROMPTS))


@pytest.mark.parametrize("skip", [-1, 5, 12])
def test_clip_skip_out_of_range(tiny: Model, skip: int) -> None:
    with pytest.raises(BadInput, match=f"clip_skip goes from 0 to 4 with this text encoder, got {skip}"):
        encode_text(tiny, "a", clip_skip=skip)


def test_no_prompt_at_all(tiny: Model) -> None:
    with pytest.raises(BadInput, match="at least one prompt"):
        encode_text(tiny, [])


def test_what_is_dropped_is_reported_by_its_text(tiny: Model) -> None:
    ids = tokens(tiny, LONG)
    dropped = tiny.tokenizer.decode(ids[75:]).strip()
    assert len(dropped) > 5
    with pytest.warns(Note) as caught:
        context = encode_text(tiny, LONG).context
    assert [str(w.message) for w in caught] == [
        f"75 tokens of the prompt fit; dropped: {dropped!r} (chunks = true encodes it too)."
    ]
    assert caught[0].filename == __file__
    assert dropped_text(tiny, LONG) == dropped
    assert context is not None
    assert torch.equal(context, by_hand(tiny, [LONG]))


def test_what_fits_is_not_reported(tiny: Model) -> None:
    fits = tiny.tokenizer.decode(tokens(tiny, LONG)[:75])
    assert len(tokens(tiny, fits)) == 75
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encode_text(tiny, fits)
        encode_text(tiny, LONG, chunks=True)
    assert dropped_text(tiny, fits) == ""


def test_chunks_hold_what_is_beyond(tiny: Model) -> None:
    body = tokens(tiny, LONG)
    count = -(-len(body) // 75)
    context = encode_text(tiny, LONG, chunks=True).context
    assert context is not None
    assert context.shape == (1, 77 * count, 32)
    assert count > 1
    assert torch.equal(context[:, :77], by_hand(tiny, [LONG]))
    for i in range(1, count):
        piece = tiny.tokenizer.decode(body[75 * i : 75 * (i + 1)])
        torch.testing.assert_close(context[:, 77 * i : 77 * (i + 1)], by_hand(tiny, [piece]))


def test_chunks_of_a_short_prompt_are_one(tiny: Model) -> None:
    one, plain = encode_text(tiny, "a wave", chunks=True).context, encode_text(tiny, "a wave").context
    assert one is not None
    assert plain is not None
    assert torch.equal(one, plain)


def test_prompts_of_one_call_get_equally_many_chunks(tiny: Model) -> None:
    context = encode_text(tiny, [LONG, ""], chunks=True).context
    assert context is not None
    assert len(context) == 2
    empty = by_hand(tiny, [""])
    torch.testing.assert_close(context[1:], empty.repeat(1, context.shape[1] // 77, 1))


def test_the_encoder_says_how_many_tokens_there_are(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer_config.json without model_max_length means 10^30 to transformers."""
    monkeypatch.setattr(tiny.tokenizer, "model_max_length", int(1e30))
    context = encode_text(tiny, "a wave").context
    assert context is not None
    assert context.shape == (1, 77, 32)


def test_the_components_are_those_of_transformers(tiny: Model) -> None:
    assert isinstance(tiny.text_encoder, CLIPTextModel)
    assert isinstance(tiny.tokenizer, CLIPTokenizer)
