"""``optimise(network)``: the network made fast in place, and as it was again after ``undo()``.

No module is replaced and no weight renamed or changed: some modules' ``forward`` is ours for this one network, the
weights of queries, keys and values lie behind one another in memory, and convolutions have their weights channels-last.
What is put into the network later (LoRA, an attention processor, hooks, quantised layers) is honoured: the layer that
has it runs as diffusers wrote it, and a :class:`~unrolled.core.errors.Note` says so once.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from types import MethodType, TracebackType
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention, SpatialNorm
from diffusers.models.autoencoders.vae import Decoder, Encoder
from diffusers.models.downsampling import KDownsample2D
from diffusers.models.normalization import AdaGroupNorm
from diffusers.models.resnet import ResnetBlock2D, ResnetBlockCondNorm2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import KUpsample2D
from torch import nn
from transformers.models.clip.modeling_clip import CLIPAttention

from ...core.errors import BadInput
from ..backends import Backend, Choice, ours, require
from . import attention_layer, blocks, clip, convolutions, unet
from .attention_layer import Forward
from .projections import Fused, join_after_moves, joinable
from .shared import Shared

MARK = "_unrolled_fast"
"""Where a network remembers that it is fast; not a weight, so no ``state_dict`` has it."""


class Optimised:
    """A network that was made fast, until :meth:`undo`; also a context manager that undoes it at its end.

    Attributes:
        network: the network itself, the same object as before.
        shared: settings, and what its layers share.
        replaced: how many modules of each class have our forward.
        pieces: captured steps, by shape; see :mod:`.capture`.
    """

    def __init__(self, network: Any, shared: Shared) -> None:
        self.network, self.shared = network, shared
        self.replaced = Counter[str]()
        self.pieces: dict[Any, Any] = {}
        self._undo: list[Callable[[], None]] = []

    def __repr__(self) -> str:
        parts = ", ".join(f"{count} {name}" for name, count in sorted(self.replaced.items()))
        return (
            f"Optimised({type(self.network).__name__}: {parts or 'nothing to do'}; {len(self.shared.fused)} fused weights)"
        )

    def __enter__(self) -> Optimised:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.undo()

    def __deepcopy__(self, memo: dict[int, Any]) -> Optimised:
        """Of a copied network: fast as well, and undone by itself; what was captured stays with the original."""
        made = Optimised(copy.deepcopy(self.network, memo), self.shared)
        made.replaced.update(self.replaced)
        copies = [memo[id(module)] for module in self.shared.forwards if id(module) in memo]

        def back() -> None:
            for module in copies:
                for name in ("forward", "_apply"):
                    module.__dict__.pop(name, None)
            made.network.__dict__.pop(MARK, None)
            if self.shared.channels_last:
                made.network.to(memory_format=torch.contiguous_format)

        made._undo.append(back)
        return made

    def undo(self) -> None:
        """The network as it was: forwards, memory layout, nothing kept. Doing it twice is no fault."""
        self.pieces.clear()
        while self._undo:
            self._undo.pop()()

    def put(self, module: nn.Module, forward: Forward) -> None:
        """Let ``forward`` be the module's."""
        module.forward = self.shared.forwards[module] = ours = MethodType(forward, module)
        self.replaced[type(module).__name__] += 1

        def back() -> None:
            if vars(module).get("forward") is ours:  # and not a hook of accelerate's, say, around it
                del module.forward

        self._undo.append(back)

    def fuse(self, owner: nn.Module, layers: list[nn.Linear]) -> None:
        """Lay the weights of some projections out as one."""
        if not joinable(layers) or any(layer in self.shared.fused for layer in layers):
            return
        self.shared.fused[layers[0]] = fused = Fused(layers)
        self._undo.append(fused.part)
        self._undo.append(join_after_moves(owner, fused))

    def lay_out(self, weight: nn.Parameter) -> None:
        """A convolution's weight channels-last."""
        if weight.is_contiguous(memory_format=torch.channels_last):
            return
        weight.data = weight.data.contiguous(memory_format=torch.channels_last)

        def back() -> None:
            weight.data = weight.data.contiguous()

        self._undo.append(back)


def optimise(
    network: Any,
    *,
    attention: Backend = "auto",
    norms: Choice = "auto",
    channels_last: bool = True,
    fuse_qkv: bool = True,
    winograd: bool = False,
) -> Optimised:
    """Make a diffusers network fast in place.

    For UNet2DConditionModel (every system here), AutoencoderKL and VQModel, and of transformers' CLIP encoders, of text and
    pictures, the norms and attention.

    Args:
        attention: the backend of attention, see :func:`~unrolled.kernels.attention.attention`.
        norms: the backend of GroupNorm, LayerNorm and GEGLU.
        channels_last: convolutions in channels-last memory, in which a picture's tokens need no copy.
        fuse_qkv: one product for queries, keys and values (of cross attention: keys and values).
        winograd: on a CPU in bfloat16, wide 3x3 convolutions by :func:`~unrolled.kernels.winograd.winograd`, for which
            their weights are kept a second time, 16/9 as large, and the output's rounding error grows by a third; see
            docs/profiling.md.

    Returns:
        What undoes it. Speaks for the network in :func:`~unrolled.kernels.fast.kept.prepared` too.

    Raises:
        BadInput: it is fast already, or a backend cannot run here, or not with its heads.
    """
    if fast_of(network) is not None:
        raise BadInput(f"This {type(network).__name__} is optimised already: undo that first.")
    found = [(name, m, _forward_for(m, network)) for name, m in network.named_modules()]
    parameter = next(network.parameters(), None)
    if parameter is not None and parameter.device.type != "meta":
        ours("norms", norms, parameter)
        heads = {size for _, module, forward in found if forward is not None and (size := _head_size(module)) is not None}
        for size in (None, *sorted(heads)):
            require(attention, parameter.device, size, parameter.dtype)
    made = Optimised(network, Shared(attention, norms, channels_last))
    for name, module, forward in found:
        if forward is None:
            continue
        made.shared.names[module] = name or type(module).__name__
        made.put(module, forward(made.shared))
        for layers in _projections(module) if fuse_qkv else ():
            made.fuse(module, layers)
    if winograd:
        for module in network.modules():
            if convolutions.supported(module) and "forward" not in vars(module):
                made.put(module, convolutions.convolution_forward(made.shared))
        made._undo.append(made.shared.filtered.clear)
    if channels_last:
        for module in network.modules():
            if isinstance(module, nn.Conv2d) and type(module.weight) is nn.Parameter and module.weight.ndim == 4:
                made.lay_out(module.weight)
    network.__dict__[MARK] = made
    made._undo.append(lambda: network.__dict__.pop(MARK, None))
    return made


def fast_of(network: Any) -> Optimised | None:
    """What made a network fast; None if nothing did."""
    found = vars(network).get(MARK)
    return found if isinstance(found, Optimised) else None


def _forward_for(module: nn.Module, network: nn.Module) -> Callable[[Shared], Forward] | None:
    """Which of our forwards stands for a module's own; None if none does all that it can do."""
    m: Any = module
    if "forward" in vars(module):
        return None  # somebody's hook that works by replacing it, accelerate's say
    if isinstance(module, Attention):
        return attention_layer.attention_forward if attention_layer.supported(m) else None
    if type(module) is CLIPAttention:
        return None if clip.touched(m) else clip.clip_attention_forward
    if type(module) is ResnetBlock2D:
        known = type(m.nonlinearity) is nn.SiLU and m.time_embedding_norm in ("default", "scale_shift")
        return blocks.resnet_forward if known else None
    if type(module) is Transformer2DModel:
        return blocks.transformer_forward if m.is_input_continuous else None
    if type(module) is BasicTransformerBlock:
        return blocks.block_forward if m.norm_type == "layer_norm" and m.pos_embed is None else None
    if type(module) is AdaGroupNorm:
        return blocks.ada_group_norm_forward if m.act is None else None
    if type(module) is nn.LayerNorm:
        # In a transformer block they are its own; elsewhere they run once a prompt.
        return blocks.layer_norm_forward if type(network).__name__.startswith("CLIP") else None
    if type(module) in (Encoder, Decoder):
        ends = (type(m.conv_norm_out), type(m.conv_act))
        return blocks.coder_forward if ends == (nn.GroupNorm, nn.SiLU) else None
    return _ALWAYS.get(type(module))


def _head_size(module: Any) -> int | None:
    if isinstance(module, CLIPAttention):
        return int(module.head_dim)
    return int(module.inner_dim // module.heads) if isinstance(module, Attention) else None


def _projections(module: nn.Module) -> list[list[nn.Linear]]:
    """Of an attention layer, those that have one input each."""
    if isinstance(module, Attention):
        return attention_layer.projections(module)
    return [clip.projections(module)] if isinstance(module, CLIPAttention) else []


_ALWAYS: dict[type[nn.Module], Callable[[Shared], Forward]] = {
    UNet2DConditionModel: unet.unet_forward,
    ResnetBlockCondNorm2D: blocks.conditioned_resnet_forward,
    SpatialNorm: attention_layer.spatial_norm_forward,
    GEGLU: blocks.geglu_forward,
    KDownsample2D: blocks.k_downsample_forward,
    KUpsample2D: blocks.k_upsample_forward,
}
