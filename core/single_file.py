"""A whole checkpoint in one file, laid out as its training code had it (LDM, ComfyUI): its kind, its parts.

What is not in the file, configs, tokenizers, scheduler, is that of the catalog's model of its kind.
The conversions are diffusers' own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from .errors import BadModel

SUFFIXES = (".safetensors", ".ckpt")

_UNET, _VAE = "model.diffusion_model.", "first_stage_model."
_FIRST, _CLASSES, _VECTOR = f"{_UNET}input_blocks.0.0.weight", f"{_UNET}label_emb.weight", f"{_UNET}label_emb.0.0.weight"
_OPENCLIP = "cond_stage_model.model."

_SD = {"unet": _UNET, "vae": _VAE, "text_encoder": "cond_stage_model.transformer."}
LAYOUTS: Mapping[str, Mapping[str, str]] = {
    "sd-1.5": _SD,
    "sd-1.5-inpainting": _SD,
    "x4-upscaler": {"unet": _UNET, "vae": _VAE, "text_encoder": _OPENCLIP},
    "sdxl-base": {
        "unet": _UNET,
        "vae": _VAE,
        "text_encoder": "conditioner.embedders.0.transformer.",
        "text_encoder_2": "conditioner.embedders.1.model.",
    },
    "sdxl-refiner": {"unet": _UNET, "vae": _VAE, "text_encoder_2": "conditioner.embedders.0.model."},
}
"""The kinds of checkpoints, by the catalog's names, and under which prefix each keeps its components; text
encoders under "….transformer." have transformers' names, those under "….model." OpenCLIP's."""


def is_single_file(name: str) -> bool:
    """Whether a model's name is that of one file."""
    return Path(name).suffix in SUFFIXES


def kind_of(tensors: Mapping[str, Tensor], file: Path) -> str:
    """The name in the catalog of the model that a checkpoint is a version of, by its keys and first shape.

    Raises:
        BadModel: it is of no known kind.
    """
    if _FIRST not in tensors or tensors[_FIRST].ndim != 4:
        first = next(iter(sorted(tensors)), "none")
        raise BadModel(
            f"{file} is of no known kind: a checkpoint in one file has the weights {_FIRST}, and it has {len(tensors)} "
            f"others ({first}, …): LoRAs, single components and models other than {', '.join(LAYOUTS)} are not read."
        )
    if "edm_mean" in tensors or "edm_vpred.sigma_max" in tensors:
        raise BadModel(f"{file} is a model of EDM's noise levels (it has the key edm_…), which no scheduler here has.")
    if _CLASSES in tensors:
        return "x4-upscaler"
    if any(key.startswith(_OPENCLIP) for key in tensors):
        raise BadModel(
            f"{file} is of no known kind: {_OPENCLIP}… without {_CLASSES} is Stable Diffusion 2, "
            f"and only {', '.join(LAYOUTS)} are read."
        )
    if _VECTOR in tensors:
        refiner = any(key.startswith(LAYOUTS["sdxl-refiner"]["text_encoder_2"]) for key in tensors)
        return "sdxl-refiner" if refiner else "sdxl-base"
    return "sd-1.5-inpainting" if tensors[_FIRST].shape[1] == 9 else "sd-1.5"


def parts_in(tensors: Mapping[str, Tensor], kind: str) -> tuple[str, ...]:
    """The components a checkpoint of this kind holds; many come without text encoders or VAE."""
    return tuple(part for part, prefix in LAYOUTS[kind].items() if any(key.startswith(prefix) for key in tensors))


def scheduler_changes(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What a checkpoint says of its training by empty tensors with a name, as ComfyUI reads them."""
    changes: dict[str, Any] = {"prediction_type": "v_prediction"} if "v_pred" in tensors else {}
    return changes | ({"rescale_betas_zero_snr": True} if "ztsnr" in tensors else {})


def convert(tensors: Mapping[str, Tensor], part: str, config: Mapping[str, Any], file: Path) -> dict[str, Tensor]:
    """The weights of one component under the names of diffusers and transformers.

    Args:
        config: the component's, to tell how its blocks are counted.

    Raises:
        BadModel: its weights are not all there.
    """
    from diffusers.loaders import single_file_utils as theirs

    prefix = LAYOUTS[kind_of(tensors, file)][part]
    own: dict[str, Any] = {key: tensor for key, tensor in tensors.items() if key.startswith(prefix)}
    try:
        if part == "unet":
            converted = theirs.convert_ldm_unet_checkpoint(own, config)
        elif part == "vae":
            converted = theirs.convert_ldm_vae_checkpoint(own, config)
        elif prefix.endswith(".model."):
            model = SimpleNamespace(config=SimpleNamespace(**config))
            converted = theirs.convert_open_clip_checkpoint(model, own, prefix)
        else:
            converted = {key.removeprefix(prefix): tensor for key, tensor in own.items()}
    except (KeyError, IndexError, AttributeError, TypeError) as error:
        raise BadModel(f"{file} cannot be converted: its {part} is not complete ({error}).") from error
    if "CLIPTextModel" in (config.get("architectures") or []):  # ComfyUI writes a projection that it does not use
        converted.pop("text_projection.weight", None)
    return dict(converted)


def control_config(unet: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a ControlNet for a UNet, as ``ControlNetModel.from_unet`` makes it."""
    return {**unet, "_class_name": "ControlNetModel", "in_channels": unet.get("out_channels", 4)}


def convert_controlnet(tensors: Mapping[str, Tensor], config: Mapping[str, Any], file: Path) -> dict[str, Tensor]:
    """The weights of a ControlNet in one file under diffusers' names, which it may have already.

    Raises:
        BadModel: it holds something else.
    """
    from diffusers.loaders import single_file_utils as theirs

    try:
        converted = theirs.convert_controlnet_checkpoint(dict(tensors), config)
    except (KeyError, IndexError, AttributeError, TypeError) as error:
        raise BadModel(f"{file} cannot be converted: it is no complete ControlNet ({error}).") from error
    if any(tensor is None for tensor in converted.values()):
        raise BadModel(f"{file} is no ControlNet: {next(key for key in converted if converted[key] is None)} is missing.")
    return dict(converted)
