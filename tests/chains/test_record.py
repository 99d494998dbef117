"""Pictures carry what made them, in a form other tools read."""

import io
import json

import pytest
import torch
from PIL import Image
from sd_parsers import ParserManager
from unrolled.chains.chain import Chain, ImageToImage, TextToImage
from unrolled.chains.outputs import Output, Result
from unrolled.chains.record import Machine, encode, manifest, parameters
from unrolled.core.loading import Model


def test_parameters_text() -> None:
    stage = ImageToImage(
        model="m", prompt="a castle, 8k", negative_prompt="blurry", steps=12, solver="dpm++2m", strength=0.5,
        scheduler={"use_karras_sigmas": True}, guidance_scale=6.5, image="x.png",
    )  # fmt: skip
    text = parameters(Chain(stages=(stage,)), 7, (64, 48))
    first, second, third = text.splitlines()
    assert (first, second) == ("a castle, 8k", "Negative prompt: blurry")
    assert third.startswith("Steps: 12, Sampler: DPM++ 2M Karras, CFG scale: 6.5, Seed: 7, Size: 64x48, Model: m, ")
    assert "Denoising strength: 0.5" in third


@pytest.mark.parametrize(
    ("said", "sampler"),
    [
        ({"solver": "dpm++2m-sde", "spacing": "karras"}, "DPM++ 2M SDE Karras"),
        ({"solver": "unipc", "scheduler": {"use_exponential_sigmas": True}}, "UniPC Exponential"),
        ({"solver": "tcd"}, "tcd"),
    ],
)
def test_the_sampler_is_called_as_in_the_web_ui(said: dict[str, object], sampler: str) -> None:
    text = parameters(Chain(stages=(TextToImage.model_validate(said),)), 0, (8, 8))
    assert f"Sampler: {sampler}, " in text


def test_values_with_commas_are_quoted() -> None:
    text = parameters(Chain(stages=(TextToImage(model="a, b"),)), 0, (8, 8))
    assert 'Model: "a, b"' in text


@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
def test_an_independent_reader_finds_them(ending: str) -> None:
    stage = TextToImage(model="m", prompt="ein Schloß", negative_prompt="blurry", steps=9, solver="euler")
    text = parameters(Chain(stages=(stage,)), 3, (64, 64))
    data = encode(Image.new("RGB", (64, 64)), ending, text, {"some": "facts"})
    found = ParserManager().parse(io.BytesIO(data))
    assert found is not None
    assert [prompt.value for prompt in found.prompts] == ["ein Schloß"]
    assert [prompt.value for prompt in found.negative_prompts] == ["blurry"]
    (sampler,) = found.samplers
    assert (sampler.name, sampler.parameters["seed"], sampler.parameters["steps"]) == ("Euler", "3", "9")


def test_png_holds_the_manifest(tiny: Model) -> None:
    chain = Chain(stages=(TextToImage(model="m", prompt="ß"),), batch=3)
    pictures = Output(made=[Image.new("RGB", (8, 8))] * 3)
    result = Result({"m": pictures}, models={"m": tiny.fingerprints}, notes=["a note"], seconds={"text-to-image": 1.0})
    facts = manifest(chain, 2, result, Machine(torch.device("cpu"), torch.float32))
    image = Image.open(io.BytesIO(encode(Image.new("RGB", (8, 8)), "png", "", facts)))
    read = json.loads(image.info["unrolled"])
    assert read["chain"]["seed"] == 2
    assert read["chain"]["batch"] == 1
    assert read["models"]["m"] == dict(tiny.fingerprints)
    assert {"torch", "diffusers", "unrolled"} <= read["versions"].keys()
    assert read["notes"] == ["a note"]
    assert Chain.model_validate(read["chain"]).stages[0] == chain.stages[0], "the manifest is a chain that can be run again"
