"""The backends of our operations by name: which can run where, and why the others cannot."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Literal

import torch

from ..core.errors import BadInput

Backend = Literal["auto", "triton", "xformers", "sdpa", "chunked", "reference"]
Choice = Literal["auto", "triton", "reference"]
"""Of an operation other than attention; "auto" is torch's own until ours was measured to be faster."""

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
    if name in ("sdpa", "chunked", "reference"):
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


def ours(operation: str, backend: str, x: torch.Tensor) -> bool:
    """Whether an operation other than attention, which torch has too, is to run as our kernel.

    Raises:
        BadInput: there is no such backend, or our kernel was named and cannot run here.
    """
    if backend not in ("auto", "triton", "reference"):
        raise BadInput(f"There is no {operation} {backend!r}: use auto, triton or reference.")
    if backend != "triton":
        return False
    if why := fault("triton", x.device, dtype=x.dtype):
        raise BadInput(f"Our kernel of {operation} cannot run on {x.device} ({why}): use auto, or see unrolled doctor.")
    return True


def doctor() -> dict[str, str]:
    """Every backend by name, and what is to be said of it on this machine's device."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = {}
    for name, what in BACKENDS.items():
        why = fault(name, device)
        found[name] = f"cannot run: {why}" if why else f"can run: {what}"
    found["sdpa"] += "; the default"
    return found
