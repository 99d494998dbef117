"""LoRA: low-rank changes to the layers of a model, from files of every common layout, on for a while.

(Hu et al., arXiv:2106.09685, sec. 4.1: ``W + alpha / rank * B A``.) peft is not needed for that: a layer with a change is
one product more, and put beside the layer it leaves weights, hooks and offloading as they are.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional

from .errors import BadInput, BadModel
from .model import Model
from .weights import read_json, read_tensors

PARTS = ("unet", "text_encoder", "text_encoder_2")
"""The components that a LoRA may change."""

Shapes = Mapping[str, Mapping[str, Sequence[int]]]
"""By component and layer, the shape of its weight: what a change has to fit."""

_HALF = re.compile(r"(.+?)[._]lora(?:_linear_layer)?[._](down|up|A|B)(?:\.\w+)?\.weight")
"""A tensor's name: kohya's ``….lora_down``, PEFT's ``….lora_A``, diffusers' ``…_lora.down`` and more."""

_SPELLING = (
    (r"^base_model\.model\.", ""),
    (r"\.processor\.", "."),
    (r"\.", "_"),
    (r"^lora_unet_", "unet_"),
    (r"^lora_te1?_", "text_encoder_"),
    (r"^lora_te2_", "text_encoder_2_"),
    (r"(^|_)text_model_", r"\1"),  # which transformers 5 does without
    (r"_self_attn_to_(q|k|v|out)$", r"_self_attn_\1_proj"),
    (r"(_attn\d)_to_out$", r"\1_to_out_0"),
)
"""What makes one name of all that diffusers, PEFT and kohya call a layer; kohya's have no dots to begin with."""

_TRAINED_ON = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2", 1280: "SDXL's refiner", 2048: "SDXL's base"}
"""The published models, by the width of the text that their UNet is told."""


@dataclass(frozen=True, repr=False)
class Change:
    """What a LoRA adds to one layer: ``scale * up @ down``, of shapes (out, rank, …) and (rank, in, …)."""

    part: str
    layer: str
    down: Tensor
    up: Tensor
    scale: float


class LowRank(nn.Module):
    """A Linear or Conv2d, and beside it what a LoRA adds to its output."""

    def __init__(self, base: Any, down: Tensor, up: Tensor, scale: float) -> None:
        super().__init__()
        self.base, self.scale = base, scale
        self.register_buffer("down", down)
        self.register_buffer("up", up)

    @property
    def weight(self) -> Any:
        """The layer's own, for who asks its shape or type."""
        return self.base.weight

    def forward(self, x: Tensor, *rest: Any, **more: Any) -> Tensor:
        """The layer's output and the change of it."""
        down: Any = self.down
        up: Any = self.up
        out: Tensor = self.base(x, *rest, **more)
        if down.ndim == 2:
            return out + self.scale * functional.linear(functional.linear(x, down), up)
        conv: Any = self.base
        while isinstance(conv, LowRank):
            conv = conv.base
        narrow = functional.conv2d(x, down, None, conv.stride, conv.padding, conv.dilation)
        return out + self.scale * functional.conv2d(narrow, up)


@contextmanager
def lora(model: Model, file: str | Path, weight: float = 1.0) -> Iterator[None]:
    """Have a LoRA on a model's UNet and text encoders, for a ``with`` block; several add up.

    It is on for everybody who has these networks, as models from one Shelf do; afterwards they are exactly what they were.
    Prompts are to be encoded within the block too, as text encoders may be changed.

    Args:
        file: ``.safetensors`` as diffusers, PEFT (its ``adapter_config.json`` beside it) or kohya's scripts write it.
        weight: how much of it; 1 is as it was trained, 0 nothing.

    Raises:
        BadInput: weight is not finite, or the model has no UNet; BadModel: the file is missing or damaged, is no plain
            LoRA, or one for another model.
    """
    if not math.isfinite(weight):
        raise BadInput(f"The weight of {file} must be a finite number, got {weight}.")
    networks = {part: network for part in PARTS if (network := getattr(model, part, None)) is not None}
    if "unet" not in networks:
        raise BadInput(f"{model.name} has no UNet, which a LoRA is for: give a model that makes pictures.")
    shapes = {part: _shapes(network) for part, network in networks.items()}
    changes = read_lora(Path(file), shapes, model.name, model.unet.config.layers_per_block)
    replaced = list[tuple[Any, str, Any]]()
    try:
        for change in changes:
            network = networks[change.part]
            layer: Any = network.get_submodule(change.layer)
            # Weights that are offloaded by layer are nowhere until they are called.
            device = model.device if layer.weight.is_meta else layer.weight.device
            down, up = (half.to(device, layer.weight.dtype) for half in (change.down, change.up))
            network.set_submodule(change.layer, LowRank(layer, down, up, weight * change.scale))
            replaced.append((network, change.layer, layer))
        yield
    finally:
        for network, name, layer in reversed(replaced):
            network.set_submodule(name, layer)


def _shapes(network: nn.Module) -> dict[str, Sequence[int]]:
    kinds = (nn.Linear, nn.Conv2d, LowRank)
    return {name: tuple(layer.weight.shape) for name, layer in network.named_modules() if isinstance(layer, kinds)}


def read_lora(file: Path, shapes: Shapes, name: str, layers_per_block: int) -> list[Change]:
    """What a LoRA's file changes, checked against the layers of a model.

    Args:
        shapes: of the model's layers.
        name: the model's, for errors.
        layers_per_block: the UNet's, by which kohya's files for SDXL count.

    Raises:
        BadModel: it is missing, damaged, no plain LoRA, or for another model.
    """
    halves, alphas = _sorted(file, layers_per_block)
    known = {_spelled(f"{part}.{layer}"): (part, layer) for part, held in shapes.items() for layer in held}
    changes, strangers, configs = list[Change](), list[str](), _configs(file, halves)
    for given, (down, up) in halves.items():
        names = [prefix + _spelled(given) for prefix in ("", "unet_", "text_encoder_")]
        part, layer = next((known[name] for name in names if name in known), ("", ""))
        if not layer or not _fits(down, up, shapes[part][layer]):
            strangers.append(given)
            continue
        config = configs.get(part) or configs.get("", {})
        changes.append(Change(part, layer, down, up, _scale(file, given, len(down), alphas.get(given), config)))
    if strangers:
        raise BadModel(
            f"{file} does not fit {name}: {len(strangers)} of the {len(halves)} layers that it changes are not there or of "
            f"another shape, {strangers[0]} to begin with; {_meant_for(halves, shapes)}."
        )
    return changes


def _sorted(file: Path, layers_per_block: int) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, float]]:
    """By layer, as the file calls them: both factors; and the alphas."""
    if not file.is_file():
        raise BadModel(f"There is no file {file}: give the path of a LoRA.")
    if file.suffix != ".safetensors":
        raise BadModel(f"{file} is no .safetensors file, and LoRAs are read from no other: convert it.")
    halves, alphas = dict[str, dict[str, Tensor]](), dict[str, float]()
    for key, tensor in _without_ldm_names(read_tensors(file), layers_per_block, file).items():
        name = key.removesuffix(".alpha")
        match = _HALF.fullmatch(name)
        if name != key and tensor.numel() == 1:
            alphas[match[1] if match else name] = float(tensor)
        elif match and name == key:
            halves.setdefault(match[1], {})["down" if match[2] in ("down", "A") else "up"] = tensor
        else:
            raise BadModel(
                f"{file} is no plain LoRA: it holds {key}, and pairs of lora_down and lora_up (or lora_A and lora_B) with "
                "their alpha are read, while DoRA, LoHa, LoKr and whole layers are not."
            )
    for name, pair in halves.items():
        if len(pair) == 1:
            raise BadModel(f"{file} is damaged: of {name} it has {next(iter(pair))} alone.")
    return {name: (pair["down"], pair["up"]) for name, pair in halves.items()}, alphas


def _without_ldm_names(tensors: dict[str, Tensor], layers_per_block: int, file: Path) -> dict[str, Tensor]:
    """kohya's files for SDXL count a UNet's blocks as its first authors did; diffusers has the conversion."""
    if not any(re.match("lora_unet_(input|middle|output)_block", key) for key in tensors):
        return tensors
    from diffusers.loaders import StableDiffusionXLLoraLoaderMixin

    own = {key: tensor for key, tensor in tensors.items() if key.startswith("lora_unet_")}
    unet_config = SimpleNamespace(layers_per_block=layers_per_block)
    try:
        state, alphas = StableDiffusionXLLoraLoaderMixin.lora_state_dict(dict(own), unet_config=unet_config)
    except (ValueError, KeyError, IndexError) as error:
        raise BadModel(f"{file} cannot be read: its layers are named in a way that is not known ({error}).") from error
    named: dict[str, Tensor] = state | {key: torch.tensor(alpha) for key, alpha in (alphas or {}).items()}
    return named | {key: tensor for key, tensor in tensors.items() if key not in own}


def _spelled(name: str) -> str:
    for pattern, spelling in _SPELLING:
        name = re.sub(pattern, spelling, name)
    return name


def _fits(down: Tensor, up: Tensor, weight: Sequence[int]) -> bool:
    """Whether two factors make a change of a weight: (out, in), or (out, in, height, width) of a convolution."""
    rank, ones = len(down), [1] * (len(weight) - 2)
    return list(down.shape) == [rank, *weight[1:]] and list(up.shape) == [weight[0], rank, *ones]


def peft_config(file: Path) -> Path:
    """Where PEFT says how strong a LoRA of its own is."""
    return file.with_name("adapter_config.json")


def _configs(file: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """What is said of alphas beside the tensors, by component ("" is any): diffusers in the file, PEFT in one beside it."""
    if any(name.startswith("base_model.model.") for name in names):
        config = peft_config(file)
        if not config.is_file():
            raise BadModel(f"{file} lacks its {config.name}, in which PEFT says how strong it is: put that beside it.")
        return {"": read_json(config)}
    with safe_open(file, "pt") as handle:
        text = (handle.metadata() or {}).get("lora_adapter_metadata", "{}")
    try:
        held = json.loads(text).items()
    except (ValueError, AttributeError) as error:
        raise BadModel(f"{file} is damaged: its lora_adapter_metadata is no JSON object.") from error
    return {part: {key[len(part) + 1 :]: value for key, value in held if key.startswith(f"{part}.")} for part in PARTS}


def _scale(file: Path, name: str, rank: int, alpha: float | None, config: Mapping[str, Any]) -> float:
    """``alpha / rank`` of a layer, alpha being the file's, the config's, or the rank."""
    if alpha is None:
        alpha = config.get("lora_alpha", rank)
        for pattern, value in (config.get("alpha_pattern") or {}).items():
            plain = pattern.removeprefix("^")
            if not re.fullmatch(r"[\w.]+", plain):
                raise BadModel(f"{file} gives alphas by the pattern {pattern!r}: only names of layers are read.")
            if f".{name}".endswith(f".{plain}"):
                alpha = value
    try:
        return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise BadModel(f"{file} is damaged: the alpha of {name} is {alpha!r}, its rank {rank}.") from error


def _meant_for(halves: Mapping[str, tuple[Tensor, Tensor]], shapes: Shapes) -> str:
    """Which model a LoRA was made for, by what its cross attention is told."""
    made = next((down.shape[1] for name, (down, _) in halves.items() if _spelled(name).endswith("attn2_to_k")), None)
    own = next((shape[1] for name, shape in shapes["unet"].items() if name.endswith("attn2.to_k")), None)
    if made is None or own is None or made == own:
        return "take one that was trained on this model or its relatives"
    known = f", which {_TRAINED_ON[made]} has" if made in _TRAINED_ON else ""
    return f"it was trained on a UNet that is told text of width {made}{known}, and this one is told {own}"
