"""Prompts to cross-attention context."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.conditioning import Conditioning
from ..core.errors import BadInput, Note
from ..core.loading import Model


def encode_text(model: Model, prompts: str | Sequence[str], *, clip_skip: int = 0, chunks: bool = False) -> Conditioning:
    """Encode prompts with the model's CLIP text encoder, padded to its 77 tokens.

    Args:
        prompts: one or several; a negative prompt is encoded like any other.
        clip_skip: leave out that many of the encoder's last layers (0 to its number of layers - 1).
        chunks: encode what lies beyond 77 tokens in further chunks of 75 instead of dropping it;
            all prompts of one call get as many chunks as the longest needs.

    Returns:
        context of shape (prompts, 77 * chunks, width).

    Raises:
        BadInput: there is no prompt, or clip_skip is more than the encoder has layers.

    Warns:
        Note: what was dropped, by its text.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not prompts:
        raise BadInput('Text encoding needs at least one prompt; the empty prompt is "".')
    layers = model.text_encoder.config.num_hidden_layers
    if not 0 <= clip_skip < layers:
        raise BadInput(f"clip_skip goes from 0 to {layers - 1} with this text encoder, got {clip_skip}.")
    bodies = [_ids(model.tokenizer, prompt) for prompt in prompts]
    room = _length(model) - 2
    if not chunks:
        for prompt in prompts:
            if dropped := dropped_text(model, prompt):
                more = f"{room} tokens of the prompt fit; dropped: {dropped!r} (chunks = true encodes it too)."
                warnings.warn(more, Note, stacklevel=2)
        bodies = [body[:room] for body in bodies]
    count = max(1, *(-(-len(body) // room) for body in bodies))
    pieces = [_encode(model, [body[i * room : (i + 1) * room] for body in bodies], clip_skip) for i in range(count)]
    return Conditioning(context=torch.cat(pieces, dim=1))


def dropped_text(model: Model, prompt: str) -> str:
    """The part of a prompt that lies beyond the encoder's 77 tokens, as text; empty if all fits."""
    body = _ids(model.tokenizer, prompt)
    return str(model.tokenizer.decode(body[_length(model) - 2 :])).strip()


def _length(model: Model) -> int:
    # A tokenizer without a tokenizer_config.json believes that there is no limit.
    return int(min(model.tokenizer.model_max_length, model.text_encoder.config.max_position_embeddings))


def _ids(tokenizer: Any, prompt: str) -> list[int]:
    return list(tokenizer(prompt, add_special_tokens=False, truncation=False, verbose=False).input_ids)


def _encode(model: Model, bodies: list[list[int]], clip_skip: int) -> Tensor:
    tokenizer, encoder = model.tokenizer, model.text_encoder
    length = _length(model)
    rows = [[tokenizer.bos_token_id, *body, tokenizer.eos_token_id] for body in bodies]
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (length - len(row)) for row in rows], device=model.device)
    with torch.no_grad():
        if not clip_skip:
            return encoder(ids, return_dict=True).last_hidden_state  # type: ignore[no-any-return]
        hidden = encoder(ids, output_hidden_states=True, return_dict=True).hidden_states[-1 - clip_skip]
        # transformers 5 has the layer norm on the encoder itself, 4 below text_model.
        return getattr(encoder, "text_model", encoder).final_layer_norm(hidden)  # type: ignore[no-any-return]
