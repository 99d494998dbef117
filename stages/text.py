"""Prompts to what conditions the UNet: context, pooled prompt, mask."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..core.conditioning import Conditioning
from ..core.errors import BadInput, Note
from ..core.loading import Model, Prior
from .tokens import Encoder, Layout, Token, lay_out, length
from .weights import emphasised

Prompts = str | Sequence[str] | None


def encode_text(
    model: Model | Prior,
    prompts: Prompts,
    *,
    prompts_2: Prompts = None,
    clip_skip: int = 0,
    chunks: bool = False,
    weights: bool = False,
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
        chunks: encode what lies beyond 77 tokens in further chunks of up to 75 instead of dropping it, cut after a comma
            among the last 20 or else between words; all prompts of one call get as many as the longest needs.
        weights: read ``(word:1.3)``, ``(word)`` and ``[word]`` as weights, as AUTOMATIC1111's web UI does
            (:func:`unrolled.stages.weights.parse_weights`), and ``BREAK`` as the beginning of a chunk. The context is
            weighted, encoder by encoder and chunk by chunk; the pooled prompt is not.

    Returns:
        context of shape (prompts, 77 * chunks, width), and what else the system takes.

    Raises:
        BadInput: there is no prompt, there are not as many second ones, clip_skip is more than the encoder has
            layers to leave out (the prior none), the model takes no text, or no second one, or a weight is not finite
            or too large.

    Warns:
        Note: what was dropped, by its text; that the mean of a weighted context could not be restored.
    """
    encoders = _encoders(model)
    # The refiner has the second encoder alone, for the first prompt.
    told = [
        (encoder, [lay_out(encoder, prompt, chunks, weights) for prompt in texts])
        for encoder, texts in zip(encoders, _texts(model, len(encoders), prompts, prompts_2), strict=False)
    ]
    for dropped in dict.fromkeys(layout.dropped for _, layouts in told for layout in layouts):
        if dropped:
            room = length(encoders[0]) - 2
            more = f"{room} tokens of the prompt fit; dropped: {dropped!r} (chunks = true encodes it too)."
            warnings.warn(more, Note, stacklevel=2)
    count = max(len(layout.chunks) for _, layouts in told for layout in layouts)
    parts = [_encode(model, encoder, layouts, count, clip_skip) for encoder, layouts in told]
    whole = Conditioning(
        context=torch.cat([part.context for part in parts if part.context is not None], dim=-1),
        context_mask=parts[-1].context_mask,
        pooled=parts[-1].pooled,
    )
    if prompts is None and isinstance(model, Model) and model.system == "sdxl":
        return zeroed(whole) if model.index.get("force_zeros_for_empty_prompt", True) else whole
    return whole


def _texts(model: Model | Prior, encoders: int, prompts: Prompts, prompts_2: Prompts) -> tuple[list[str], list[str]]:
    """What the first encoder is told and what the second, checked."""
    first = [prompts or ""] if prompts is None or isinstance(prompts, str) else list(prompts)
    second = first if prompts_2 is None else [prompts_2] if isinstance(prompts_2, str) else list(prompts_2)
    if not first or len(first) != len(second):
        raise BadInput('Text encoding needs at least one prompt, and as many for a second encoder; the empty prompt is "".')
    if prompts_2 is not None and encoders < 2:
        raise BadInput(f"{model.name} has one text encoder: leave out the second prompt.")
    if prompts_2 is not None and prompts is None:
        raise BadInput('A second prompt was given without a first: the empty prompt is "".')
    return first, second


def zeroed(conditioning: Conditioning) -> Conditioning:
    """Zeros in place of what was encoded, as SDXL's base was trained for no prompt."""
    return Conditioning(**{name: torch.zeros_like(getattr(conditioning, name)) for name in conditioning.names()})


def dropped_text(model: Model | Prior, prompt: str, *, weights: bool = False) -> str:
    """The part of a prompt that lies beyond the encoder's 77 tokens, as text; empty if all fits."""
    return lay_out(_encoders(model)[0], prompt, chunks=False, weights=weights).dropped


@dataclass(frozen=True)
class TokenRow:
    """What became of one token of a prompt, or of one vector of a learned word.

    Args:
        text: what it stands for; of a learned word, the word.
        start: the first of the prompt's characters that it is of; ``stop``, the one after the last.
        weight: what its state in the context is multiplied by before the mean is restored.
        chunk: which chunk it is in, from 0; None if it was dropped.
        position: which token of the context it is; likewise.
    """

    text: str
    start: int
    stop: int
    weight: float
    chunk: int | None
    position: int | None


def token_table(model: Model | Prior, prompt: str, *, chunks: bool = False, weights: bool = False) -> list[TokenRow]:
    """What becomes of a prompt's tokens, in order, when :func:`encode_text` is told the same; raises as it does."""
    encoder = _encoders(model)[0]
    layout = lay_out(encoder, prompt, chunks, weights)
    places = [
        (token, i, i * length(encoder) + place)
        for i, chunk in enumerate(layout.chunks)
        for place, token in enumerate(chunk, 1)  # 0 is the start
    ]
    lost = [(token, None, None) for token in layout.lost]
    return [TokenRow(t.text, t.start, t.stop, t.weight, chunk, position) for t, chunk, position in [*places, *lost]]


def token_positions(
    model: Model | Prior, prompt: str, start: int, stop: int, *, chunks: bool = False, weights: bool = False
) -> list[int]:
    """Which tokens of the context a prompt's characters ``start`` to ``stop - 1`` became, but for dropped ones."""
    rows = token_table(model, prompt, chunks=chunks, weights=weights)
    return [row.position for row in rows if row.position is not None and row.start < stop and row.stop > start]


def _encoders(model: Model | Prior) -> list[Encoder]:
    pairs = [(model.tokenizer, model.text_encoder)]
    if isinstance(model, Model):
        pairs.append((model.tokenizer_2, model.text_encoder_2))
    if held := [pair for pair in pairs if None not in pair]:
        return held
    raise BadInput(f"{model.name} takes no text: Kandinsky's decoders take image embeddings, which the prior makes of it.")


def _encode(model: Model | Prior, encoder: Encoder, told: Sequence[Layout], count: int, clip_skip: int) -> Conditioning:
    """One encoder's part, of as many chunks as asked for; the pooled prompt is the first chunk's."""
    layers = encoder[1].config.num_hidden_layers
    layers = {"sdxl": layers - 1, "prior": 1}.get(model.system, layers)
    if not 0 <= clip_skip < layers:
        raise BadInput(f"clip_skip goes from 0 to {layers - 1} with this text encoder, got {clip_skip}.")
    bodies = [[layout.chunks[i] if i < len(layout.chunks) else [] for layout in told] for i in range(count)]
    parts = [_weighted(_states(model, encoder, body, clip_skip), body) for body in bodies]
    masks = [part.context_mask for part in parts if part.context_mask is not None]
    return Conditioning(
        context=torch.cat([part.context for part in parts if part.context is not None], dim=1),
        context_mask=torch.cat(masks, dim=1) if masks else None,
        pooled=parts[0].pooled,
    )


def _weighted(part: Conditioning, bodies: Sequence[list[Token]]) -> Conditioning:
    if part.context is None or all(token.weight == 1.0 for body in bodies for token in body):
        return part
    weights = torch.ones(part.context.shape[:2])
    for row, body in zip(weights, bodies, strict=True):
        row[1 : 1 + len(body)] = torch.tensor([token.weight for token in body])
    return replace(part, context=emphasised(part.context, weights))


def _states(model: Model | Prior, encoder: Encoder, bodies: Sequence[list[Token]], clip_skip: int) -> Conditioning:
    """What the system takes of one encoder's answer to 75 tokens a prompt."""
    (tokenizer, network), size, system = encoder, length(encoder), model.system
    rows = [[tokenizer.bos_token_id, *(token.id for token in body), tokenizer.eos_token_id] for body in bodies]
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (size - len(row)) for row in rows], device=model.device)
    with torch.no_grad():
        answer = network(ids, output_hidden_states=True, return_dict=True)
        if system == "sdxl":
            return Conditioning(context=answer.hidden_states[-2 - clip_skip], pooled=answer.get("text_embeds"))
        if system == "x2":
            return Conditioning(context=answer.hidden_states[-1 - clip_skip], pooled=answer.pooler_output)
        if system == "prior":
            mask = torch.tensor([[i < len(row) for i in range(size)] for row in rows], device=model.device)
            return Conditioning(context=answer.last_hidden_state, context_mask=mask, pooled=answer.text_embeds)
        if not clip_skip:
            return Conditioning(context=answer.last_hidden_state)
        # transformers 5 has the layer norm on the encoder itself, 4 below text_model.
        norm: Any = getattr(network, "text_model", network)
        return Conditioning(context=norm.final_layer_norm(answer.hidden_states[-1 - clip_skip]))
