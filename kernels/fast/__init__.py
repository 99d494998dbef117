"""diffusers' networks made fast in place, and undone: see :func:`optimise`, :func:`prepared`, :func:`captured`.

Loaded when first asked for: it needs diffusers' classes, which take seconds to import.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .call import CapturedCall, captured_call
    from .capture import CapturedStep, captured
    from .kept import FastDenoiser, prepared
    from .network import Optimised, fast_of, optimise

__all__ = [
    "CapturedCall", "CapturedStep", "FastDenoiser", "Optimised", "captured", "captured_call", "fast_of", "optimise",
    "prepared",
]  # fmt: skip

_HOMES = {
    "CapturedCall": "call", "captured_call": "call", "CapturedStep": "capture", "captured": "capture",
    "FastDenoiser": "kept", "prepared": "kept",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES.get(name, 'network')}", __name__), name)
