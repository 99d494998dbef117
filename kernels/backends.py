"""The backends of our operations by name: which can run where, and why the others cannot."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from functools import cache, lru_cache, wraps
from importlib.util import find_spec
from typing import Concatenate, Literal, ParamSpec, TypeVar, get_args

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from ..core.errors import BadInput, Note
from .measured_table import Key, card, find, summary
from .tuning import key_of

Backend = Literal["auto", "triton", "xformers", "sdpa", "chunked", "reference"]
Choice = Literal["auto", "triton", "torch", "reference"]
"""Of an operation other than attention; "auto" is ours where that was measured to be faster on this card, else torch's."""

BACKENDS = {
    "triton": "our own kernels",
    "xformers": "xformers' memory_efficient_attention",
    "sdpa": "torch's scaled_dot_product_attention, which chooses the inner kernel",
    "chunked": "plain torch, some heads and queries at a time: for CPUs in half precision",
    "reference": "plain torch, which keeps the whole matrix of scores",
}


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on the CPU: for tests and for looking inside, far too slow to use."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def fault(name: str, device: torch.device, head_size: int | None = None, dtype: torch.dtype | None = None) -> str | None:
    """Why a backend cannot run on a device, or not for heads of that size or in that precision; None if it can."""
    if name in ("torch", "sdpa", "chunked", "reference"):
        return None
    if not find_spec(name):
        return f"{name} is not installed"
    if name == "triton":
        if head_size is not None and not 16 <= head_size <= 512:
            return f"our kernels take heads of 16 to 512 numbers, not {head_size}"
        if dtype not in (None, torch.float16, torch.bfloat16, torch.float32):
            return f"our kernels take float16, bfloat16 and float32, not {str(dtype)[6:]}"
        if interpreted():
            return "Triton's interpreter is wrong in bfloat16" if dtype == torch.bfloat16 else None
    if device.type != "cuda":
        return f"it has no kernel for {device.type}" + (": TRITON_INTERPRET=1 runs ours there, slowly" * (name == "triton"))
    if name == "triton" and torch.cuda.get_device_capability(device) < (8, 0):
        major, minor = torch.cuda.get_device_capability(device)
        return f"our kernels need compute capability 8.0 or more, and this card has {major}.{minor}"
    return None


def require(name: str | None, device: torch.device, head_size: int | None = None, dtype: torch.dtype | None = None) -> None:
    """Raise BadInput if there is no such backend of attention or it cannot run here; None and "auto" always can."""
    if name in (None, "auto"):
        return
    if name not in BACKENDS:
        raise BadInput(f"There is no attention {name!r}: use auto, {', '.join(BACKENDS)}.")
    if why := fault(name, device, head_size, dtype):
        raise BadInput(f"Attention {name!r} cannot run on {device} ({why}): use auto, or see unrolled doctor.")


def ours(operation: str, backend: str, x: Tensor) -> bool:
    """Whether an operation other than attention, which torch has too, is to run as our kernel.

    Raises:
        BadInput: there is no such backend, or our kernel was named and cannot run here.
    """
    if backend not in get_args(Choice):
        raise BadInput(f"There is no {operation} {backend!r}: use {', '.join(get_args(Choice))}.")
    if backend == "auto" and measurable(x):
        return fastest(key_of(operation, x), x.device, "torch") == "triton"
    if backend != "triton":
        return False
    if why := fault("triton", x.device, dtype=x.dtype):
        raise BadInput(f"Our kernel of {operation} cannot run on {x.device} ({why}): use auto, or see unrolled doctor.")
    return True


P = ParamSpec("P")
R = TypeVar("R")


def on_its_card(launch: Callable[Concatenate[Tensor, P], R]) -> Callable[Concatenate[Tensor, P], R]:
    """The same on the card of its first argument: Triton launches on the current one, which need not be that."""

    @wraps(launch)
    def there(x: Tensor, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
            return launch(x, *args, **kwargs)

    return there


def measurable(*inputs: Tensor) -> bool:
    """Whether a call is as the measured ones: no gradient to come, and not compiled, where torch fuses its own."""
    return not torch.compiler.is_compiling() and not (torch.is_grad_enabled() and any(x.requires_grad for x in inputs))


@lru_cache(maxsize=4096)
def fastest(key: Key, device: torch.device, otherwise: str) -> str:
    """The backend that was measured to be the fastest of those that can run here, else the one given; said once a card."""
    found = find(key, device)
    if found is None:
        return otherwise
    _say(str(card(device)))
    head_size = key.same[0] if key.operation == "attention" else None
    can = {name: time for name, time in found.microseconds.items() if fault(name, device, head_size, key.dtype) is None}
    return min(can, key=lambda name: can[name], default=otherwise)


@cache
def _say(name: str) -> None:
    warnings.warn(summary(name) or "", Note, stacklevel=4)


def inner(q: Tensor, k: Tensor, v: Tensor) -> str:
    """The kernel that torch's scaled_dot_product_attention chooses for these, (batch, length, heads, head size)."""
    try:
        choice = torch._fused_sdp_choice(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return SDPBackend(choice).name.lower()
    except (AttributeError, RuntimeError, ValueError) as error:  # it is torch's own business
        return f"unknown: {type(error).__name__}"


def doctor() -> dict[str, str]:
    """Every backend by name, and what is to be said of it on this machine's device."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = {}
    for name, what in BACKENDS.items():
        why = fault(name, device)
        found[name] = f"cannot run: {why}" if why else f"can run: {what}"
    q = torch.empty(2, 1024, 10, 64, dtype=torch.bfloat16, device=device)
    found["sdpa"] += f", for heads of 64 in bfloat16 {inner(q, q, q)}; the default"
    if here := card(device):
        found["auto"] = summary(here) or f"sdpa: nothing was measured on {here}, which benchmarks/tune.py would do"
    return found
