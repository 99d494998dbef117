"""The one owner of where components live: on the device, there only while they run, or layer by layer."""

from __future__ import annotations

import gc
import re
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal, get_args

import torch

from .checkpoint import tensor_bytes
from .errors import BadInput
from .weights import Part, read_json

Mode = Literal["resident", "model", "layer"]
"""Where a component lives: always on the device; there from its call until another component is called, else on
the CPU; or on the CPU, with every layer brought to the device for its own call alone."""

Offload = Literal["auto", "resident", "model", "layer"]

TILE_FROM = 1536 * 1536
"""Pictures of more pixels are decoded in tiles unless told otherwise: the decoder's memory grows with them."""

WORK = {"unet": 32, "controlnet": 32, "vae": 8, "movq": 12}
"""What a component computes with beside its weights, in units of its first width x latent cells (the UNet; guidance
makes a batch of two) or x pixels (the VAE; one picture at a time).

Counted by running the published structures on torch's meta device: SD 1.5's UNet 26.1, SDXL's, Kandinsky's and the
upscalers' 14.0 to 15.9, AutoencoderKL 6.0, MoVQ 10.0; rounded up for convolution workspaces. That is with attention
that keeps no matrix of scores: ``attention="reference"`` takes more. A ControlNet is a UNet's first half.
"""
OTHER_WORK = 64 * 2**20
"""The same of CLIP's encoders and the prior, in bytes: they see a few hundred tokens."""


@dataclass(frozen=True)
class Need:
    """What one component takes of the device, in bytes.

    Args:
        part: which component.
        weights: all its weights.
        layer: those of its largest layer.
        work: what it computes with.
    """

    part: str
    weights: int
    layer: int
    work: int


def read_need(part: Part, dtype: torch.dtype, size: tuple[int, int] = (0, 0), downscale: int = 1, batch: int = 1) -> Need:
    """A component's need, from what its weight files say of their tensors and from its config; no weights are read.

    Args:
        dtype: what the weights will be loaded in.
        size: width and height of the pictures in pixels.
        downscale: pixels to a latent cell.
        batch: pictures at a time.
    """
    config = read_json(part.folder / "config.json")
    upcast = part.name == "vae" and dtype == torch.float16 and config.get("force_upcast", True)  # as stages/decode.py
    dtype = torch.float32 if upcast else dtype
    layers = dict[str, int]()
    for name, count in tensor_bytes(part, dtype).items():
        layer = name.rpartition(".")[0]
        layers[layer] = layers.get(layer, 0) + count
    width, pixels = (config.get("block_out_channels") or [0])[0], size[0] * size[1]
    work = OTHER_WORK
    if part.name in ("unet", "controlnet"):
        work = WORK[part.name] * 2 * batch * (pixels // downscale**2) * width * dtype.itemsize
    elif part.name in WORK:
        work = WORK[part.name] * (min(pixels, TILE_FROM) if part.name == "vae" else pixels) * width * dtype.itemsize
    return Need(part.name, sum(layers.values()), max(layers.values(), default=0), work)


def peak(placed: Iterable[tuple[Need, Mode]]) -> int:
    """Bytes on the device at the worst moment: what always stays, and the component that takes most beside it."""
    placed = list(placed)
    stays = sum(need.weights for need, mode in placed if mode == "resident")
    lingers = max((need.weights for need, mode in placed if mode == "model"), default=0)

    def beside(need: Need, mode: Mode) -> int:
        return need.work + {"resident": lingers, "model": need.weights, "layer": lingers + need.layer}[mode]

    return stays + max((beside(need, mode) for need, mode in placed), default=0)


def choose(model: str, new: Sequence[Need], held: Sequence[tuple[Need, Mode]], budget: int) -> Mode:
    """The fastest mode in which a model's components fit into ``budget`` bytes beside those held already.

    Raises:
        BadInput: it fits in none; the message says what each would need.
    """
    peaks: dict[Mode, int] = {mode: peak([*held, *((need, mode) for need in new)]) for mode in get_args(Mode)}
    for mode, needed in peaks.items():
        if needed <= budget:
            return mode
    others = sum(need.weights for need, mode in held if mode == "resident")
    raise BadInput(
        f"{model} does not fit into {show_bytes(budget)} of device memory: it needs {show_bytes(peaks['layer'])} layer by "
        f"layer, {show_bytes(peaks['model'])} component by component, {show_bytes(peaks['resident'])} all at once"
        + (f", {show_bytes(others)} of it held by models loaded before (Shelf.keep frees them)" if others else "")
        + ": raise --vram, make the picture or the batch smaller, or use --dtype float16."
    )


def _nobody() -> None:
    """What runs when nothing does."""


class Placement:
    """Puts components where they live, by one rule for all.

    Args:
        device: where components run.
        offload: a mode, taken as given; or "auto" for the fastest one that fits.
        vram: bytes, or a size such as "8G" (2**30 bytes each), that torch may take of the device for "auto"; by
            default what is free on a CUDA device, and no limit elsewhere. A CUDA context takes about 0.5 GiB more.

    Raises:
        BadInput: a mode or a size that there is not.
    """

    def __init__(self, device: torch.device, offload: Offload = "auto", vram: int | str | None = None) -> None:
        if offload not in get_args(Offload):
            raise BadInput(f"There is no offload {offload!r}: use {', '.join(get_args(Offload))}.")
        self.device, self.offload = device, offload
        self.vram = read_bytes(vram) if isinstance(vram, str) else vram
        if self.vram is not None and self.vram <= 0:
            raise BadInput(f"vram must be above 0 bytes, got {vram}.")
        self._running: Callable[[], Any] = _nobody

    def mode(self, model: str, new: Sequence[Need], held: Sequence[tuple[Need, Mode]] = ()) -> Mode:
        """How to place the components of a model that are new beside those held.

        Raises:
            BadInput: with "auto", if they fit in no mode.
        """
        if self.offload != "auto":
            return self.offload
        budget = self.vram
        if budget is None:
            if self.device.type != "cuda":
                return "resident"
            budget = torch.cuda.mem_get_info(self.device)[0] + torch.cuda.memory_reserved(self.device)
        return choose(model, new, held, budget)

    def put(self, component: torch.nn.Module, mode: Mode) -> None:
        """Place a component that has just been read, on the CPU, once and for all."""
        if mode == "resident":
            component.to(self.device)
        elif mode == "model":
            component.register_forward_pre_hook(lambda module, _: self._fetch(module))
            # diffusers' VAEs ask this one before encode and decode, which are no forward (its apply_forward_hook).
            component._hf_hook = SimpleNamespace(pre_forward=self._fetch)  # type: ignore[assignment]
        else:
            from accelerate import cpu_offload

            for layers in component.children():
                cpu_offload(layers, self.device)
            for tensor in (*component.parameters(recurse=False), *component.buffers(recurse=False)):
                tensor.data = tensor.data.to(self.device)  # few, and used outside forward too (the prior's clip_mean)

    def _fetch(self, component: torch.nn.Module) -> None:
        """Bring a component to the device, in place of the one that ran before."""
        before = self._running()
        if before is component:
            return
        self._running = weakref.ref(component)
        if before is not None:
            before.to("cpu")
            release(self.device, cycles=False)
        try:
            component.to(self.device)
        except BaseException:  # out of memory half way: a smaller batch will be tried
            component.to("cpu")
            self._running = _nobody
            raise


def release(device: torch.device, cycles: bool = True) -> None:
    """Give back what nothing refers to any more, so that others see the memory as free.

    Args:
        cycles: look for what only refers to itself, as hooked components do; it takes 0.3 s.
    """
    if cycles:
        gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def read_bytes(text: str) -> int:
    """A size such as "8G", "7.5GiB", "900M" or "1000000" in bytes; K, M, G are powers of 1024.

    Raises:
        BadInput: it is not one.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", text, re.IGNORECASE)
    if match is None:
        raise BadInput(f"{text!r} is no size of memory: give a number with K, M or G, such as 8G.")
    return int(float(match[1]) * 1024.0 ** ("KMGT".index(match[2].upper()) + 1 if match[2] else 0))


def show_bytes(count: int) -> str:
    """A number of bytes for people."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
