"""Prompts to what conditions the UNet: context, pooled prompt, mask."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch

from ..core.conditioning import Conditioning
from ..core.errors import BadInput, Note
from ..core.loading import Model, Prior
from ..core.textual_inversion import pieces

Prompts = str | Sequence[str] | None


def encode_text(
    model: Model | Prior, prompts: Prompts, *, prompts_2: Prompts = None, clip_skip: int = 0, chunks: bool = False
) -> Conditioning:
    """Encode prompts with the model's CLIP text encoders, padded to their 77 tokens.

    What is made of them is the system's: the last layer's states (Stable Diffusion), the last but one of
    one or two encoders side by side with the second's pooled prompt (SDXL), the last before its norm and
    the pooled prompt (x2 upscaler), the last with pooled prompt and mask (Kandinsky's prior).

    Args:
        prompts: one or several; a negative prompt is encoded like any other. ``None`` is no prompt at all:
            zeros for checkpoints trained so (``force_zeros_for_empty_prompt``), else the empty prompt.
        prompts_2: what SDXL's second encoder is told, if not the same.
        clip_skip: leave out that many of the encoder's last layers.
        chunks: encode what lies beyond 77 tokens in further chunks of 75 instead of dropping it;
            all prompts of one call get as many chunks as the longest needs.

    Returns:
        context of shape (prompts, 77 * chunks, width), and what else the system takes.

    Raises:
        BadInput: there is no prompt, there are not as many second ones, clip_skip is more than the encoder has
            layers to leave out (the prior none), or the model takes no text, or no second one.

    Warns:
        Note: what was dropped, by its text.
    """
    encoders = _encoders(model)
    first = [prompts or ""] if prompts is None or isinstance(prompts, str) else list(prompts)
    second = first if prompts_2 is None else [prompts_2] if isinstance(prompts_2, str) else list(prompts_2)
    if not first or len(first) != len(second):
        raise BadInput('Text encoding needs at least one prompt, and as many for a second encoder; the empty prompt is "".')
    if prompts_2 is not None and len(encoders) < 2:
        raise BadInput(f"{model.name} has one text encoder: leave out the second prompt.")
    if prompts_2 is not None and prompts is None:
        raise BadInput('A second prompt was given without a first: the empty prompt is "".')
    pairs = list(zip(encoders, (first, second), strict=False))  # the refiner has the second encoder alone, for the first
    lost = {} if chunks else {_dropped(pair, prompt): _length(pair) - 2 for pair, texts in pairs for prompt in texts}
    for dropped, room in lost.items():
        if dropped:
            more = f"{room} tokens of the prompt fit; dropped: {dropped!r} (chunks = true encodes it too)."
            warnings.warn(more, Note, stacklevel=2)
    count = max(_chunks(pair, texts) for pair, texts in pairs) if chunks else 1
    parts = [_encode(model, pair, texts, clip_skip, count) for pair, texts in pairs]
    whole = Conditioning(
        context=torch.cat([part.context for part in parts if part.context is not None], dim=-1),
        context_mask=parts[-1].context_mask,
        pooled=parts[-1].pooled,
    )
    if prompts is None and isinstance(model, Model) and model.system == "sdxl":
        return zeroed(whole) if model.index.get("force_zeros_for_empty_prompt", True) else whole
    return whole


def zeroed(conditioning: Conditioning) -> Conditioning:
    """Zeros in place of what was encoded, as SDXL's base was trained for no prompt."""
    return Conditioning(**{name: torch.zeros_like(getattr(conditioning, name)) for name in conditioning.names()})


def dropped_text(model: Model | Prior, prompt: str) -> str:
    """The part of a prompt that lies beyond the encoder's 77 tokens, as text; empty if all fits."""
    return _dropped(_encoders(model)[0], prompt)


def token_positions(model: Model | Prior, prompt: str, start: int, stop: int, *, chunks: bool = False) -> list[int]:
    """Which tokens of the context a prompt's characters ``start`` to ``stop - 1`` became, but for dropped ones."""
    encoder = _encoders(model)[0]
    room, tokens = _length(encoder) - 2, enumerate(_tokens(encoder, prompt))
    inside = [i for i, (_, first, end) in tokens if first < stop and end > start and (chunks or i < room)]
    return [i // room * (room + 2) + 1 + i % room for i in inside]


Encoder = tuple[Any, Any]
"""A tokenizer and the text encoder it is for."""


def _encoders(model: Model | Prior) -> list[Encoder]:
    pairs = [(model.tokenizer, model.text_encoder)]
    if isinstance(model, Model):
        pairs.append((model.tokenizer_2, model.text_encoder_2))
    if held := [pair for pair in pairs if None not in pair]:
        return held
    raise BadInput(f"{model.name} takes no text: Kandinsky's decoders take image embeddings, which the prior makes of it.")


def _chunks(encoder: Encoder, prompts: Sequence[str]) -> int:
    room = _length(encoder) - 2
    return max(1, *(-(-len(_tokens(encoder, prompt)) // room) for prompt in prompts))


def _encode(model: Model | Prior, encoder: Encoder, prompts: Sequence[str], clip_skip: int, chunks: int) -> Conditioning:
    """One encoder's part, of as many chunks as asked for; the pooled prompt is the first chunk's."""
    layers = encoder[1].config.num_hidden_layers
    layers = {"sdxl": layers - 1, "prior": 1}.get(model.system, layers)
    if not 0 <= clip_skip < layers:
        raise BadInput(f"clip_skip goes from 0 to {layers - 1} with this text encoder, got {clip_skip}.")
    room = _length(encoder) - 2
    bodies = [[token for token, *_ in _tokens(encoder, prompt)] for prompt in prompts]
    parts = [_states(model, encoder, [body[i * room : (i + 1) * room] for body in bodies], clip_skip) for i in range(chunks)]
    masks = [part.context_mask for part in parts if part.context_mask is not None]
    return Conditioning(
        context=torch.cat([part.context for part in parts if part.context is not None], dim=1),
        context_mask=torch.cat(masks, dim=1) if masks else None,
        pooled=parts[0].pooled,
    )


def _states(model: Model | Prior, encoder: Encoder, bodies: list[list[int]], clip_skip: int) -> Conditioning:
    """What the system takes of one encoder's answer to 75 tokens a prompt."""
    (tokenizer, network), length, system = encoder, _length(encoder), model.system
    rows = [[tokenizer.bos_token_id, *body, tokenizer.eos_token_id] for body in bodies]
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (length - len(row)) for row in rows], device=model.device)
    with torch.no_grad():
        answer = network(ids, output_hidden_states=True, return_dict=True)
        if system == "sdxl":
            return Conditioning(context=answer.hidden_states[-2 - clip_skip], pooled=answer.get("text_embeds"))
        if system == "x2":
            return Conditioning(context=answer.hidden_states[-1 - clip_skip], pooled=answer.pooler_output)
        if system == "prior":
            mask = torch.tensor([[i < len(row) for i in range(length)] for row in rows], device=model.device)
            return Conditioning(context=answer.last_hidden_state, context_mask=mask, pooled=answer.text_embeds)
        if not clip_skip:
            return Conditioning(context=answer.last_hidden_state)
        # transformers 5 has the layer norm on the encoder itself, 4 below text_model.
        norm: Any = getattr(network, "text_model", network)
        return Conditioning(context=norm.final_layer_norm(answer.hidden_states[-1 - clip_skip]))


def _dropped(encoder: Encoder, prompt: str) -> str:
    lost = _tokens(encoder, prompt)[_length(encoder) - 2 :]
    return prompt[lost[0][1] :].strip() if lost else ""


def _length(encoder: Encoder) -> int:
    # A tokenizer without a tokenizer_config.json believes that there is no limit.
    return int(min(encoder[0].model_max_length, encoder[1].config.max_position_embeddings))


def _tokens(encoder: Encoder, prompt: str) -> list[tuple[int, int, int]]:
    """A prompt's tokens: each one's id, and which characters it is of, from the first to before the last."""
    (tokenizer, network), found, begin = encoder, list[tuple[int, int, int]](), 0
    for piece, taught in pieces(network, prompt):
        if taught:
            found += [(token, begin, begin + len(piece)) for token in taught]
        else:
            told = tokenizer(piece, add_special_tokens=False, truncation=False, verbose=False, return_offsets_mapping=True)
            spans = zip(told.input_ids, told.offset_mapping, strict=True)
            found += [(token, begin + first, begin + end) for token, (first, end) in spans]
        begin += len(piece)
    return found
