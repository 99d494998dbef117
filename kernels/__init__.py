"""Attention backends: which is in use, and why the others are not. The Triton kernels come later."""

from __future__ import annotations

from importlib.util import find_spec

import torch


def backends() -> dict[str, str]:
    """Every backend by name, and what is to be said of it here."""
    return {
        "sdpa": "in use (torch chooses the inner kernel)",
        "triton": _unused("triton"),
        "xformers": _unused("xformers"),
    }


def _unused(package: str) -> str:
    reasons = ["not wired in yet"]
    if not torch.cuda.is_available():
        reasons.append("no CUDA device")
    if not find_spec(package):
        reasons.append(f"{package} is not installed")
    return ", ".join(reasons)
