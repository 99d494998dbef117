"""Attention backends by name: which can run here, and putting one into a network of diffusers."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch

from ..core.errors import BadInput

BACKENDS = {
    "sdpa": "torch's scaled_dot_product_attention, which chooses the inner kernel",
    "xformers": "xformers' memory_efficient_attention",
    "reference": "softmax(QK)V in plain torch, which keeps the whole matrix of scores",
}


def attention_fault(name: str, device: torch.device) -> str | None:
    """Why a backend cannot run on a device; None if it can."""
    if name != "xformers":
        return None
    faults = [] if find_spec("xformers") else ["xformers is not installed"]
    if device.type != "cuda":
        faults.append(f"it has no kernel for {device.type}")
    return ", and ".join(faults) or None


def require_attention(name: str | None, device: torch.device) -> None:
    """Raise BadInput if there is no such backend or it cannot run on ``device``; None and "auto" always can."""
    if name in (None, "auto"):
        return
    if name not in BACKENDS:
        raise BadInput(f"There is no attention {name!r}: use auto, {', '.join(BACKENDS)}.")
    if fault := attention_fault(name, device):
        raise BadInput(f"Attention {name!r} cannot run on {device} ({fault}): use auto, or see unrolled doctor.")


def set_attention(network: Any, name: str | None) -> None:
    """Put a backend into every attention layer of a UNet, a VAE or the prior; None and "auto" leave what is there.

    CLIP's encoders keep transformers' own: they run once a prompt.

    Raises:
        BadInput: xformers is there but cannot be used.
    """
    if name in (None, "auto"):
        return
    if name == "xformers":
        try:
            network.enable_xformers_memory_efficient_attention()
        except (ImportError, ValueError, RuntimeError, NotImplementedError) as error:
            raise BadInput(f"Attention 'xformers' cannot run here ({str(error).splitlines()[0]}): use auto.") from error
        return
    from diffusers.models import attention_processor as theirs

    sdpa = name == "sdpa"
    plain = theirs.AttnProcessor2_0 if sdpa else theirs.AttnProcessor
    # Kandinsky's layers attend to the picture and the prompt's tokens at once, and have processors of their own.
    added = theirs.AttnAddedKVProcessor2_0 if sdpa else theirs.AttnAddedKVProcessor
    for layer in network.modules():
        if isinstance(layer, theirs.Attention):
            layer.set_processor(plain() if layer.added_kv_proj_dim is None else added())
