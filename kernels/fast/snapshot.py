"""Whether a network still is the one that was captured: asked before every replay, which would not notice otherwise."""

from __future__ import annotations

from typing import Any

from diffusers.models.attention_processor import AttnAddedKVProcessor2_0, AttnProcessor2_0
from torch import nn

from .shared import Shared
from .untouched import KNOWN, hooked_everywhere

RECORDING = "transformers.utils.output_capturing"
"""Whose hooks only collect the hidden states that a call returns."""


class Snapshot:
    """What a captured step or call depends on beside its inputs: the modules, hooks, forwards and where the weights lie.

    The values of weights are not part of it: a replay reads them anew. It is compared while the device is still busy with
    the step before. Whatever was there is held, so that nothing new can have its identity.
    """

    def __init__(self, network: nn.Module) -> None:
        modules = list(network.modules())
        self._hooks = [hooks for m in modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self._parents = [m._modules for m in modules if m._modules]
        self._attributes = [(vars(m), name) for m in modules for name in _watched(m)]
        self._weights = [m._parameters for m in modules if m._parameters]
        self._state = self._look()

    def holds(self) -> bool:
        """Whether nothing has changed."""
        return hooked_everywhere() is None and self._look() == self._state

    def _look(self) -> tuple[list[Any], ...]:
        hooks = [tuple(hooks) for hooks in self._hooks if hooks]  # by the numbers of their handles
        children = [child for parent in self._parents for child in parent.values()]
        replaced = [attributes.get(key) for attributes, key in self._attributes]
        at = [None if p is None else p.data_ptr() for weights in self._weights for p in weights.values()]
        return hooks, children, replaced, at


def _watched(module: nn.Module) -> tuple[str, ...]:
    """The attributes that may be set on it later; of a block on the way up, FreeU's."""
    processor = ("processor",) if hasattr(module, "processor") else ()
    return "forward", "training", *processor, *(("s1", "s2", "b1", "b2") if hasattr(module, "resolution_idx") else ())


def strangers(network: nn.Module, shared: Shared) -> str | None:
    """Why a network cannot be captured: something in it that is neither a library's nor ours; None if it can.

    What others put in may act otherwise at every step (a hook), or have settings that change (LoRA's scale).
    """
    if why := hooked_everywhere():
        return why
    for name, m in network.named_modules():
        at = name or "the network"
        hooks = (*m._forward_hooks.values(), *m._forward_pre_hooks.values())
        if any(getattr(hook, "__module__", None) != RECORDING for hook in hooks):
            return f"{at} has a hook"
        if not type(m).__module__.startswith(KNOWN):
            return f"{at} is a {type(m).__module__.split('.')[0]} {type(m).__name__}"
        if m.__dict__.get("forward") is not shared.forwards.get(m):
            return f"the forward of {at} was replaced"
        processor = getattr(m, "processor", None)
        if processor is not None and type(processor) not in (AttnProcessor2_0, AttnAddedKVProcessor2_0):
            return f"{at} has a {type(processor).__name__}"
    return None
