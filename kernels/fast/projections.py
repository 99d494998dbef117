"""The weights of neighbouring projections (queries, keys, values) laid out as one, so that one product does for them all.

The Linear layers and their Parameters stay what and where they are in the network; only the memory behind them is one.
Names, values, ``load_state_dict`` and ``state_dict`` know nothing of it. Whoever gives a Parameter other memory
(``.data``, offloading layer by layer) takes it out again, and the layers are used one by one as before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from .untouched import watching_gradients

Group = tuple[nn.Linear, ...]


class Fused:
    """Several Linear layers of one input as one.

    Args:
        layers: with equally many inputs and one dtype, all of them with a bias or none.
    """

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self.layers = tuple(layers)
        self.join()

    def join(self) -> None:
        """Put the weights behind one another in new memory, and let the Parameters look at it."""
        self.weight = _joined([layer.weight for layer in self.layers])
        biases = [layer.bias for layer in self.layers if layer.bias is not None]
        self.bias = _joined(biases) if biases else None

    def part(self) -> None:
        """Give every Parameter memory of its own again."""
        for layer in self.layers:
            for parameter in layer.parameters(recurse=False):
                parameter.data = parameter.data.clone()

    def whole(self) -> bool:
        """Whether the Parameters still look at our memory; compiled code asks before it starts, not inside."""
        if torch.compiler.is_compiling():
            return True
        whole = _looks_at(self.weight, [layer.weight for layer in self.layers])
        return whole and (self.bias is None or _looks_at(self.bias, [layer.bias for layer in self.layers]))

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        """Each layer's output, as views of one product where that can be had."""
        if watching_gradients() or not self.whole():
            return tuple(layer(x) for layer in self.layers)
        sizes = [layer.out_features for layer in self.layers]
        return torch.split(F.linear(x, self.weight, self.bias), sizes, dim=-1)

    def last(self, count: int, x: Tensor) -> tuple[Tensor, ...]:
        """The same of the last ``count`` layers only."""
        layers = self.layers[-count:]
        if watching_gradients() or not self.whole():
            return tuple(layer(x) for layer in layers)
        sizes = [layer.out_features for layer in layers]
        bias = None if self.bias is None else self.bias[-sum(sizes) :]
        return torch.split(F.linear(x, self.weight[-sum(sizes) :], bias), sizes, dim=-1)


def joinable(layers: Sequence[nn.Module | None]) -> bool:
    """Whether these can be laid out as one."""
    if not all(type(layer) is nn.Linear and type(layer.weight) is nn.Parameter for layer in layers):
        return False
    kinds = {(m.in_features, m.weight.dtype, m.weight.device, m.bias is None) for m in layers if isinstance(m, nn.Linear)}
    return len(kinds) == 1 and all(m.weight.device.type != "meta" for m in layers if isinstance(m, nn.Linear))


def join_after_moves(owner: nn.Module, fused: Fused) -> Callable[[], None]:
    """Have ``owner.to(...)`` and its kin, which give every Parameter other memory, lay them out as one again.

    Returns:
        What takes this back.
    """

    def apply(self: Any, fn: Any, recurse: bool = True) -> Any:
        done = type(self)._apply(self, fn, recurse)
        if joinable(fused.layers) and not fused.whole():
            fused.join()
        return done

    owner._apply = MethodType(apply, owner)  # type: ignore[method-assign]

    def back() -> None:
        owner.__dict__.pop("_apply", None)

    return back


def _joined(parameters: Sequence[Tensor]) -> Tensor:
    with torch.no_grad():
        whole = torch.cat([p.detach() for p in parameters])
        for parameter, part in zip(parameters, torch.split(whole, [len(p) for p in parameters]), strict=True):
            parameter.data = part
    return whole


def _looks_at(whole: Tensor, parameters: Sequence[Tensor | None]) -> bool:
    at = whole.data_ptr()
    for parameter in parameters:
        if parameter is None or parameter.data_ptr() != at or parameter.dtype != whole.dtype:
            return False
        at += parameter.nbytes
    return True
