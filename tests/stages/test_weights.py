"""Prompt weights: read as AUTOMATIC1111's web UI reads them, and applied as it applies them."""

import re
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor
from unrolled.core.conditioning import Conditioning
from unrolled.core.errors import BadInput, Note
from unrolled.core.loading import Model, load
from unrolled.core.textual_inversion import textual_inversion
from unrolled.stages.text import TokenRow, dropped_text, encode_text, token_positions, token_table
from unrolled.stages.weights import emphasised, parse_weights

LESS = 1 / 1.1
LONG = " ".join(["red", "house", "wave"] * 40)


@pytest.fixture(scope="module")
def sd(tiny_folder: Path) -> Model:
    """The tiny checkpoint with a mean to restore: a fresh layer norm's is 0, a trained one's is not."""
    model = load(str(tiny_folder), device="cpu")
    getattr(model.text_encoder, "text_model", model.text_encoder).final_layer_norm.bias.data += 0.3
    return model


# --- the syntax


@pytest.mark.parametrize(
    ("prompt", "pieces"),
    [
        ("", []),
        ("a cat", [("a cat", 1.0)]),
        ("a (cat)", [("a ", 1.0), ("cat", 1.1)]),
        ("((cat))", [("cat", 1.1 * 1.1)]),
        ("[cat]", [("cat", LESS)]),
        ("[[cat]] dog", [("cat", LESS * LESS), (" dog", 1.0)]),
        ("(cat:1.3)", [("cat", 1.3)]),
        ("(cat: .5 )", [("cat", 0.5)]),
        ("(cat:-1)(dog:+2.)", [("cat", -1.0), ("dog", 2.0)]),
        ("(a (cat:1.5) b)", [("a ", 1.1), ("cat", 1.5 * 1.1), (" b", 1.1)]),
        ("([cat])", [("cat", LESS * 1.1)]),
        ("(un)(needed)", [("unneeded", 1.1)]),
        ("(a [b) c]", [("a ", 1.1), ("b", 1.1 * LESS), (" c", LESS)]),
        ("()[] cat", [(" cat", 1.0)]),
        # escapes
        (r"\(cat\) \[dog\]", [("(cat) [dog]", 1.0)]),
        (r"(\(cat\):1.2)", [("(cat)", 1.2)]),
        (r"a\b \\(c)", [("ab \\", 1.0), ("c", 1.1)]),
        # unbalanced
        ("a (cat and [dog", [("a ", 1.0), ("cat and ", 1.1), ("dog", 1.1 * LESS)]),
        ("a) cat] :1.3)", [("a) cat] :1.3)", 1.0)]),
        # no weights
        ("cat:1.3", [("cat:1.3", 1.0)]),
        ("[cat:1.3]", [("cat:1.3", LESS)]),
        ("(cat:1.3, dog)", [("cat:1.3, dog", 1.1)]),
        ("(cat:1.2.3)", [("cat:1.2.3", 1.1)]),
        ("(cat:)", [("cat:", 1.1)]),
        ("(cat:.)", [("cat:.", 1.1)]),
        ("(cat:nan) (cat:1e3)", [("cat:nan", 1.1), (" ", 1.0), ("cat:1e3", 1.1)]),
        ("a\n(b\nc:2)", [("a\n", 1.0), ("b\nc", 2.0)]),
    ],
)
def test_every_rule(prompt: str, pieces: list[tuple[str, float]]) -> None:
    assert parse_weights(prompt) == pieces


def test_the_web_uis_own_example() -> None:
    """From the docstring of its parser."""
    assert parse_weights("a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).") == [
        ("a ", 1.0), ("house", pytest.approx(1.573)), (" ", 1.1), ("on", 1.0), (" a ", 1.1), ("hill", 0.55),
        (", sun, ", 1.1), ("sky", pytest.approx(1.4641)), (".", 1.1),
    ]  # fmt: skip


@given(st.text().filter(lambda text: not set(text) & set("()[]\\")))
def test_without_brackets_it_is_what_was_given(prompt: str) -> None:
    assert parse_weights(prompt) == ([(prompt, 1.0)] if prompt else [])


@given(st.text("ab ()[]\\:.123"))
def test_nothing_is_lost_but_marks(prompt: str) -> None:
    pieces = parse_weights(prompt)
    assert re.sub(r"[^ab]", "", "".join(text for text, _ in pieces)) == re.sub(r"[^ab]", "", prompt)
    assert all(text for text, _ in pieces)
    assert all(one[1] != other[1] for one, other in pairwise(pieces))


@given(st.text())
def test_what_is_escaped_is_what_was_given(prompt: str) -> None:
    assert parse_weights(re.sub(r"([()\[\]\\])", r"\\\1", prompt)) == ([(prompt, 1.0)] if prompt else [])


@pytest.mark.parametrize("prompt", [f"a (cat:{'9' * 400})", f"a (((cat:{'9' * 200}):{'9' * 200}))"])
def test_weights_that_are_not_finite(prompt: str, tiny: Model) -> None:
    for refuse in (lambda: parse_weights(prompt), lambda: encode_text(tiny, prompt, weights=True)):
        with pytest.raises(BadInput, match=r"^The weight of 'cat.*' is inf: give a finite one, such as 1\.3\.$"):
            refuse()


# --- the context, against the rule written once more


def by_the_rule(states: Tensor, factors: dict[int, float]) -> Tensor:
    """The web UI's: multiply, then restore the mean over one prompt's 77 states."""
    multipliers = torch.tensor([factors.get(position, 1.0) for position in range(states.shape[1])])
    before = states.mean()
    states = states * multipliers.reshape(1, -1, 1)
    return states * (before / states.mean())


def context(conditioning: Conditioning) -> Tensor:
    assert conditioning.context is not None
    return conditioning.context


def encoded(model: Model, prompt: Any, **more: Any) -> Tensor:
    return context(encode_text(model, prompt, weights=True, **more))


@pytest.mark.parametrize("skip", [0, 2])
def test_the_context_is_the_web_uis(sd: Model, skip: int) -> None:
    plain = context(encode_text(sd, "a red house, cat", clip_skip=skip))
    own = encoded(sd, "a (red house:1.5), [cat]", clip_skip=skip)
    wanted = by_the_rule(plain, {2: 1.5, 3: 1.5, 5: LESS})
    torch.testing.assert_close(own, wanted)
    torch.testing.assert_close(own.mean(), plain.mean())
    assert (own - plain).abs().max() > 0.1


@pytest.mark.parametrize("prompt", ["a cat", "", "(a cat:1)", r"a \(cat\)", LONG])
def test_weights_of_1_change_nothing(sd: Model, prompt: str) -> None:
    plain = prompt.replace("(a cat:1)", "a cat").replace("\\", "")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Note)
        assert torch.equal(encoded(sd, prompt), context(encode_text(sd, plain)))


def test_brackets_are_text_unless_told(sd: Model) -> None:
    assert not torch.equal(context(encode_text(sd, "(cat)")), encoded(sd, "(cat)"))
    assert torch.equal(context(encode_text(sd, "(cat)")), encoded(sd, r"\(cat\)"))


def test_a_prompt_does_not_change_with_its_batch(sd: Model) -> None:
    prompts = ["a (red:2) house", "", "a [cat]", "a wave"]
    for prompt, row in zip(prompts, encoded(sd, prompts), strict=True):
        torch.testing.assert_close(encoded(sd, prompt)[0], row)
    assert torch.equal(encoded(sd, prompts)[3], context(encode_text(sd, prompts))[3])


def test_both_encoders_of_sdxl_and_not_the_pooled_prompt(tiny_sdxl: Model) -> None:
    own = encode_text(tiny_sdxl, "a (cat:1.4)", prompts_2="[red] house", weights=True)
    plain = encode_text(tiny_sdxl, "a cat", prompts_2="red house")
    assert torch.equal(own.pooled, plain.pooled)  # type: ignore[arg-type]
    halves = [by_the_rule(context(plain)[..., :32], {2: 1.4}), by_the_rule(context(plain)[..., 32:], {1: LESS})]
    torch.testing.assert_close(context(own), torch.cat(halves, dim=-1))
    assert not context(encode_text(tiny_sdxl, None, weights=True)).any()


def test_the_prior_and_its_mask(tiny_prior: Any) -> None:
    with pytest.warns(Note, match="too much to be restored"):  # its layer norm is fresh
        own = encode_text(tiny_prior, "a (cat)", weights=True)
    plain = encode_text(tiny_prior, "a cat")
    assert torch.equal(own.context_mask, plain.context_mask)  # type: ignore[arg-type]
    wanted = context(plain).clone()
    wanted[:, 2] *= 1.1
    torch.testing.assert_close(context(own), wanted)


def test_learned_words(sd: Model, tmp_path: Path) -> None:
    save_file({"x": torch.randn(3, 32, generator=torch.Generator().manual_seed(0))}, tmp_path / "toy.safetensors")
    with textual_inversion(sd, "<toy>", tmp_path / "toy.safetensors"):
        plain = context(encode_text(sd, "a <toy> cat"))
        torch.testing.assert_close(encoded(sd, "a (<toy>:1.3) cat"), by_the_rule(plain, {2: 1.3, 3: 1.3, 4: 1.3}))


def test_each_chunk_has_its_own_mean(sd: Model) -> None:
    plain = context(encode_text(sd, LONG, chunks=True))
    own = encoded(sd, f"(red:1.5) {LONG[4:]}", chunks=True)
    torch.testing.assert_close(own[:, :77], by_the_rule(plain[:, :77], {1: 1.5}))
    assert torch.equal(own[:, 77:], plain[:, 77:])
    last = encoded(sd, f"{LONG[:-4]} (wave)", chunks=True)
    position = len(LONG.split()) - 75
    torch.testing.assert_close(last[:, 77:], by_the_rule(plain[:, 77:], {position: 1.1}))
    assert torch.equal(last[:, :77], plain[:, :77])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types(dtype: torch.dtype) -> None:
    states = torch.randn(2, 77, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5
    weights = torch.ones(2, 77)
    weights[1, 3] = 1.5
    own = emphasised(states.to(dtype), weights)
    assert own.dtype == dtype
    assert torch.equal(own[0], states[0].to(dtype))
    torch.testing.assert_close(own[1:].double(), by_the_rule(states[1:], {3: 1.5}), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("weights", "factor", "goes"),
    [
        ((1.0, 2.0), 1.0, "to -0.5"),
        ((1.0, 1.3), 1.0, "to 0.2"),
        ((1.0, 1.5), 1.0, "to 0"),
        ((2.0, 1.0), 1.0, "to 2"),
        ((1.0, 1.2), 1 / 0.6, ""),
        ((0.4, 0.5), 1.0, "to 0.1"),
        ((0.2, 0.2), 5.0, ""),
        ((0.1, 0.0), 1 / 0.3, ""),
    ],
)
def test_a_mean_that_cannot_be_restored_is_not(weights: tuple[float, float], factor: float, goes: str) -> None:
    given, told = torch.tensor([(3.0, -2.0), (1.0, 1.0)])[..., None], torch.tensor([weights, (1.0, 5.0)])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        own = emphasised(given, told)
    assert [str(one.message) for one in caught] == bool(goes) * [
        f"Weights change the mean of a prompt from 0.5 {goes}, too much to be restored."
    ]
    torch.testing.assert_close(own, given * told[..., None] * torch.tensor([factor, 1 / 3])[:, None, None])


def test_a_mean_of_rounding_errors_is_not_restored(tiny: Model) -> None:
    with pytest.warns(Note, match="too much to be restored"):
        own = encoded(tiny, "a (cat:1.3)")
    wanted = context(encode_text(tiny, "a cat"))
    wanted[:, 2] *= 1.3
    torch.testing.assert_close(own, wanted)


def test_weights_too_large_for_half_precision() -> None:
    message = r"^A weight of 100000 is more than torch\.float16 can hold of a context: give weights such as 1\.3\.$"
    states = torch.tensor([[[1.0, 1.0], [1.0, -1.0]]], dtype=torch.float16)
    with pytest.raises(BadInput, match=message):
        emphasised(states, torch.tensor([[1.0, 1e5]]))


# --- chunks


def table(model: Model, prompt: str, **more: bool) -> list[list[str]]:
    """The texts of a prompt's tokens by chunk."""
    rows = token_table(model, prompt, chunks=True, **more)
    return [[row.text for row in rows if row.chunk == i] for i in range(1 + max(row.chunk or 0 for row in rows))]


@pytest.mark.parametrize(("before", "cut"), [(74, 75), (60, 61), (55, 56), (54, 75)])
def test_a_chunk_ends_after_a_comma_near_its_end(tiny: Model, before: int, cut: int) -> None:
    first, second = table(tiny, " ".join([*["red"] * before, ",", *["red"] * (99 - before)]))
    assert (len(first), len(second)) == (cut, 100 - cut)
    assert (first[-1] == ",") == (cut != 75 or before == 74)


def test_a_chunk_ends_between_words(tiny: Model) -> None:
    prompt = " ".join([*["red"] * 74, "unknown", "red"])
    assert [len(chunk) for chunk in table(tiny, prompt)] == [74, 5]
    parts = [context(encode_text(tiny, part)) for part in (" ".join(["red"] * 74), "unknown red")]
    assert torch.equal(context(encode_text(tiny, prompt, chunks=True)), torch.cat(parts, dim=1))
    assert dropped_text(tiny, prompt) == "known red", "which is cut where diffusers cuts it"


def test_a_word_that_no_chunk_holds_is_cut(tiny: Model) -> None:
    assert len(table(tiny, "z" * 1000)[0]) == 75


def test_learned_words_are_not_cut(sd: Model, tmp_path: Path) -> None:
    vectors = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    save_file({"x": vectors}, tmp_path / "toy.safetensors")
    with textual_inversion(sd, "<toy>", tmp_path / "toy.safetensors"):
        prompt = " ".join([*["red"] * 73, "(<toy>:1.2)", "cat"])
        rows = token_table(sd, prompt, chunks=True, weights=True)
        assert [row.chunk for row in rows] == [0] * 73 + [1] * 4
        assert [(row.text, row.weight) for row in rows[73:]] == [("<toy>", 1.2)] * 3 + [("cat", 1.0)]
        own = encoded(sd, prompt, chunks=True)
        wanted = context(encode_text(sd, "<toy> cat"))
        torch.testing.assert_close(own[:, 77:], by_the_rule(wanted, {1: 1.2, 2: 1.2, 3: 1.2}))


def test_break_begins_a_chunk(sd: Model) -> None:
    own = encoded(sd, "a (red BREAK house:1.5) wave", chunks=True)
    parts = [encoded(sd, part) for part in ("a (red:1.5)", "(house:1.5) wave")]
    assert torch.equal(own, torch.cat(parts, dim=1))
    assert torch.equal(encoded(sd, ["a BREAK cat", "a"], chunks=True)[1, 77:], context(encode_text(sd, ""))[0])
    assert torch.equal(encoded(sd, "BREAKS", chunks=True), context(encode_text(sd, "BREAKS")))
    assert context(encode_text(sd, "a BREAK cat", chunks=True)).shape[1] == 77, "without weights it is a word"
    with pytest.warns(Note, match="dropped: 'cat'"):
        assert torch.equal(encoded(sd, "a BREAK cat"), context(encode_text(sd, "a")))


# --- where tokens are


def test_the_table_of_tokens(tiny: Model) -> None:
    assert token_table(tiny, r"a (Red:1.3) BREAK \(", chunks=True, weights=True) == [
        TokenRow("a", 0, 1, 1.0, 0, 1),
        TokenRow("Red", 3, 6, 1.3, 0, 2),
        TokenRow("(", 19, 20, 1.0, 1, 78),
    ]
    rows = token_table(tiny, LONG)
    assert [row.chunk for row in rows] == [0] * 75 + [None] * 45
    assert [row.position for row in rows] == [*range(1, 76), *[None] * 45]
    assert " ".join(row.text for row in rows) == LONG
    assert token_table(tiny, "") == []


def test_positions_are_of_the_prompt_as_written(sd: Model) -> None:
    prompt = "a ((red)) house"
    assert token_positions(sd, prompt, 10, 15, weights=True) == [3]
    assert token_positions(sd, prompt, 2, 9, weights=True) == [2]
    long = "(" + "red " * 75 + "wave)"
    with pytest.warns(Note, match=r"dropped: 'wave\)'"):
        encode_text(sd, long, weights=True)
    assert dropped_text(sd, long, weights=True) == "wave)"
