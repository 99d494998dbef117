"""What a stage's keys make of its prompts."""

from typing import Any

import torch
from unrolled.chains.chain import TextToImage
from unrolled.chains.film.filming import _positions
from unrolled.chains.prompts import encode_prompts
from unrolled.core.loading import Model
from unrolled.stages.text import encode_text


def test_weights_are_for_the_prompt_and_the_negative_one(tiny_sdxl: Model) -> None:
    told: dict[str, Any] = {"prompt": "a (cat:1.3)", "prompt_2": "[red]", "negative_prompt": "(dog:1.2)", "clip_skip": 1}
    stage = TextToImage(**told, prompt_weights=True)
    wanted = [
        encode_text(tiny_sdxl, "a (cat:1.3)", prompts_2="[red]", clip_skip=1, weights=True),
        encode_text(tiny_sdxl, "(dog:1.2)", weights=True),
    ]
    plain = encode_prompts(tiny_sdxl, TextToImage(**told), (64, 64))
    for own, right, other in zip(encode_prompts(tiny_sdxl, stage, (64, 64)), wanted, plain, strict=True):
        assert own.context is not None
        assert torch.equal(own.context, right.context)  # type: ignore[arg-type]
        assert not torch.equal(own.context, other.context)  # type: ignore[arg-type]


def test_a_film_finds_weighted_words(tiny: Model) -> None:
    stage = TextToImage(prompt="a (red:1.3) cat BREAK cat", prompt_weights=True, chunks=True)
    assert _positions(tiny, stage, "cat") == [3, 78]
    assert _positions(tiny, stage.model_copy(update={"prompt_weights": False}), "cat")[0] > 3
