"""The whole of diffusers' UNet2DConditionModel: as its own forward, but that what depends on the timestep and the prompt
alone may have been computed before.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn

from .attention_layer import Forward
from .shared import Shared
from .untouched import first_fault


def unet_forward(shared: Shared) -> Forward:
    """The forward of a UNet. Masks, adapters' residuals and processors' arguments are left to diffusers."""

    def forward(
        self: Any,
        sample: Tensor,
        timestep: Any,
        encoder_hidden_states: Any,
        class_labels: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
        down_block_additional_residuals: Any = None,
        mid_block_additional_residual: Any = None,
        down_intrablock_additional_residuals: Any = None,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        rare = (
            attention_mask, mid_block_additional_residual, down_block_additional_residuals,
            down_intrablock_additional_residuals, encoder_attention_mask,
        )  # fmt: skip
        if any(given is not None for given in rare) or cross_attention_kwargs or not plain_config(self.config):
            return type(self).forward(
                self, sample, timestep, encoder_hidden_states, class_labels, timestep_cond, attention_mask,
                cross_attention_kwargs, added_cond_kwargs, down_block_additional_residuals,
                mid_block_additional_residual, down_intrablock_additional_residuals, encoder_attention_mask, return_dict,
            )  # fmt: skip
        given = {
            "encoder_hidden_states": encoder_hidden_states,
            "class_labels": class_labels,
            "timestep_cond": timestep_cond,
            **(added_cond_kwargs or {}),
        }
        emb, context, kept = None, None, shared.kept
        if kept is not None:
            emb, context = kept.embedding(self, timestep, given), kept.context(self, given)
        if emb is None:
            emb = embed(self, sample, timestep, encoder_hidden_states, class_labels, timestep_cond, added_cond_kwargs)
        if context is None:
            context = self.process_encoder_hidden_states(encoder_hidden_states, added_cond_kwargs)
        if shared.channels_last:
            sample = sample.contiguous(memory_format=torch.channels_last)
        x = _blocks(self, self.conv_in(sample), emb, context)
        x = self.conv_out(_last_norm(self, shared, x))
        return UNet2DConditionOutput(sample=x.contiguous()) if return_dict else (x.contiguous(),)

    return forward


def plain_config(config: Any) -> bool:
    """Whether a UNet is one whose forward we know: Kandinsky's hint and centred inputs are left to diffusers."""
    return not config.center_input_sample and config.addition_embed_type != "image_hint"


def embed(
    unet: Any,
    like: Tensor,
    timestep: Any,
    context: Any,
    class_labels: Tensor | None,
    timestep_cond: Tensor | None,
    added: Mapping[str, Tensor | None] | None,
) -> Tensor:
    """The embedding of timestep, labels and what else is added to it: (batch, width) or, for one timestep, (1, width).

    Args:
        like: (batch, …), says how many and in what precision.
    """
    emb: Tensor = unet.time_embedding(unet.get_time_embed(sample=like, timestep=timestep), timestep_cond)
    labels = unet.get_class_embed(sample=like, class_labels=class_labels)
    if labels is not None:
        emb = torch.cat([emb, labels], dim=-1) if unet.config.class_embeddings_concat else emb + labels
    more = unet.get_aug_embed(emb=emb, encoder_hidden_states=context, added_cond_kwargs=added)
    emb = emb if more is None else emb + more
    return emb if unet.time_embed_act is None else unet.time_embed_act(emb)


def _blocks(unet: Any, x: Tensor, emb: Tensor, context: Any) -> Tensor:
    """Down, across and up, as diffusers does it."""
    odd = any(side % 2**unet.num_upsamplers for side in x.shape[-2:])
    skips: tuple[Tensor, ...] = (x,)
    for block in unet.down_blocks:
        x, more = block(hidden_states=x, temb=emb, **_with_context(block, context))
        skips += more
    if unet.mid_block is not None:
        x = unet.mid_block(x, emb, **_with_context(unet.mid_block, context))
    for i, block in enumerate(unet.up_blocks):
        count = len(block.resnets)
        taken, skips = skips[-count:], skips[:-count]
        size = skips[-1].shape[2:] if odd and i < len(unet.up_blocks) - 1 else None
        options = _with_context(block, context)
        x = block(hidden_states=x, temb=emb, res_hidden_states_tuple=taken, upsample_size=size, **options)
    return x


def _with_context(block: Any, context: Any) -> dict[str, Any]:
    return {"encoder_hidden_states": context} if getattr(block, "has_cross_attention", False) else {}


def _last_norm(unet: Any, shared: Shared, x: Tensor) -> Tensor:
    if not unet.conv_norm_out:
        return x
    parts = {"conv_norm_out": (unet.conv_norm_out, nn.GroupNorm), "conv_act": (unet.conv_act, nn.SiLU)}
    if first_fault(parts):
        return unet.conv_act(unet.conv_norm_out(x))  # type: ignore[no-any-return]
    return shared.group_norm(x, unet.conv_norm_out, silu=True)
