"""The real structures of all the systems, on the meta device; and that of Stable Diffusion 1.5, with random weights, run.

full_size.json holds each component's configuration, its parameter count and a digest of its weights' names and shapes,
with where each of them was found. Nothing here reads a checkpoint: none can be had where this was written. Names and
shapes do not show all of a structure (heads, activations, scales); what matters of the rest has a test of its own.
"""

import hashlib
import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, PriorTransformer, UNet2DConditionModel, VQModel
from diffusers.models.attention_processor import Attention
from safetensors.torch import save_file
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)
from unrolled.chains.chain import TextToImage
from unrolled.chains.jobs import text_to_image
from unrolled.core.latents import LatentSpace
from unrolled.core.loading import Model
from unrolled.core.source import MINIATURES
from unrolled.stages.decode import decode

FULL_SIZE = json.loads((Path(__file__).parent / "full_size.json").read_text(encoding="utf-8"))
COMPONENTS: dict[str, dict[str, Any]] = FULL_SIZE["components"]
DIFFUSERS = {c.__name__: c for c in (AutoencoderKL, PriorTransformer, UNet2DConditionModel, VQModel)}
CLIP = {
    "CLIPTextModel": (CLIPTextModel, CLIPTextConfig),
    "CLIPTextModelWithProjection": (CLIPTextModelWithProjection, CLIPTextConfig),
    "CLIPVisionModelWithProjection": (CLIPVisionModelWithProjection, CLIPVisionConfig),
}
UNITS = {"K": 10**3, "M": 10**6, "B": 10**9}
WIDTHS = {"I64": 8, "F32": 4, "F16": 2}

Shapes = dict[str, tuple[int, ...]]
Tensor = tuple[str, str, tuple[int, ...]]


def build(name: str) -> torch.nn.Module:
    """A component from its configuration, without memory for its weights."""
    kind, config = COMPONENTS[name]["class"], COMPONENTS[name]["config"]
    with torch.device("meta"):
        if kind in DIFFUSERS:
            model: torch.nn.Module = DIFFUSERS[kind].from_config(config)
        else:
            module, configuration = CLIP[kind]
            model = module(configuration(**config))
    return model


@cache
def built(name: str) -> tuple[int, Shapes]:
    """Its parameters, counted, and its weights under the names a checkpoint gives them.

    A CLIPTextModel in memory has dropped the "text_model." its checkpoints have (transformers renames while loading).
    """
    model = build(name)
    prefix = "text_model." if COMPONENTS[name]["class"] == "CLIPTextModel" else ""
    shapes = {prefix + key.removeprefix(prefix): tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    return sum(p.numel() for p in model.parameters()), shapes


def safetensors_bytes(tensors: list[Tensor]) -> int:
    """How long the file is that holds these: the header's names, types, shapes and offsets as JSON, then the numbers."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, shape in sorted(tensors, key=lambda tensor: (-WIDTHS[tensor[1]], tensor[0])):
        start, end = end, end + math.prod(shape) * WIDTHS[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    length = len(json.dumps(header, separators=(",", ":")))
    return 8 + math.ceil(length / 8) * 8 + end


def unit(figure: str) -> tuple[float, float]:
    """A published figure and what its last digit is worth: "2.6B" is 2.6e9, to 0.1e9."""
    scale = UNITS.get(figure[-1], 1)
    digits = figure.rstrip("KMB")
    return float(digits) * scale, scale / 10 ** len(digits.partition(".")[2])


@pytest.mark.parametrize("name", COMPONENTS)
def test_parameters_are_as_many_as_published(name: str) -> None:
    """Independent: every published figure, exact or rounded, with its place in the file.

    Not independent: the exact count itself, which is what this structure has. The upscalers have no figure listed: for
    x4 the sizes of the published files, below, stand for it, for x2's UNet only the original code, below that.
    """
    parameters, _ = built(name)
    assert parameters == COMPONENTS[name]["parameters"]
    for figure in COMPONENTS[name]["published"]:
        value, last_digit = unit(figure["figure"])
        assert parameters == value or abs(parameters - value) < last_digit > 1, figure


@pytest.mark.parametrize("name", COMPONENTS)
def test_weights_are_named_and_shaped_as_in_the_original(name: str) -> None:
    """Independent: the original authors' code, built from their configuration, gave these names and shapes.

    Not independent: the renaming from their names to the checkpoint's, which is diffusers' (by hand for CLIP), and
    for Kandinsky 2.2's UNets the eight tensors that 2.1 has not.
    """
    _, shapes = built(name)
    weights = COMPONENTS[name]["weights"]
    names = sorted(shapes)
    assert (len(names), names[0], names[-1]) == (weights["count"], weights["first"], weights["last"])
    lines = sorted(f"{key} {'x'.join(map(str, shape))}" for key, shape in shapes.items())
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == weights["sha256"]


@pytest.mark.parametrize("name", [name for name in COMPONENTS if COMPONENTS[name]["files"]])
def test_the_published_files_are_exactly_as_long_as_these_weights_make_them(name: str) -> None:
    """Independent: the lengths in bytes of the files on the Hub, as others recorded them.

    A safetensors file begins with all names, types, shapes and offsets as text, so its length holds the number of
    parameters exactly and the names and shapes but for exchanges of equal length.
    """
    _, shapes = built(name)
    for file in COMPONENTS[name]["files"]:
        tensors = [(key, file["dtype"], shape) for key, shape in shapes.items()]
        if file["position_ids"]:  # a buffer that older versions of transformers saved
            (key,) = (key for key in shapes if key.endswith("position_embedding.weight"))
            tensors.append((key.replace("position_embedding.weight", "position_ids"), "I64", (1, shapes[key][0])))
        assert safetensors_bytes(tensors) == file["bytes"], file


def test_the_length_of_a_safetensors_file_is_understood(tmp_path: Path) -> None:
    """The formula above against the library's own writer, all three types at once."""
    tensors: list[Tensor] = [("b", "F16", (3, 5)), ("a", "F32", ()), ("c.weight", "I64", (1, 77)), ("d", "F16", (7,))]
    types = {"I64": torch.int64, "F32": torch.float32, "F16": torch.float16}
    file = tmp_path / "some.safetensors"
    save_file({n: torch.zeros(s, dtype=types[t]) for n, t, s in tensors}, file, metadata={"format": "pt"})
    assert file.stat().st_size == safetensors_bytes(tensors)


@pytest.mark.parametrize("name", [name for name in COMPONENTS if name.endswith("unet")])
def test_attention_has_the_heads_of_the_original(name: str) -> None:
    """Independent: num_heads 8 in the yaml files of 1.5 and x4, num_head_channels (or head_size) 64 in all the others."""
    parts = [part for part in build(name).modules() if isinstance(part, Attention)]
    assert parts
    assert all(part.heads == (8 if name.startswith(("sd-1.5", "x4")) else part.inner_dim // 64) for part in parts)


@pytest.mark.parametrize(("name", "scale"), [("sd-1.5 vae", 0.18215), ("sdxl vae", 0.13025), ("x4 vae", 0.08333)])
def test_latents_are_scaled_as_in_the_original(name: str, scale: float) -> None:
    """Independent: scale_factor in the original yaml files."""
    vae = build(name)
    assert isinstance(vae, AutoencoderKL)
    assert vae.config.scaling_factor == scale


def test_the_latent_upscaler_ends_its_time_embedding_in_a_gelu() -> None:
    """Independent: k-diffusion's MappingNet has a GELU after each of its layers, the last too."""
    unet = build("x2 unet")
    assert isinstance(unet, UNet2DConditionModel)
    assert isinstance(unet.time_embedding.post_act, torch.nn.GELU)


def test_every_figure_says_where_it_comes_from() -> None:
    for name, component in COMPONENTS.items():
        assert component["config_from"] in FULL_SIZE["sources"], name
        assert component["weights"]["from"] in FULL_SIZE["sources"], name
        assert all(file["from"] in FULL_SIZE["sources"] for file in component["files"]), name
        assert all(figure["where"] for figure in component["published"]), name


def random_weights(module: torch.nn.Module) -> torch.nn.Module:
    """Matrices small, norms one, biases zero: finite through any depth."""
    module = module.to_empty(device="cpu").eval()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.02)
            else:
                parameter.zero_()
        for part in module.modules():
            if isinstance(part, torch.nn.GroupNorm | torch.nn.LayerNorm):
                torch.nn.init.ones_(part.weight)
    return module.requires_grad_(False)


@pytest.fixture(scope="module")
def full_size() -> Model:
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(MINIATURES / "sd-1.5" / "tokenizer")
    scheduler = {"_class_name": "PNDMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return Model(
        name="full size",
        tokenizer=tokenizer,
        text_encoder=CLIPTextModel(CLIPTextConfig(**COMPONENTS["sd-1.5 text_encoder"]["config"])).eval(),
        unet=random_weights(build("sd-1.5 unet")),
        vae=random_weights(build("sd-1.5 vae")),
        scheduler=scheduler | {"skip_prk_steps": True, "steps_offset": 1, "set_alpha_to_one": False},
        space=LatentSpace("AutoencoderKL", 4, 8, 0.18215, "random"),
        fingerprints={},
        device=torch.device("cpu"),
        dtype=torch.float32,
    )


@pytest.mark.slow
def test_two_steps_at_512(full_size: Model) -> None:
    latents = text_to_image(full_size, TextToImage(prompt="a castle", steps=2, solver="dpm++2m"), [0])
    assert latents.x.shape == (1, 4, 64, 64)
    assert latents.is_clean
    (picture,) = decode(full_size, latents)
    assert picture.size == (512, 512)
    assert len(picture.getcolors(512 * 512) or []) > 1
