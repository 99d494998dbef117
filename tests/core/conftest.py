"""Whole checkpoints in one file, laid out as the training code had them, made from the tiny folders."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from unrolled.core.single_file import LAYOUTS
from unrolled.core.weights import read_json

Tensors = dict[str, Tensor]
KINDS = {
    "sd-1.5": "tiny_folder",
    "sd-1.5-inpainting": "tiny_inpaint_folder",
    "sdxl-base": "tiny_sdxl_folder",
    "sdxl-refiner": "tiny_refiner_folder",
    "x4-upscaler": "tiny_x4_folder",
}

# --- the way back: diffusers' names to those of the training code


def rename(name: str, *pairs: tuple[str, str]) -> str:
    for old, new in pairs:
        name = re.sub(old, new, name)
    return name


def original_unet(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Tensors:
    """Blocks are counted through: those of level b start at b * (layers + 1), after the first convolution going down."""
    a_level = config["layers_per_block"] + 1
    attends = {int(name.split(".")[1]) for name in tensors if re.match(r"up_blocks\.\d+\.attentions", name)}

    def place(match: re.Match[str]) -> str:
        side, level, kind, layer = match[1], int(match[2]), match[3], int(match[4])
        if kind == "downsamplers":
            return f"input_blocks.{(level + 1) * a_level}.0.op"
        if kind == "upsamplers":
            return f"output_blocks.{(level + 1) * a_level - 1}.{2 if level in attends else 1}.conv"
        block = (
            f"input_blocks.{1 + level * a_level + layer}" if side == "down" else f"output_blocks.{level * a_level + layer}"
        )
        return f"{block}.{1 if kind == 'attentions' else 0}"

    found = {}
    for name, tensor in tensors.items():
        resnet = (r"norm1", "in_layers.0"), (r"conv1", "in_layers.2"), (r"norm2", "out_layers.0"), (r"conv2", "out_layers.3")
        new = rename(name, *resnet, ("time_emb_proj", "emb_layers.1"), ("conv_shortcut", "skip_connection")) if (
            ".resnets." in name
        ) else name  # fmt: skip
        new = re.sub(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)(\.conv(?=\.))?", place, new)
        new = rename(
            new,
            (r"mid_block\.attentions\.0", "middle_block.1"),
            (r"mid_block\.resnets\.0", "middle_block.0"),
            (r"mid_block\.resnets\.1", "middle_block.2"),
            (r"^conv_in", "input_blocks.0.0"),
            (r"^conv_norm_out", "out.0"),
            (r"^conv_out", "out.2"),
            (r"^time_embedding\.linear_1", "time_embed.0"),
            (r"^time_embedding\.linear_2", "time_embed.2"),
            (r"^add_embedding\.linear_1", "label_emb.0.0"),
            (r"^add_embedding\.linear_2", "label_emb.0.2"),
            (r"^class_embedding", "label_emb"),
        )
        found[new] = tensor
    return found


def original_vae(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Tensors:
    """Levels of the decoder are counted from the other end, and attention is made of 1 x 1 convolutions."""
    last = len(config["block_out_channels"]) - 1
    found = {}
    for name, tensor in tensors.items():
        attends = ".attentions." in name
        new = rename(
            name,
            (r"encoder\.down_blocks\.(\d+)\.resnets", r"encoder.down.\1.block"),
            (r"encoder\.down_blocks\.(\d+)\.downsamplers\.0", r"encoder.down.\1.downsample"),
            (r"mid_block\.resnets\.0", "mid.block_1"),
            (r"mid_block\.resnets\.1", "mid.block_2"),
            (r"mid_block\.attentions\.0", "mid.attn_1"),
            ("conv_norm_out", "norm_out"),
            ("conv_shortcut", "nin_shortcut"),
            ("group_norm", "norm"),
            (r"to_([qkv])\.", r"\1."),
            (r"to_out\.0", "proj_out"),
        )
        new = re.sub(r"up_blocks\.(\d+)\.resnets", lambda m: f"up.{last - int(m[1])}.block", new)
        new = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{last - int(m[1])}.upsample", new)
        found[new] = tensor[:, :, None, None] if attends and tensor.ndim == 2 else tensor
    return found


def original_clip(tensors: Mapping[str, Tensor]) -> Tensors:
    return {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in tensors.items()}


def openclip(tensors: Mapping[str, Tensor], width: int) -> Tensors:
    """Queries, keys and values in one matrix, and the projection transposed."""
    found = {
        "text_projection": tensors["text_projection.weight"].T if "text_projection.weight" in tensors else torch.eye(width)
    }
    joined: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        new = rename(
            name.removeprefix("text_model."),
            (r"^encoder\.layers", "transformer.resblocks"),
            (r"^embeddings\.position_embedding\.weight", "positional_embedding"),
            (r"^embeddings\.token_embedding", "token_embedding"),
            (r"^final_layer_norm", "ln_final"),
            ("layer_norm(.)", r"ln_\1"),
            (r"mlp\.fc1", "mlp.c_fc"),
            (r"mlp\.fc2", "mlp.c_proj"),
            ("self_attn", "attn"),
        )
        if match := re.fullmatch(r"(.*\.attn)\.([qkv])_proj\.(weight|bias)", new):
            joined.setdefault(f"{match[1]}.in_proj_{match[3]}", {})[match[2]] = tensor
        elif name != "text_projection.weight":
            found[new] = tensor
    return found | {name: torch.cat([parts[letter] for letter in "qkv"]) for name, parts in joined.items()}


def original(folder: Path, kind: str) -> Tensors:
    """A folder's weights in the layout of the training code, with the scraps such files have."""
    found: Tensors = {"betas": torch.zeros(3), "model_ema.decay": torch.tensor(0.9)}
    for part, prefix in LAYOUTS[kind].items():
        tensors, config = load_file(next((folder / part).glob("*.safetensors"))), read_json(folder / part / "config.json")
        if part == "unet":
            tensors = original_unet(tensors, config)
        elif part == "vae":
            tensors = original_vae(tensors, config)
        elif prefix.endswith(".model."):
            tensors = openclip(tensors, config["hidden_size"]) | {"logit_scale": torch.zeros(())}
        else:
            tensors = original_clip(tensors)
            tensors |= {"text_model.embeddings.position_ids": torch.arange(77)[None], "text_projection.weight": torch.eye(2)}
        found |= {prefix + name: tensor.contiguous() for name, tensor in tensors.items()}
    return found


# --- fixtures


@pytest.fixture(scope="session")
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds a tiny model of every kind."""
    folder = tmp_path_factory.mktemp("kinds")
    for kind, fixture in KINDS.items():
        (folder / kind).symlink_to(request.getfixturevalue(fixture))
    return folder


@pytest.fixture(scope="session")
def originals(models: Path) -> dict[str, Tensors]:
    return {kind: original(models / kind, kind) for kind in KINDS}


@pytest.fixture
def written(originals: dict[str, Tensors], tmp_path: Path) -> Callable[..., Path]:
    """Writes the file of a kind, edited."""

    def write(kind: str = "sd-1.5", edit: Callable[[Tensors], object] = len, name: str = "model.safetensors") -> Path:
        tensors = dict(originals[kind])
        edit(tensors)
        if name.endswith(".ckpt"):
            torch.save({"state_dict": tensors, "global_step": 7}, tmp_path / name)
        else:
            save_file(tensors, tmp_path / name)
        return tmp_path / name

    return write


@pytest.fixture(scope="session")
def layout() -> SimpleNamespace:
    """The way back, for tests that make files of their own."""
    return SimpleNamespace(unet=original_unet, vae=original_vae, checkpoint=original)
