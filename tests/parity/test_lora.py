"""LoRAs and textual inversions against diffusers' own loaders in its pipelines: same files, same noise, fp32."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor
from unrolled.core.guidance import classifier_free
from unrolled.core.latents import Latents
from unrolled.core.loading import Model
from unrolled.core.loop import denoise
from unrolled.core.lora import lora
from unrolled.core.noise import DiffusersNoise
from unrolled.core.textual_inversion import textual_inversion
from unrolled.stages.noise import noise
from unrolled.stages.size import with_size
from unrolled.stages.text import encode_text

TOLERANCE = 1e-4
Write = Callable[..., Any]
Distance = Callable[..., float]
Pair = tuple[Model, Any]
PROMPT, NEGATIVE = "a red apple on a table", "grey"
NAMES = {"tiny": "StableDiffusionPipeline", "tiny_sdxl": "StableDiffusionXLPipeline"}
ATTENTION = r"attn\w*\.(to|\w_proj|out_proj)"


@pytest.fixture(params=NAMES)
def pair(request: pytest.FixtureRequest) -> tuple[Model, Any]:
    """Our tiny model and diffusers' pipeline of the same files, the pipeline the test's own."""
    folder = request.getfixturevalue(f"{request.param}_folder")
    pipeline = getattr(diffusers, NAMES[request.param]).from_pretrained(folder, use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    return request.getfixturevalue(request.param), pipeline


def ours(model: Model, prompt: str = PROMPT) -> Latents:
    schedule, solver = model.sampling(4, "euler")
    cond, uncond = encode_text(model, prompt), encode_text(model, NEGATIVE)
    if model.system == "sdxl":
        cond, uncond = with_size(model, cond, 64, 64), with_size(model, uncond, 64, 64)
    source = DiffusersNoise.seeded(3)
    start = noise(model, schedule, seeds=[3], source=source)
    return denoise(classifier_free(model.denoiser, cond, uncond, 5.0), start, schedule, solver, noise=source)


def theirs(pipeline: Any, prompt: str = PROMPT) -> Tensor:
    out: Tensor = pipeline(
        prompt, negative_prompt=NEGATIVE, num_inference_steps=4, height=64, width=64, guidance_scale=5.0,
        generator=DiffusersNoise.seeded(3).generator, output_type="latent",
    ).images  # fmt: skip
    return out


def write(write_lora: Write, file: Path, model: Model, layout: str, **options: Any) -> Path:
    """A LoRA of all that the model has."""
    parts = tuple(part for part in ("unet", "text_encoder", "text_encoder_2") if getattr(model, part) is not None)
    write_lora(file, model, layout, parts=parts, **options)
    return file


@pytest.mark.parametrize("alpha", [None, lambda rank: 4.0 if rank else 0.0], ids=["alpha-rank", "alpha-4"])
@pytest.mark.parametrize(
    ("layout", "layers"),
    [
        *((layout, ATTENTION) for layout in ("peft", "diffusers", "diffusers-old", "kohya", "kohya-ldm")),
        *((layout, "") for layout in ("peft", "diffusers", "kohya", "kohya-ldm")),
    ],
)
def test_every_layout(
    pair: Pair, layout: str, layers: str, alpha: Any, write_lora: Write, tmp_path: Path, distance: Distance
) -> None:
    model, pipeline = pair
    kohya, ldm = layout.startswith("kohya"), layout.endswith("ldm")
    if (
        (alpha and not kohya)
        or (ldm and model.system == "sd")
        or (kohya and not ldm and not layers and model.system == "sdxl")
    ):
        pytest.skip("no such file, or diffusers does not read it all")
    file = write(write_lora, tmp_path / "a.safetensors", model, layout, layers=layers, alpha=alpha)
    plain = ours(model)
    with lora(model, file):
        changed = ours(model)
    pipeline.load_lora_weights(file)
    wanted = theirs(pipeline)
    assert distance(plain, wanted, "euler") > 0.1
    assert distance(changed, wanted, "euler") < TOLERANCE
    pipeline.unload_lora_weights()
    assert distance(ours(model), theirs(pipeline), "euler") < TOLERANCE


def test_several_with_weights(pair: Pair, write_lora: Write, tmp_path: Path, distance: Distance) -> None:
    model, pipeline = pair
    weights = {"one": 0.8, "two": -0.5, "three": 0.3}
    for number, (name, layout) in enumerate(zip(weights, ("kohya", "peft", "diffusers"), strict=True)):
        file = write(write_lora, tmp_path / f"{name}.safetensors", model, layout, layers=ATTENTION, seed=number)
        pipeline.load_lora_weights(file, adapter_name=name)
    pipeline.set_adapters(list(weights), list(weights.values()))
    with ExitStack() as stack:
        for name, weight in weights.items():
            stack.enter_context(lora(model, tmp_path / f"{name}.safetensors", weight))
        changed = ours(model)
    wanted = theirs(pipeline)
    assert distance(changed, wanted, "euler") < TOLERANCE
    pipeline.set_adapters(list(weights), [1.0, 1.0, 1.0])
    assert distance(changed, theirs(pipeline), "euler") > 0.1


@pytest.mark.parametrize("rslora", [False, True], ids=["", "rslora"])
def test_alphas_in_the_files_header(pair: Pair, rslora: bool, tmp_path: Path, distance: Distance) -> None:
    """As diffusers' training scripts write it: alpha, and another for some layers, in the config in the file's header."""
    model, pipeline = pair
    torch.manual_seed(0)
    config = LoraConfig(
        r=4,
        lora_alpha=7,
        target_modules=["to_q", "to_v", "proj_in"],
        init_lora_weights=False,
        alpha_pattern={"proj_in": 2, "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": 1},
        use_rslora=rslora,
    )
    pipeline.unet.add_adapter(config)
    told = config.to_dict()  # type: ignore[no-untyped-call]
    layers = get_peft_model_state_dict(pipeline.unet)
    pipeline.save_lora_weights(tmp_path, unet_lora_layers=layers, unet_lora_adapter_metadata=told)
    trained = theirs(pipeline)
    with lora(model, tmp_path / "pytorch_lora_weights.safetensors"):
        assert distance(ours(model), trained, "euler") < TOLERANCE
    assert distance(ours(model), trained, "euler") > 0.01


def test_pefts_own_files(pair: Pair, tmp_path: Path, distance: Distance) -> None:
    model, pipeline = pair
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["to_k", "conv1"], init_lora_weights=False)
    wrapped = get_peft_model(pipeline.unet, config)
    wrapped.save_pretrained(str(tmp_path))
    trained = theirs(pipeline)
    with lora(model, tmp_path / "adapter_model.safetensors"):
        assert distance(ours(model), trained, "euler") < TOLERANCE
    assert distance(ours(model), trained, "euler") > 0.01


def test_diffusers_ignores_alphas_of_single_layers(
    pair: Pair, write_lora: Write, tmp_path: Path, distance: Distance
) -> None:
    """Of kohya's files; it takes the commonest for all. That ours is right says tests/core/test_lora.py."""
    model, pipeline = pair
    file = write(write_lora, tmp_path / "a.safetensors", model, "kohya", layers=ATTENTION, alpha=lambda rank: rank + 1.0)
    with lora(model, file):
        changed = ours(model)
    pipeline.load_lora_weights(file)
    apart = 0.060 if model.system == "sdxl" else 0.053
    assert distance(changed, theirs(pipeline), "euler") == pytest.approx(apart, rel=0.3)


# --- textual inversion


def vectors(model: Model, count: int, seed: int = 0) -> dict[str, Tensor]:
    """As many for each of a model's encoders, as large as its own."""
    draw, made = torch.Generator().manual_seed(seed), dict[str, Tensor]()
    for part in ("text_encoder", "text_encoder_2"):
        if (encoder := getattr(model, part)) is not None:
            made[part] = (
                torch.randn(count, encoder.config.hidden_size, generator=draw) * encoder.get_input_embeddings().weight.std()
            )
    return made


def teach(pipeline: Any, word: str, made: dict[str, Tensor]) -> None:
    for part, rows in made.items():
        tokenizer = getattr(pipeline, part.replace("text_encoder", "tokenizer"))
        pipeline.load_textual_inversion({word: rows}, text_encoder=getattr(pipeline, part), tokenizer=tokenizer)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("prompt", ["a photo of <toy>, red", "<toy>", "a<toy> and <toy> <toy>"])
def test_textual_inversion(pair: Pair, count: int, prompt: str, tmp_path: Path, distance: Distance) -> None:
    model, pipeline = pair
    made = vectors(model, count)
    names = {"text_encoder": "clip_l" if len(made) > 1 else "<other>", "text_encoder_2": "clip_g"}
    save_file({names[part]: rows for part, rows in made.items()}, tmp_path / "toy.safetensors")
    teach(pipeline, "<toy>", made)
    plain = ours(model, prompt)
    with textual_inversion(model, "<toy>", tmp_path / "toy.safetensors"):
        taught = ours(model, prompt)
    wanted = theirs(pipeline, prompt)
    assert distance(plain, wanted, "euler") > 1e-3
    assert distance(taught, wanted, "euler") < TOLERANCE


def test_several_words(pair: Pair, tmp_path: Path, distance: Distance) -> None:
    model, pipeline = pair
    prompt = "<cat> riding <bike>"
    with ExitStack() as stack:
        for number, word in enumerate(("<cat>", "<bike>")):
            made = vectors(model, 2, seed=number)
            file = tmp_path / f"{number}.safetensors"
            save_file(
                {{"text_encoder": "clip_l", "text_encoder_2": "clip_g"}[part]: rows for part, rows in made.items()}, file
            )
            teach(pipeline, word, made)
            stack.enter_context(textual_inversion(model, word, file))
        assert distance(ours(model, prompt), theirs(pipeline, prompt), "euler") < TOLERANCE


@pytest.mark.parametrize("pair", ["tiny_sdxl"], indirect=True)
def test_diffusers_pools_at_the_new_word(pair: Pair, tmp_path: Path, distance: Distance) -> None:
    """Where the config says ``eos_token_id = 2``, as SDXL's does, CLIP pools at the largest id, and new ones are larger."""
    model, pipeline = pair
    made = vectors(model, 1)
    save_file({"clip_l": made["text_encoder"], "clip_g": made["text_encoder_2"]}, tmp_path / "toy.safetensors")
    with textual_inversion(model, "<toy>", tmp_path / "toy.safetensors"):
        right = ours(model, "a photo of <toy>, red")
        clip = model.text_encoder_2.text_model
        end, clip.eos_token_id = clip.eos_token_id, 2
        try:
            assert torch.equal(ours(model, "a photo of <toy>, red").x, right.x)
        finally:
            clip.eos_token_id = end
    teach(pipeline, "<toy>", made)
    assert distance(right, theirs(pipeline, "a photo of <toy>, red"), "euler") < TOLERANCE
    pipeline.text_encoder_2.text_model.eos_token_id = 2
    assert distance(right, theirs(pipeline, "a photo of <toy>, red"), "euler") == pytest.approx(0.065, rel=0.3)
