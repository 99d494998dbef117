"""Looking into a network's attention, and changing it: the seam below the loop's three.

What attention maps, prompt-to-prompt, perturbed or shared attention need: they differ in what a layer makes of its
queries, keys and values, and in nothing else. Whatever processor diffusers has in a layer stays and does the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..core.errors import BadInput


class Place(NamedTuple):
    """An attention layer in a network.

    Args:
        name: the module's, e.g. ``mid_block.attentions.0.transformer_blocks.0.attn2``.
        cross: whether its keys are the context's; in Kandinsky's decoders the context's come first and the picture's own
            after them.
    """

    name: str
    cross: bool


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From queries, keys and values, each (batch, tokens, heads, head size), to what comes out, as the queries."""

Edit = Callable[[Place, Tensor, Tensor, Tensor, Attend], Tensor]
"""What to compute in place of ``attend(q, k, v)``."""


@contextmanager
def attending(network: Any, edit: Edit, where: Callable[[Place], bool] = lambda place: True) -> Iterator[None]:
    """Within it, every attention layer of a diffusers network gives ``edit(place, q, k, v, attend)``.

    Calls may lie in one another: the inner edit is asked first, and its ``attend`` is the outer one's. Of guidance's one
    batch the first half is the unconditional. An IP-Adapter's layer attends twice, to the prompt and to the picture.

    Args:
        network: a UNet, a VAE or Kandinsky's prior, optimised or not; its other layers stay fast.
        edit: called once for every attention.
        where: leaves out places.

    Raises:
        BadInput: when the network runs, if a layer's attention is not torch's (xformers, say) and so cannot be looked into.
    """
    from diffusers.models.attention_processor import Attention

    layers = [(name, layer) for name, layer in network.named_modules() if isinstance(layer, Attention)]
    before = [(layer, layer.processor) for _, layer in layers]
    try:
        for name, layer in layers:
            place = Place(name, layer.is_cross_attention or layer.added_kv_proj_dim is not None)
            if where(place):
                layer.set_processor(_Attending(layer.processor, place, edit))
        yield
    finally:
        for layer, processor in before:
            layer.set_processor(processor)


class _Attending:
    """A layer's processor, but for the attention itself."""

    def __init__(self, processor: Any, place: Place, edit: Edit) -> None:
        self.processor, self.place, self.edit = processor, place, edit

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with _Instead(self.place, self.edit) as mode:
            out = self.processor(*args, **kwargs)
        if not mode.asked:
            raise BadInput(
                f"The attention of {self.place.name} runs in {type(self.processor).__name__}, which cannot be looked into: "
                "load the model with attention sdpa."
            )
        return out


class _Instead(TorchFunctionMode):
    """Lets an edit stand for torch's attention while one processor runs; torch turns it off while it asks."""

    def __init__(self, place: Place, edit: Edit) -> None:
        super().__init__()
        self.place, self.edit, self.asked = place, edit, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        self.asked = True
        (q, k, v), rest = args[:3], args[3:]

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return func(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), *rest, **kwargs).transpose(1, 2)

        return self.edit(self.place, q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attend).transpose(1, 2)
