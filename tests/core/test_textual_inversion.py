"""Words of one's own in prompts: found, encoded, forgotten again; what is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from unrolled.core.errors import BadInput, BadModel
from unrolled.core.loading import Model, Shelf
from unrolled.core.textual_inversion import textual_inversion
from unrolled.stages.text import dropped_text, encode_text, token_positions


def vector(model: Model, word: str, part: str = "text_encoder") -> Tensor:
    """What an encoder knows of a word of one token, as a row."""
    tokenizer, encoder = getattr(model, part.replace("text_encoder", "tokenizer")), getattr(model, part)
    (token,) = tokenizer(word, add_special_tokens=False).input_ids
    found: Tensor = encoder.get_input_embeddings().weight[token][None]
    return found.clone()


def same(model: Model, one: str, other: str) -> bool:
    """Whether a model's encoders make the same of two prompts."""
    a, b = encode_text(model, one), encode_text(model, other)
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in a.names())


@pytest.fixture
def cat(tiny: Model, tmp_path: Path) -> Path:
    """A file that says what "cat" says."""
    save_file({"emb_params": vector(tiny, "cat")}, tmp_path / "cat.safetensors")
    return tmp_path / "cat.safetensors"


@pytest.mark.parametrize(
    ("prompt", "means"),
    [
        ("a photo of <toy>, red", "a photo of cat, red"),
        ("<toy>", "cat"),
        ("<TOY> and <toy><toy>", "cat and cat cat"),
        ("<toy", "<toy"),
        ("", ""),
    ],
)
def test_a_word_stands_for_its_vector(tiny: Model, cat: Path, prompt: str, means: str) -> None:
    with textual_inversion(tiny, "<toy>", cat):
        assert same(tiny, prompt, means)


def test_a_word_without_marks_is_no_part_of_another(tiny: Model, cat: Path) -> None:
    wanted = encode_text(tiny, "a cat, toys").context
    with textual_inversion(tiny, "toy", cat):
        assert torch.equal(encode_text(tiny, "a Toy, toys").context, wanted)  # type: ignore[arg-type]
    assert not same(tiny, "a Toy, toys", "a cat, toys")


def test_several_vectors_and_words_the_longest_first(tiny: Model, cat: Path, tmp_path: Path) -> None:
    save_file({"x": torch.cat([vector(tiny, "red"), vector(tiny, "dog")])}, tmp_path / "dog.safetensors")
    with textual_inversion(tiny, "my", cat), textual_inversion(tiny, "my dog", tmp_path / "dog.safetensors"):
        assert same(tiny, "my dog and my house", "red dog and cat house")
    with textual_inversion(tiny, "my", cat):
        assert same(tiny, "my dog", "cat dog")


def test_both_encoders_of_sdxl(tiny_sdxl: Model, tiny_refiner: Model, tmp_path: Path) -> None:
    file = tmp_path / "cat.safetensors"
    clip_l, clip_g = (vector(tiny_sdxl, "cat", part) for part in ("text_encoder", "text_encoder_2"))
    save_file({"clip_g": clip_g, "clip_l": clip_l}, file)
    for model in (tiny_sdxl, tiny_refiner):
        with textual_inversion(model, "<toy>", file):
            assert same(model, "a <toy>", "a cat")


def test_pooled_where_clip_ends(tiny_sdxl: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Published configs say ``eos_token_id = 2``, and CLIP then pools at the largest id, which a word must not have."""
    file = tmp_path / "cat.safetensors"
    parts = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}
    save_file({key: vector(tiny_sdxl, "cat", part) for key, part in parts.items()}, file)
    monkeypatch.setattr(tiny_sdxl.text_encoder_2.text_model, "eos_token_id", 2)
    with textual_inversion(tiny_sdxl, "<toy>", file):
        assert same(tiny_sdxl, "a <toy> here", "a cat here")


@pytest.mark.parametrize("layout", ["diffusers", "diffusers-1d", "web-ui", "diffusers.bin", "web-ui.pt"])
def test_every_layout(tiny: Model, tmp_path: Path, layout: str) -> None:
    rows = vector(tiny, "cat")
    if "." not in layout:
        file = tmp_path / "a.safetensors"
        save_file({"emb_params" if layout == "web-ui" else "<its-own>": rows[0] if layout.endswith("1d") else rows}, file)
    else:
        file = tmp_path / f"a.{layout.partition('.')[2]}"
        webui = {
            "string_to_token": {"*": 265},
            "string_to_param": {"*": rows},
            "name": "a",
            "step": 10,
            "sd_checkpoint": None,
        }
        torch.save(webui if "web" in layout else {"<its-own>": rows}, file)
        with pytest.raises(BadModel, match="is pickled, which can run code"), textual_inversion(tiny, "<toy>", file):
            pass
    with textual_inversion(tiny, "<toy>", file, allow_pickle="." in layout):
        assert same(tiny, "a <toy>", "a cat")


@pytest.mark.parametrize("offload", ["resident", "model", "layer"])
def test_wherever_the_encoders_live(tiny_folder: Path, cat: Path, offload: Any) -> None:
    model = Shelf(device="cpu", offload=offload).load(str(tiny_folder))
    with textual_inversion(model, "<toy>", cat):
        assert same(model, "a <toy>", "a cat")


def test_forgotten_again(tiny: Model, cat: Path) -> None:
    before, embedding = encode_text(tiny, "a <toy>").context, tiny.text_encoder.get_input_embeddings()
    count = len(tiny.tokenizer)
    with pytest.raises(KeyboardInterrupt), textual_inversion(tiny, "<toy>", cat):
        raise KeyboardInterrupt
    with textual_inversion(tiny, "<toy>", cat), textual_inversion(tiny, "<other>", cat):
        pass
    assert tiny.text_encoder.get_input_embeddings() is embedding
    assert type(embedding) is nn.Embedding
    assert len(tiny.tokenizer) == count
    assert torch.equal(encode_text(tiny, "a <toy>").context, before)  # type: ignore[arg-type]


def test_what_is_dropped_and_where_tokens_lie(tiny: Model, tmp_path: Path) -> None:
    save_file({"x": torch.zeros(40, 32)}, tmp_path / "long.safetensors")
    with textual_inversion(tiny, "<toy>", tmp_path / "long.safetensors"):
        assert dropped_text(tiny, "a <Toy> red") == ""
        assert dropped_text(tiny, "a <Toy> red <toy> Cat") == "<toy> Cat"
        prompt = "a <toy> red"
        assert token_positions(tiny, prompt, 2, 7) == list(range(2, 42))
        assert token_positions(tiny, prompt, 8, 11) == [42]
        twice = encode_text(tiny, "a <toy> red <toy> cat", chunks=True).context
        assert twice is not None
        assert twice.shape[1] == 2 * 77


# --- what is refused


def refused(model: Any, word: str, file: Path, says: str, kind: type[Exception] = BadModel) -> None:
    with pytest.raises(kind, match=f"^{re.escape(says)}$"), textual_inversion(model, word, file):
        pass
    assert not hasattr(model, "text_encoder") or type(model.text_encoder.get_input_embeddings()) is nn.Embedding


def test_files_for_other_encoders(tiny: Model, tiny_sdxl: Model, cat: Path, tmp_path: Path) -> None:
    says = f"{cat} does not fit {tiny_sdxl.name}: its vectors are 32 wide, and those of its prompts 32 and 48."
    refused(tiny_sdxl, "<toy>", cat, says)
    file = tmp_path / "xl.safetensors"
    save_file({"clip_l": torch.zeros(2, 768), "clip_g": torch.zeros(2, 1280)}, file)
    refused(
        tiny, "<toy>", file, f"{file} does not fit {tiny.name}: its vectors are 1280, 768 wide, and those of its prompts 32."
    )
    for shape in [(0, 32), (1, 1, 32), (2, 31)]:
        save_file({"x": torch.zeros(shape)}, file)
        says = f"{file} does not fit {tiny.name}: its vectors are {shape[-1]} wide, and those of its prompts 32."
        refused(tiny, "<toy>", file, says)


def test_other_files(tiny: Model, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    refused(tiny, "<toy>", file, f"There is no file {file}: give the path of a textual inversion.")
    save_file({"a.weight": torch.zeros(2), "b.weight": torch.zeros(2)}, file)
    refused(tiny, "<toy>", file, f"{file} is no textual inversion: it holds 2 tensors, a.weight to begin with.")


def test_words_and_models(tiny: Model, tiny_kandinsky: Model, cat: Path) -> None:
    refused(tiny, " ", cat, f"The word for {cat} is empty: give what stands for it in the prompt.", BadInput)
    says = f"{tiny_kandinsky.name} takes no text, so it can be taught no word: Kandinsky's prompts go through its prior."
    with pytest.raises(BadInput, match=re.escape(says)), textual_inversion(tiny_kandinsky, "<toy>", cat):
        pass
    says = f"'<TOY>' stands for another file already: give {cat} another word."
    with textual_inversion(tiny, "<toy>", cat), pytest.raises(BadInput, match=re.escape(says)):  # noqa: SIM117
        with textual_inversion(tiny, "<TOY>", cat):
            pass
    assert type(tiny.text_encoder.get_input_embeddings()) is nn.Embedding
