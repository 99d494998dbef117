"""A network's call as one piece, before or after the loop: that of a VAE's decoder, or of a CLIP encoder.

A decoder is captured inside its VAE, where slices, and the tiles of a large picture, come in the same shape again; a CLIP
encoder whole, with the hidden states that were asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diffusers.models.autoencoders.vae import Decoder
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from ...core.errors import BadInput
from .attention_layer import Forward
from .network import Optimised, fast_of
from .recorded import Mode, Recorded, Recorder


def captured_call(network: Any, *, mode: Mode = "auto", compiler: dict[str, Any] | None = None) -> CapturedCall:
    """From now on an optimised VAE decodes, or an optimised CLIP encoder encodes, by pieces: one for each shape.

    Whoever calls the network calls the piece: ``decode``, ``encode_text``, diffusers' pipelines. Undoing ``optimise``
    undoes this too. A piece costs a few calls at first and keeps the memory that one takes, so it pays where a shape comes
    often. Weights that are cast or moved for every call make it anew each time (SDXL's VAE in float16, which decodes in
    float32: load it in bfloat16).

    Args:
        mode, compiler: as for :func:`~unrolled.kernels.fast.capture.captured`.

    Raises:
        BadInput: it is no optimised VAE or CLIP encoder, or captured already, or there is no such mode.
    """
    module = getattr(network, "decoder", network)
    made = fast_of(network)
    if made is None or not (type(module) is Decoder or type(module).__name__.startswith("CLIP")):
        raise BadInput("Only calls of an optimised VAE or CLIP encoder can be captured: call optimise(network) first.")
    plain = made.shared.forwards.get(module)
    if vars(module).get("forward") is not plain or (plain and isinstance(plain.__func__, CapturedCall)):
        raise BadInput(f"The calls of this {type(network).__name__} are captured already, or its forward is another's.")
    recorder = Recorder("call", "runs as it is", mode, compiler)
    call = CapturedCall(made, module, plain.__func__ if plain else type(module).forward, recorder)
    made.put(module, call)
    return call


@dataclass(eq=False)
class CapturedCall:
    """See :func:`captured_call`; it stands where the forward of ``module`` stood, which is ``plain`` now."""

    made: Optimised
    module: nn.Module
    plain: Forward
    recorder: Recorder

    @property
    def seconds(self) -> float:
        """What making the pieces took, the first call's cost beside the call itself."""
        return self.recorder.seconds

    def __call__(self, module: nn.Module, /, *args: Any, **options: Any) -> Any:
        """As the module's own."""
        leaves, form = tree_flatten((args, options))
        if module is not self.module or not all(isinstance(leaf, Tensor | bool | int | None) for leaf in leaves):
            return self.plain(module, *args, **options)  # a copy of the network, or something that is no plain call

        def make() -> CallPiece:
            return CallPiece(self, leaves, form)

        kinds = [(leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        # transformers' config says what else is to be returned, and by which attention.
        key = (form, *kinds, repr(vars(module.config)) if hasattr(module, "config") else None)
        piece = self.recorder.piece(self.made, self.made.network, key, make)
        return self.plain(module, *args, **options) if piece is None else piece.run(leaves)


class CallPiece:
    """One captured call for arguments of one shape: their buffers, and what is recorded on them."""

    def __init__(self, call: CapturedCall, leaves: list[Any], form: Any) -> None:
        self.leaves = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        args, options = tree_unflatten(self.leaves, form)
        device = next(leaf.device for leaf in leaves if isinstance(leaf, Tensor))
        recorder = call.recorder
        self.recorded = Recorded(
            lambda: call.plain(call.module, *args, **options), call.made.network, device, recorder.mode, recorder.compiler
        )

    def run(self, leaves: list[Any]) -> Any:
        """What the call gives for these arguments."""
        for mine, given in zip(self.leaves, leaves, strict=True):
            if isinstance(mine, Tensor):
                mine.copy_(given)
        return self.recorded()
