"""Which attention backends can run here, and why the others cannot. The kernels themselves come later."""

from __future__ import annotations

from importlib.util import find_spec

import torch


def backends() -> dict[str, str]:
    """Every backend by name with the reason it cannot run, or "" if it can."""
    cuda = "" if torch.cuda.is_available() else "no CUDA device"
    return {
        "reference": "",
        "sdpa": "",
        "triton": cuda or _missing("triton"),
        "xformers": cuda or _missing("xformers"),
    }


def _missing(package: str) -> str:
    return "" if find_spec(package) else f"{package} is not installed: pip install unrolled[gpu]"
