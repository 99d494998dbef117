"""SDXL's time ids: sizes, crops, score; what each model takes, and diffusers' own rows."""

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from unrolled.core.conditioning import Conditioning
from unrolled.core.errors import BadInput
from unrolled.core.loading import Model
from unrolled.stages.size import sizes_in_turn, with_size
from unrolled.stages.text import encode_text


@pytest.mark.parametrize(
    ("more", "ids"),
    [
        ({}, [64, 96, 0, 0, 64, 96]),
        ({"original": (1024, 768), "crop": (3, 5)}, [1024, 768, 3, 5, 64, 96]),
        ({"target": (512, 256), "aesthetic_score": 2.5}, [64, 96, 0, 0, 512, 256]),
    ],
)
@pytest.mark.parametrize("prompts", [["a"], ["a", "b"]])
def test_the_bases_six(prompts: list[str], more: dict[str, Any], ids: list[int], tiny_sdxl: Model) -> None:
    text = encode_text(tiny_sdxl, prompts)
    sized = with_size(tiny_sdxl, text, 64, 96, **more)
    assert sized.names() == {"context", "pooled", "time_ids"}
    assert sized.context is text.context
    assert sized.time_ids is not None
    assert sized.time_ids.dtype == torch.float32
    assert sized.time_ids.tolist() == [ids] * len(prompts)


@pytest.mark.parametrize(
    ("more", "ids"),
    [
        ({}, [64, 96, 0, 0, 6]),
        ({"original": (1024, 768), "crop": (3, 5), "target": (9, 9), "aesthetic_score": 2.5}, [1024, 768, 3, 5, 2.5]),
    ],
)
def test_the_refiners_five(more: dict[str, Any], ids: list[float], tiny_refiner: Model) -> None:
    sized = with_size(tiny_refiner, encode_text(tiny_refiner, "a"), 64, 96, **more)
    assert sized.time_ids is not None
    assert sized.time_ids.tolist() == [ids]


def test_only_sdxl_is_told_a_size(tiny: Model) -> None:
    with pytest.raises(BadInput, match="is not conditioned by size: only SDXL is"):
        with_size(tiny, encode_text(tiny, "a"), 64, 64)


def test_a_prompt_comes_first(tiny_sdxl: Model) -> None:
    with pytest.raises(BadInput, match="beside a pooled prompt: encode the prompt with encode_text first"):
        with_size(tiny_sdxl, Conditioning(context=torch.zeros(1, 77, 80)), 64, 64)


@pytest.mark.parametrize("refiner", [False, True])
def test_a_model_index_that_does_not_fit_the_unet(refiner: bool, tiny_sdxl: Model, tiny_refiner: Model) -> None:
    right, other = (tiny_refiner, tiny_sdxl) if refiner else (tiny_sdxl, tiny_refiner)
    wrong = replace(right, index=other.index)
    takes, given, be = (5, 6, "true") if refiner else (6, 5, "false")
    message = (
        f"The UNet of {wrong.name} takes {takes} time ids, not {given}: "
        f"requires_aesthetics_score in its model_index.json must be {be}."
    )
    with pytest.raises(BadInput, match=re.escape(message)):
        with_size(wrong, encode_text(right, "a"), 64, 64)


def test_the_unet_wants_its_time_ids(tiny_sdxl: Model) -> None:
    x = torch.zeros(1, 4, 8, 8)
    with pytest.raises(BadInput, match=r"time_ids is missing: .* with_size time_ids"):
        tiny_sdxl.denoiser(x, 1.0, 100.0, encode_text(tiny_sdxl, "a"))


@pytest.mark.parametrize(("images", "turns"), [(1, "-+"), (2, "-+-+"), (3, "-+-+-+")])
def test_sizes_in_turn(images: int, turns: str, tiny_sdxl: Model) -> None:
    """diffusers' rows are the unconditional images' and then the conditional ones'."""
    text = encode_text(tiny_sdxl, ["a", "b", "c"][:images])
    cond, uncond = with_size(tiny_sdxl, text, 64, 64), with_size(tiny_sdxl, encode_text(tiny_sdxl, None), 32, 32)
    cond, uncond = sizes_in_turn(cond, uncond, images)
    assert len(cond) == len(uncond) == images
    assert uncond.time_ids is not None
    assert cond.time_ids is not None
    assert "".join("+" if row[0] == 64 else "-" for row in [*uncond.time_ids, *cond.time_ids]) == turns
    assert torch.equal(torch.as_tensor(cond.pooled), torch.as_tensor(text.pooled))


def test_sizes_in_turn_needs_sizes(tiny_sdxl: Model) -> None:
    text = encode_text(tiny_sdxl, "a")
    with pytest.raises(BadInput, match="Time ids can take turns only where there are some: use with_size"):
        sizes_in_turn(text, with_size(tiny_sdxl, text, 64, 64), 2)
