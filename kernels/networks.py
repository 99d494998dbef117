"""Putting a backend of attention into a network of diffusers."""

from __future__ import annotations

from typing import Any

from ..core.errors import BadInput


def set_attention(network: Any, name: str | None) -> None:
    """Put a backend into every attention layer of a UNet, a VAE or the prior; None and "auto" leave what is there.

    CLIP's encoders keep transformers' own: they run once a prompt.

    Raises:
        BadInput: xformers is there but cannot be used, or the backend is one of optimised networks.
    """
    if name in (None, "auto"):
        return
    if name in ("triton", "chunked"):
        raise BadInput(f"Attention {name!r} is one of optimised networks: say fast=True (--fast) too, or use sdpa.")
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
