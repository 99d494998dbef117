"""Attention backends: which can run here, and why the others cannot. The Triton kernels come later."""

from __future__ import annotations

import torch


def backends() -> dict[str, str]:
    """Every backend by name, and what is to be said of it on this machine's device."""
    # Not at the top: run from the checkout, transformers takes this folder for Hugging Face's `kernels` and imports it.
    from .attention import BACKENDS, attention_fault

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = {}
    for name, what in BACKENDS.items():
        fault = attention_fault(name, device)
        found[name] = f"cannot run: {fault}" if fault else f"can run: {what}"
    found["sdpa"] += "; the default"
    return {**found, "triton": "cannot run: there is no kernel of ours yet"}
