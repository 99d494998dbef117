"""The attention of transformers' CLIP encoders with one product for queries, keys and values, and no transposes.

Stands for CLIPAttention with torch's attention, transformers' default: text looks back only, pictures everywhere. What
else it can do (masks of padding, dropout, gradients, returned probabilities, other attention) is left to transformers.
Activations and sums stay its own: at 77 tokens once a prompt they are no work.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..attention import attention
from .attention_layer import Forward
from .shared import Shared
from .untouched import first_fault, watching_gradients

UNDERSTOOD = {"is_causal", "output_hidden_states"}
"""Of the options that transformers hands to attention, those that ask nothing of it that ours does not do."""


def clip_attention_forward(shared: Shared) -> Forward:
    """The forward of one CLIPAttention."""

    def forward(
        self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        why = touched(self)
        if why:
            shared.say(self, why)
        wanted = {name for name, value in options.items() if value is not None and value is not False}
        unusual = attention_mask is not None or wanted - UNDERSTOOD or (self.training and self.dropout)
        if why or unusual or watching_gradients():
            return type(self).forward(self, hidden_states, attention_mask, **options)  # type: ignore[no-any-return]
        layers = projections(self)
        fused = shared.fused.get(layers[0])
        parts = tuple(layer(hidden_states) for layer in layers) if fused is None else fused(hidden_states)
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)) for part in parts)
        bias = shared.looking_back(q) if options.get("is_causal", self.is_causal) else None
        out = attention(q, k, v, bias=bias, scale=self.scale, backend=shared.attention)
        return self.out_proj(out.flatten(2)), None

    return forward


def projections(layer: Any) -> list[nn.Linear]:
    """Which of its projections have one input, and may be laid out as one."""
    return [layer.q_proj, layer.k_proj, layer.v_proj]


def touched(layer: Any) -> str | None:
    """Why a CLIPAttention must run as transformers wrote it; None if it is torch's attention of plain projections."""
    name = layer.config._attn_implementation
    if ALL_ATTENTION_FUNCTIONS.get(name) is not sdpa_attention_forward:
        return f"its attention is {name!r}"
    return first_fault({f"{part}_proj": (getattr(layer, f"{part}_proj"), nn.Linear) for part in "qkv"})
