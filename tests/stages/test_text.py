import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
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


# SDXL: two encoders side by side, and the second's pooled prompt; judged by diffusers' own encode_prompt.


@pytest.fixture(scope="module")
def encode_prompt(tiny_sdxl_folder: Path, tiny_refiner_folder: Path) -> Any:
    """diffusers' context, negative context, pooled and negative pooled prompt, of the base or the refiner."""
    base = diffusers.StableDiffusionXLPipeline.from_pretrained(tiny_sdxl_folder, use_safetensors=True)
    refiner = diffusers.StableDiffusionXLImg2ImgPipeline.from_pretrained(tiny_refiner_folder, use_safetensors=True)

    def encode(prompts: list[str], *, of_refiner: bool = False, **more: Any) -> list[torch.Tensor]:
        with torch.no_grad():
            return list((refiner if of_refiner else base).encode_prompt(prompts, **more))

    return encode


def both(model: Model, *prompts: Any, **more: Any) -> tuple[torch.Tensor, torch.Tensor]:
    conditioning = encode_text(model, *prompts, **more)
    assert conditioning.names() == {"context", "pooled"}
    assert conditioning.context is not None
    assert conditioning.pooled is not None
    return conditioning.context, conditioning.pooled


@pytest.mark.parametrize("more", [{}, {"clip_skip": 1}, {"clip_skip": 3}, {"prompts_2": ["blue", "a wave, at night", ""]}])
def test_sdxl_equals_diffusers(more: dict[str, Any], tiny_sdxl: Model, encode_prompt: Any) -> None:
    context, pooled = both(tiny_sdxl, PROMPTS, **more)
    theirs = encode_prompt(PROMPTS, **{("prompt_2" if key == "prompts_2" else key): v for key, v in more.items()})
    assert (context.shape, pooled.shape) == ((3, 77, 32 + 48), (3, 40))
    assert torch.equal(context, theirs[0])
    assert torch.equal(pooled, theirs[2])
    if more:
        assert not torch.allclose(context, both(tiny_sdxl, PROMPTS)[0], atol=0.1)


def test_the_second_prompt_is_the_second_encoders(tiny_sdxl: Model) -> None:
    context, pooled = both(tiny_sdxl, "a wave", prompts_2="a red house")
    assert torch.equal(context[:, :, :32], both(tiny_sdxl, "a wave")[0][:, :, :32])
    assert torch.equal(context[:, :, 32:], both(tiny_sdxl, "a red house")[0][:, :, 32:])
    assert torch.equal(pooled, both(tiny_sdxl, "a red house")[1])


def test_diffusers_takes_an_empty_second_prompt_for_none(tiny_sdxl: Model, encode_prompt: Any) -> None:
    """``prompt_2 or prompt``; here what is given is told."""
    theirs = encode_prompt(["a wave"], prompt_2="")[0]
    assert torch.equal(theirs, both(tiny_sdxl, "a wave")[0])
    assert (theirs - both(tiny_sdxl, "a wave", prompts_2="")[0]).abs().max() > 0.5


@pytest.mark.parametrize("clip_skip", [0, 2])
def test_negative_prompts_of_sdxl_equal_diffusers(clip_skip: int, tiny_sdxl: Model, encode_prompt: Any) -> None:
    """diffusers leaves out no layer of the negative prompt, whatever clip_skip is: here each call says its own."""
    theirs = encode_prompt(["a wave"], negative_prompt=["red"], negative_prompt_2=["a leaf"], clip_skip=clip_skip)
    context, pooled = both(tiny_sdxl, "red", prompts_2="a leaf")
    assert torch.equal(context, theirs[1])
    assert torch.equal(pooled, theirs[3])


def test_no_prompt_is_zeros_and_the_empty_prompt_is_not(tiny_sdxl: Model, encode_prompt: Any) -> None:
    for given, ours in ((None, None), ("", "")):
        theirs = encode_prompt(["a wave"], negative_prompt=given)
        context, pooled = both(tiny_sdxl, ours)
        assert torch.equal(context, theirs[1])
        assert torch.equal(pooled, theirs[3])
        assert bool(context.any()) == bool(pooled.any()) == (given is not None)


def test_no_prompt_is_the_empty_one_where_the_checkpoint_says_so(
    tiny: Model, tiny_sdxl: Model, tiny_refiner: Model, encode_prompt: Any
) -> None:
    theirs = encode_prompt(["a wave"], of_refiner=True, negative_prompt=None)
    assert torch.equal(both(tiny_refiner, None)[0], theirs[1])
    assert torch.equal(both(tiny_refiner, None)[1], theirs[3])
    for model in (tiny, tiny_refiner):
        none, empty = encode_text(model, None).context, encode_text(model, "").context
        assert none is not None
        assert empty is not None
        assert torch.equal(none, empty)
    # Without a model_index.json to say so diffusers takes zeros.
    assert not both(replace(tiny_sdxl, index={}), None)[0].any()


def test_the_refiner_has_the_second_encoder_alone(tiny_sdxl: Model, tiny_refiner: Model, encode_prompt: Any) -> None:
    theirs = encode_prompt(PROMPTS, of_refiner=True)
    context, pooled = both(tiny_refiner, PROMPTS)
    assert torch.equal(context, theirs[0])
    assert torch.equal(pooled, theirs[2])
    assert torch.equal(context, both(tiny_sdxl, PROMPTS)[0][:, :, 32:])


@pytest.mark.parametrize("prompts", [LONG, [LONG, "a wave"]])
def test_chunks_of_sdxl(prompts: Any, tiny_sdxl: Model, encode_prompt: Any) -> None:
    context, pooled = both(tiny_sdxl, prompts, chunks=True)
    first = [LONG] if prompts == LONG else prompts
    theirs = encode_prompt(first)
    assert context.shape[1] == 77 * -(-len(tokens(tiny_sdxl, LONG)) // 75)
    assert torch.equal(context[:, :77], theirs[0])
    assert torch.equal(pooled, theirs[2])
    second = tiny_sdxl.tokenizer.decode(tokens(tiny_sdxl, LONG)[75:150])
    torch.testing.assert_close(context[:1, 77:154], both(tiny_sdxl, second)[0])


def test_either_prompt_can_make_the_chunks(tiny_sdxl: Model) -> None:
    assert both(tiny_sdxl, "a wave", prompts_2=LONG, chunks=True)[0].shape == both(tiny_sdxl, LONG, chunks=True)[0].shape


@pytest.mark.parametrize("second", [None, LONG, "a wave " + LONG])
def test_what_sdxl_drops_is_said_once_for_each_text(second: str | None, tiny_sdxl: Model) -> None:
    with pytest.warns(Note) as caught:
        encode_text(tiny_sdxl, LONG, prompts_2=second)
    lost = dict.fromkeys(dropped_text(tiny_sdxl, prompt) for prompt in (LONG, second or LONG))
    assert len(lost) == (2 if second and second != LONG else 1)
    assert [str(w.message) for w in caught] == [
        f"75 tokens of the prompt fit; dropped: {text!r} (chunks = true encodes it too)." for text in lost
    ]


@pytest.mark.parametrize("skip", [-1, 4])
def test_clip_skip_out_of_range_of_sdxl(skip: int, tiny_sdxl: Model) -> None:
    with pytest.raises(BadInput, match=f"clip_skip goes from 0 to 3 with this text encoder, got {skip}"):
        encode_text(tiny_sdxl, "a", clip_skip=skip)


@pytest.mark.parametrize(
    ("prompts", "second", "message"),
    [
        (["a", "b"], ["a"], "at least one prompt, and as many for a second encoder"),
        (["a", "b"], "a", "as many for a second encoder"),
        ([], [], "at least one prompt"),
        (None, "a", 'A second prompt was given without a first: the empty prompt is ""'),
    ],
)
def test_prompts_that_do_not_match(prompts: Any, second: Any, message: str, tiny_sdxl: Model) -> None:
    with pytest.raises(BadInput, match=message):
        encode_text(tiny_sdxl, prompts, prompts_2=second)


def test_a_second_prompt_needs_a_second_encoder(tiny: Model, tiny_refiner: Model) -> None:
    """diffusers ignores it."""
    for model in (tiny, tiny_refiner):
        with pytest.raises(BadInput, match="has one text encoder: leave out the second prompt"):
            encode_text(model, "a", prompts_2="a")


def test_a_model_without_text_encoders(tiny: Model) -> None:
    with pytest.raises(BadInput, match="takes no text: Kandinsky's decoders take image embeddings"):
        encode_text(replace(tiny, text_encoder=None, tokenizer=None), "a")
