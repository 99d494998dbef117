"""diffusers' Attention with one product for queries, keys and values, and no transposes.

Stands for its default processors, AttnProcessor2_0 and AttnAddedKVProcessor2_0. Tokens stay (batch, tokens, heads, head
size) as the projections leave them; a picture in channels-last memory already is tokens, without a copy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnAddedKVProcessor2_0, AttnProcessor2_0
from torch import Tensor, nn

from ..attention import attention
from .shared import Shared
from .untouched import dropping, fault, hooked_everywhere, watching_gradients

Forward = Callable[..., Any]


def attention_forward(shared: Shared) -> Forward:
    """The forward of one Attention layer."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        **cross_attention_kwargs: Any,
    ) -> Tensor:
        why = touched(self)
        if why:
            shared.say(self, why)
        image = hidden_states.ndim == 4
        unusual = attention_mask is not None or cross_attention_kwargs or (self.group_norm is not None and not image)
        if why or unusual:
            given = {} if temb is None else {"temb": temb}
            return type(self).forward(  # type: ignore[no-any-return]
                self, hidden_states, encoder_hidden_states, attention_mask, **given, **cross_attention_kwargs
            )
        x = hidden_states
        if self.spatial_norm is not None:
            x = self.spatial_norm(x, temb)
        if self.group_norm is not None:
            x = shared.group_norm(x, self.group_norm)
        tokens = x.permute(0, 2, 3, 1).flatten(1, 2) if image else x
        if self.added_kv_proj_dim is None:
            q, k, v = _plain(self, shared, tokens, encoder_hidden_states)
        else:
            q, k, v = _with_added(self, shared, tokens, encoder_hidden_states)
        heads = (part.view(*part.shape[:2], self.heads, -1) for part in (q, k, v))
        out: Tensor = self.to_out[0](attention(*heads, backend=shared.attention).flatten(2))
        if image:
            out = out.view(*x.shape[:1], *x.shape[2:], -1).permute(0, 3, 1, 2)
        if self.residual_connection or self.added_kv_proj_dim is not None:
            out = out + hidden_states
        # The processor for added keys does not look at the factor.
        rescaled = self.rescale_output_factor != 1.0 and self.added_kv_proj_dim is None
        return out / self.rescale_output_factor if rescaled else out

    return forward


def supported(layer: Any) -> bool:
    """Whether this is an Attention layer as our systems have them, with diffusers' default processor."""
    added = layer.added_kv_proj_dim is not None
    return (
        type(layer) is Attention
        and type(layer.processor) is (AttnAddedKVProcessor2_0 if added else AttnProcessor2_0)
        and layer.norm_q is None
        and layer.norm_k is None
        and layer.inner_kv_dim == layer.inner_dim
        and layer.scale_qk
        and type(layer.group_norm) in (nn.GroupNorm, type(None))
        and type(layer.norm_cross) in (nn.LayerNorm, type(None))
        and (not added or (layer.group_norm is not None and layer.norm_cross is None and layer.spatial_norm is None))
        and not layer.is_causal
    )


def projections(layer: Any) -> list[list[nn.Linear]]:
    """Which of its projections have one input each, and may be laid out as one."""
    added = [[layer.add_k_proj, layer.add_v_proj]] if layer.added_kv_proj_dim is not None else []
    if layer.to_k is None:
        return added
    one_input = not layer.is_cross_attention or layer.added_kv_proj_dim is not None
    return [*added, [layer.to_q, layer.to_k, layer.to_v] if one_input else [layer.to_k, layer.to_v]]


def touched(layer: Any) -> str | None:
    """Why a layer that was :func:`supported` must now run as diffusers wrote it; None if nothing was put into it."""
    processor = layer.processor
    if type(processor) is not AttnProcessor2_0 and type(processor) is not AttnAddedKVProcessor2_0:
        return f"its attention processor is a {type(processor).__name__}"
    if why := hooked_everywhere():
        return why
    for name in ("to_q", "to_k", "to_v", "add_k_proj", "add_v_proj"):
        if why := fault(getattr(layer, name, None), nn.Linear):
            return f"{name} in it is not what it was: {why}"
    if why := fault(layer.group_norm, nn.GroupNorm) or fault(layer.norm_cross, nn.LayerNorm):
        return f"a norm in it is not what it was: {why}"
    if type(layer.to_out[1]) is not nn.Dropout or dropping(layer.to_out[1]) or fault(layer.to_out[1], nn.Dropout):
        return "the dropout behind it drops, or is not what it was"
    return None


def _plain(layer: Any, shared: Shared, tokens: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of the tokens; keys and values of the context, if there is one, else of the tokens too."""
    fused = shared.fused.get(layer.to_q)
    if context is None:
        if fused is not None:
            return fused(tokens)  # type: ignore[return-value]
        return layer.to_q(tokens), *keys_values(layer, shared, tokens)
    return layer.to_q(tokens), *_kept(layer, shared, context)


def _with_added(layer: Any, shared: Shared, tokens: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Kandinsky's: the keys and values of the context come before the tokens' own."""
    context_k, context_v = _kept(layer, shared, tokens if context is None else context)
    if layer.to_k is None:
        return layer.to_q(tokens), context_k, context_v
    fused = shared.fused.get(layer.to_q)
    q, k, v = fused(tokens) if fused is not None else (layer.to_q(tokens), layer.to_k(tokens), layer.to_v(tokens))
    return q, torch.cat([context_k, k], dim=1), torch.cat([context_v, v], dim=1)


def _kept(layer: Any, shared: Shared, context: Tensor) -> tuple[Tensor, Tensor]:
    keeper = None if watching_gradients() else shared.kept
    if keeper is not None and (found := keeper.keys_values(layer, context)) is not None:
        return found
    keys, values = keys_values(layer, shared, context)
    if keeper is not None:
        keeper.keep(layer, context, keys, values)
    return keys, values


def keys_values(layer: Any, shared: Shared, context: Tensor) -> tuple[Tensor, ...]:
    """A layer's keys and values of a context, (batch, tokens, width) each."""
    if layer.norm_cross is not None:
        context = layer.norm_cross(context)
    first = layer.to_k if layer.added_kv_proj_dim is None else layer.add_k_proj
    if (fused := shared.fused.get(first)) is not None:
        return fused(context)
    if first is layer.to_k and (fused := shared.fused.get(layer.to_q)) is not None:
        return fused.last(2, context)
    return first(context), (layer.to_v if first is layer.to_k else layer.add_v_proj)(context)


def spatial_norm_forward(shared: Shared) -> Forward:
    """The forward of MoVQ's SpatialNorm: its 1x1 convolutions run before the codes are enlarged, which is the same."""

    def forward(self: Any, f: Tensor, zq: Tensor) -> Tensor:
        if why := fault(self.norm_layer, nn.GroupNorm) or hooked_everywhere():
            shared.say(self, f"its norm is not what it was: {why}")
            return type(self).forward(self, f, zq)  # type: ignore[no-any-return]
        normed = shared.group_norm(f, self.norm_layer)
        scale, shift = (
            nn.functional.interpolate(part(zq), size=f.shape[-2:], mode="nearest") for part in (self.conv_y, self.conv_b)
        )
        return torch.addcmul(shift, normed, scale)

    return forward
