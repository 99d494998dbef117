"""IP-Adapters: pictures as prompts, by keys and values of their own in every cross attention.

(Ye et al., arXiv:2308.06721, sec. 3.2.) Read and built by diffusers' code; put on a UNet for a while, then taken off.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from .denoiser import IMAGE_PROMPTED
from .errors import BadInput, BadModel
from .model import Model
from .weights import read_tensors


@dataclass(frozen=True, repr=False)
class ImageAdapter:
    """An IP-Adapter for one UNet.

    Args:
        name: its file.
        image_encoder: CLIP's, that it was trained with.
        projection: makes tokens of what the encoder says.
        processors: by the UNet's name of each cross attention.
        by_patches: whether it takes the encoder's last states but one ("plus") in place of one embedding for a picture.
    """

    name: str
    image_encoder: Any
    projection: Any
    processors: Mapping[str, Any]
    by_patches: bool

    def __repr__(self) -> str:
        return f"ImageAdapter({self.name}, {len(self.processors)} layers{', by patches' * self.by_patches})"


def read_image_adapter(file: Path, model: Model, image_encoder: Any) -> ImageAdapter:
    """An IP-Adapter from its ``.safetensors`` file, for a model's UNet: plain, plus, or full face.

    Raises:
        BadInput: the model is neither Stable Diffusion nor SDXL; BadModel: the file is no such adapter, or for another.
    """
    if model.system not in ("sd", "sdxl"):
        raise BadInput(f"Image prompts go with Stable Diffusion and SDXL, and {model.name} is neither.")
    held, unet = read_halves(file, model.unet.config, model.name), model.unet
    try:
        every = unet._convert_ip_adapter_attn_to_diffusers([held], low_cpu_mem_usage=False)
        projection = unet._convert_ip_adapter_image_proj_to_diffusers(held["image_proj"], low_cpu_mem_usage=False)
    except (KeyError, RuntimeError, IndexError) as error:
        reason = str(error).strip().splitlines()[0]
        raise BadModel(f"{file} does not fit the UNet of {model.name} ({reason}): take the IP-Adapter for it.") from error
    processors = {name: held for name, held in every.items() if hasattr(held, "to_k_ip")}
    for module in (projection, *processors.values()):
        module.to(model.device, model.dtype).requires_grad_(False).eval()
    return ImageAdapter(file.name, image_encoder, projection, processors, "proj.weight" not in held["image_proj"])


def read_halves(file: Path, unet: Mapping[str, Any], name: str) -> dict[str, dict[str, Tensor]]:
    """An adapter's weights as diffusers takes them: its projection's and its layers'.

    Raises:
        BadModel: the file is no such adapter, or one for another width of text than that of this UNet's config.
    """
    held: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for key, tensor in read_tensors(file).items():
        half, _, rest = key.partition(".")
        held.setdefault(half, {})[rest] = tensor
    layers = [tensor for key, tensor in held["ip_adapter"].items() if key.endswith("to_k_ip.weight")]
    if not layers or not {"proj.weight", "proj.3.weight", "latents"} & held["image_proj"].keys():
        raise BadModel(f"{file} is no IP-Adapter that is run: plain, plus and full-face ones are, those of Face ID are not.")
    if (theirs := layers[0].shape[-1]) != (ours := unet["cross_attention_dim"]):
        raise BadModel(f"{file} was made for a UNet told text of width {theirs}, and that of {name} is told {ours}.")
    return held


@contextmanager
def image_prompted(model: Model, adapter: ImageAdapter, scale: float = 1.0) -> Iterator[None]:
    """The model's UNet with an IP-Adapter on it, as it was afterwards whatever happens.

    Args:
        scale: of what the pictures add to every cross attention; 0 adds nothing.

    Raises:
        BadInput: the UNet has one on, or is offloaded layer by layer.
    """
    layers = {f"{name}.processor": layer for name, layer in model.unet.named_modules()}
    before = {layers[name]: layers[name].processor for name in adapter.processors}
    if any(weight.is_meta for weight in model.unet.parameters()):
        raise BadInput(f"The UNet of {model.name} is offloaded layer by layer, which leaves no room for image prompts.")
    if hasattr(model.unet, IMAGE_PROMPTED):
        raise BadInput(f"The UNet of {model.name} has an IP-Adapter on already, and takes one at a time.")
    setattr(model.unet, IMAGE_PROMPTED, adapter.name)
    try:
        for name, processor in adapter.processors.items():
            processor.scale = [scale]
            layers[name].set_processor(processor)
        yield
    finally:
        for layer, processor in before.items():
            layer.set_processor(processor)
        delattr(model.unet, IMAGE_PROMPTED)
