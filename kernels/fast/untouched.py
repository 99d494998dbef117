"""Whether a layer still is what it was when its network was made fast: adapters, hooks, quantisation are not ours to skip.

Our forwards pass by the modules whose work they do themselves. Before they do, at every call, they ask here whether
somebody has put anything into these modules since: a LoRA layer in place of a Linear, a hook, another forward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as everywhere

Version = tuple[int, int]

KNOWN = ("torch.nn.", "diffusers.models.", "transformers.models.clip.", "transformers.activations")
"""Where modules are from that do the same at every call, unless something is put on them."""


def fault(layer: nn.Module | None, kind: type[nn.Module] | tuple[type[nn.Module], ...]) -> str | None:
    """Why a layer cannot be passed by, in a few words; None if it is just a ``kind`` (or is not there at all)."""
    if layer is None:
        return None
    if type(layer) not in (kind if isinstance(kind, tuple) else (kind,)):
        return f"it is a {type(layer).__module__.split('.')[0]} {type(layer).__name__}"
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks:
        return "it has a hook"
    if "forward" in layer.__dict__:
        return "its forward was replaced"
    weight = layer._parameters.get("weight")
    if weight is not None and type(weight) is not nn.Parameter and type(weight) is not Tensor:
        return f"its weight is a {type(weight).__name__}"
    return None


def hooked_everywhere() -> str | None:
    """Why no layer at all can be passed by: torch has hooks that are called for every module."""
    if everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks:
        return "a hook is registered for all modules"
    return None


def first_fault(layers: dict[str, tuple[nn.Module | None, Any]]) -> str | None:
    """The first layer that cannot be passed by, with why."""
    if why := hooked_everywhere():
        return why
    for name, (layer, kind) in layers.items():
        if why := fault(layer, kind):
            return f"of {name}: {why}"
    return None


def dropping(dropout: nn.Module) -> bool:
    """Whether a dropout layer does anything."""
    return dropout.training and bool(getattr(dropout, "p", 0.0))


def pristine(tree: nn.Module | None) -> bool:
    """Whether every module below, and this one, is a library's own, without hooks: what it computes of the same
    numbers stays the same while :func:`versions` do.
    """
    if hooked_everywhere():
        return False
    return tree is None or all(type(m).__module__.startswith(KNOWN) and fault(m, type(m)) is None for m in tree.modules())


def version(tensor: Tensor | None) -> Version:
    """Changes when a tensor is written to or gets other memory; an edit through ``.data`` alone is not seen."""
    return (0, 0) if tensor is None else (tensor.data_ptr(), tensor._version)


def versions(*layers: nn.Module | None) -> tuple[Version, ...]:
    """Of all the weights of these modules."""
    return tuple(version(p) for layer in layers if layer is not None for p in layer.parameters())


def keepable(*tensors: Tensor | None) -> bool:
    """Whether torch counts the changes of these tensors: it does not of those made in inference mode."""
    return not any(t is not None and t.is_inference() for t in tensors)


def watching_gradients() -> bool:
    """Whether somebody may want gradients of weights, for which nothing is kept and no weights are looked at as one."""
    return torch.is_grad_enabled()
