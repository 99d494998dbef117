"""Tiny random Stable Diffusion checkpoints in the diffusers folder layout."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from torch import Tensor, nn

# Triton settles at its import, which diffusers brings about, whether kernels run in its interpreter.
os.environ["TRITON_INTERPRET"] = str(int(not torch.cuda.is_available()))
import unrolled
from unrolled.core.latents import LatentSpace
from unrolled.core.loading import Model, Prior, load, load_prior
from unrolled.miniatures.tiny import write_tiny
from unrolled.miniatures.tiny_companions import write_tiny_controlnet, write_tiny_image_adapter
from unrolled.miniatures.tiny_kandinsky import write_tiny_kandinsky, write_tiny_prior
from unrolled.miniatures.tiny_sdxl import write_tiny_sdxl
from unrolled.miniatures.tiny_upscalers import write_tiny_x2, write_tiny_x4

del os.environ["TRITON_INTERPRET"]

# The repository's root is the package, and pytest would import it once more, under its folder's name.
sys.modules.setdefault(Path(unrolled.__file__).resolve().parent.name, unrolled)


@pytest.fixture(autouse=True)
def gradients_stay_on() -> Iterator[None]:
    """No test turns them off for the next."""
    yield
    enabled = torch.is_grad_enabled()
    torch.set_grad_enabled(True)
    assert enabled, "this test leaves gradients turned off"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test finds what another one, or the user, has made."""
    monkeypatch.setenv("UNROLLED_CACHE", str(tmp_path / "cache of stages"))


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny_inpaint_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("models") / "tiny-inpaint", in_channels=9)


@pytest.fixture(scope="session")
def tiny(tiny_folder: Path) -> Model:
    return load(str(tiny_folder), device="cpu")


@pytest.fixture(scope="session")
def tiny_inpaint(tiny_inpaint_folder: Path) -> Model:
    return load(str(tiny_inpaint_folder), device="cpu")


@pytest.fixture(scope="session")
def tiny_sdxl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_sdxl(tmp_path_factory.mktemp("models") / "tiny-sdxl")


@pytest.fixture(scope="session")
def tiny_refiner_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_sdxl(tmp_path_factory.mktemp("models") / "tiny-refiner", refiner=True)


@pytest.fixture(scope="session")
def tiny_sdxl(tiny_sdxl_folder: Path) -> Model:
    return load(str(tiny_sdxl_folder), device="cpu")


@pytest.fixture(scope="session")
def tiny_refiner(tiny_refiner_folder: Path) -> Model:
    return load(str(tiny_refiner_folder), device="cpu")


@pytest.fixture(scope="session")
def tiny_prior_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_prior(tmp_path_factory.mktemp("models") / "tiny-prior")


@pytest.fixture(scope="session")
def tiny_kandinsky_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_kandinsky(tmp_path_factory.mktemp("models") / "tiny-kandinsky")


@pytest.fixture(scope="session")
def tiny_kandinsky_inpaint_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_kandinsky(tmp_path_factory.mktemp("models") / "tiny-kandinsky-inpaint", inpaint=True)


@pytest.fixture(scope="session")
def tiny_prior(tiny_prior_folder: Path) -> Prior:
    return load_prior(str(tiny_prior_folder), device="cpu")


@pytest.fixture(scope="session")
def tiny_kandinsky(tiny_kandinsky_folder: Path) -> Model:
    return load(str(tiny_kandinsky_folder), device="cpu")


@pytest.fixture(scope="session")
def tiny_kandinsky_inpaint(tiny_kandinsky_inpaint_folder: Path) -> Model:
    return load(str(tiny_kandinsky_inpaint_folder), device="cpu")


@pytest.fixture(scope="session")
def tiny_x2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_x2(tmp_path_factory.mktemp("models") / "tiny-x2")


@pytest.fixture(scope="session")
def tiny_x4_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_x4(tmp_path_factory.mktemp("models") / "tiny-x4")


@pytest.fixture(scope="session")
def tiny_x2(tiny_x2_folder: Path) -> Model:
    return load(str(tiny_x2_folder), device="cpu")


@pytest.fixture(scope="session")
def tiny_x4(tiny_x4_folder: Path) -> Model:
    return load(str(tiny_x4_folder), device="cpu")


@pytest.fixture(scope="session")
def controlnet_folders(
    tiny_folder: Path, tiny_sdxl_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[Path]]:
    """Two ControlNets for each of the tiny checkpoints of Stable Diffusion and SDXL."""
    folder, models = tmp_path_factory.mktemp("controlnets"), {"sd": tiny_folder, "sdxl": tiny_sdxl_folder}
    return {
        name: [write_tiny_controlnet(folder / f"{name}-{seed}", model, seed) for seed in (0, 1)]
        for name, model in models.items()
    }


@pytest.fixture(scope="session")
def image_adapter_files(
    tiny_folder: Path, tiny_sdxl_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """IP-Adapters for the same, plain and plus."""
    folder, models = tmp_path_factory.mktemp("adapters"), {"sd": tiny_folder, "sdxl": tiny_sdxl_folder}
    kinds = [(name, plus) for name in models for plus in (False, True)]
    return {
        f"{name}{'-plus' * plus}": write_tiny_image_adapter(folder / f"{name}-{plus}", models[name], plus)
        for name, plus in kinds
    }


@pytest.fixture(scope="session")
def exact() -> Callable[[Any], Any]:
    """diffusers' UnCLIPScheduler with its coefficients in float64: in float32 it loses 1 - alpha-bar of the last step."""

    def in_float64(scheduler: Any) -> Any:
        scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
        scheduler.alphas = scheduler.alphas_cumprod.clone()
        scheduler.alphas[1:] /= scheduler.alphas_cumprod[:-1]
        scheduler.betas = 1 - scheduler.alphas
        return scheduler

    return in_float64


@pytest.fixture
def broken(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint to damage."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "broken"))


@pytest.fixture(scope="session")
def picture() -> Image.Image:
    """A 64x64 picture with edges and gradients."""
    image = Image.radial_gradient("L").resize((64, 64))
    image = Image.merge("RGB", (image, image.rotate(90), Image.linear_gradient("L").resize((64, 64))))
    ImageDraw.Draw(image).rectangle((10, 20, 40, 50), fill=(200, 30, 60))
    return image


@pytest.fixture(scope="session")
def mask() -> Image.Image:
    """White in the middle, with an edge that no latent cell is aligned to."""
    image = Image.new("L", (64, 64))
    ImageDraw.Draw(image).rectangle((13, 19, 45, 51), fill=255)
    return image


@pytest.fixture
def space() -> LatentSpace:
    """A latent space of no model."""
    return LatentSpace("AutoencoderKL", 4, 8, 0.18215, "0123456789abcdef")


# --- LoRAs

KOHYA = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
LAYOUTS: dict[str, Callable[[str, str], str]] = {
    "diffusers": lambda part, layer: f"{part}.{layer}" + (".lora" if part == "unet" else ".lora_linear_layer"),
    "diffusers-old": lambda part, layer: re.sub(
        r"_proj(?=_lora)", "", f"{part}.{layer.replace('to_out.0', 'to_out')}_lora".replace("self_attn.", "self_attn.to_")
    ).replace(".to_", ".processor.to_" if part == "unet" else ".to_"),
    "peft": lambda part, layer: f"{part}.{layer}",
    "peft-own": lambda part, layer: f"base_model.model.{layer}",
    "kohya": lambda part, layer: f"{KOHYA[part]}_{layer.replace('.', '_')}",
    "kohya-ldm": lambda part, layer: f"{KOHYA[part]}_{(ldm_name(layer) if part == 'unet' else layer).replace('.', '_')}",
}
"""How each kind of file calls a layer."""

HALVES = {"diffusers": ("down", "up"), "peft": ("lora_A", "lora_B"), "kohya": ("lora_down", "lora_up")}


def ldm_name(layer: str, per_block: int = 1) -> str:
    """What the UNet's first authors call a layer of the tiny one."""
    ends = {
        "conv_in": "input_blocks.0.0",
        "conv_out": "out.2",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
    }
    inner = {
        "conv1": "in_layers.2",
        "conv2": "out_layers.3",
        "time_emb_proj": "emb_layers.1",
        "conv_shortcut": "skip_connection",
    }
    if layer in ends:
        return ends[layer]
    where, *rest = layer.split(".")
    if where == "mid_block":
        kind, number, *rest = rest
        place = "1" if kind == "attentions" else str(2 * int(number))
        return ".".join(["middle_block", place, *(inner.get(r, r) for r in rest)])
    block, kind, number, *rest = rest
    index = int(block) * (per_block + 1) + (per_block if kind.endswith("samplers") else int(number))
    if kind == "downsamplers":
        return f"input_blocks.{index + 1}.0.op"
    head = f"input_blocks.{index + 1}" if where == "down_blocks" else f"output_blocks.{index}"
    place = {"resnets": "0", "attentions": "1", "upsamplers": "2"}[kind]
    return ".".join([head, place, *(inner.get(r, r) for r in rest)])


@pytest.fixture(scope="session")
def write_lora() -> Callable[..., dict[str, dict[str, Tensor]]]:
    """Writes a LoRA of random numbers in a layout; returns by component and layer what it adds to the weight."""

    def write(
        file: Path,
        model: Model,
        layout: str = "peft",
        *,
        layers: str = "",
        parts: tuple[str, ...] = ("unet", "text_encoder", "text_encoder_2"),
        alpha: Callable[[int], float] | None = None,
        seed: int = 0,
    ) -> dict[str, dict[str, Tensor]]:
        draw, tensors, added = torch.Generator().manual_seed(seed), dict[str, Tensor](), dict[str, dict[str, Tensor]]()
        down, up = HALVES[layout.split("-")[0]]
        for part in parts:
            found = [(name, m) for name, m in getattr(model, part).named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
            for number, (layer, module) in enumerate(pair for pair in found if re.search(layers, pair[0])):
                rank, (out, *into) = 2 + number % 2, module.weight.shape
                factors = 0.1 * torch.randn(rank, *into, generator=draw), 0.1 * torch.randn(out, rank, generator=draw)
                full = f"text_model.{layer}" if part == "text_encoder" else layer
                name = LAYOUTS[layout](part, full)
                if KOHYA["text_encoder"] in name and model.text_encoder_2 is None:
                    name = name.replace("lora_te1", "lora_te")
                tensors[f"{name}.{down}.weight"] = factors[0]
                tensors[f"{name}.{up}.weight"] = factors[1][(...,) + (None,) * (len(into) - 1)].contiguous()
                scale = 1.0 if alpha is None else alpha(rank) / rank
                if alpha is not None and layout.startswith("kohya"):
                    tensors[f"{name}.alpha"] = torch.tensor(alpha(rank))
                added.setdefault(part, {})[layer] = scale * (factors[1] @ factors[0].flatten(1)).view_as(module.weight)
        save_file(tensors, file)
        return added

    return write
