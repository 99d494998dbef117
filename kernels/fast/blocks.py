"""diffusers' residual and transformer blocks: norms and activations as one, nothing divided by one, nothing transposed."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from ..geglu import geglu
from ..group_norm_silu import group_norm_silu
from ..layer_norm import add_layer_norm, layer_norm
from .attention_layer import Forward
from .shared import Shared
from .untouched import dropping, first_fault


def resnet_forward(shared: Shared) -> Forward:
    """The forward of one ResnetBlock2D with SiLU."""

    def forward(self: Any, input_tensor: Tensor, temb: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        why = first_fault(
            {
                "norm1": (self.norm1, nn.GroupNorm),
                "norm2": (self.norm2, nn.GroupNorm),
                "nonlinearity": (self.nonlinearity, nn.SiLU),
                "dropout": (self.dropout, nn.Dropout),
            }
        )
        unfit = (temb is None) != (self.time_emb_proj is None)
        if why or args or kwargs or unfit or dropping(self.dropout):
            if why:
                shared.say(self, why)
            return type(self).forward(self, input_tensor, temb, *args, **kwargs)  # type: ignore[no-any-return]
        x = shared.group_norm(input_tensor, self.norm1, silu=True)
        if (resize := self.upsample or self.downsample) is not None:
            input_tensor, x = resize(input_tensor), resize(x)
        x = self.conv1(x)
        told = None
        if temb is not None:
            told = projected(shared, self.time_emb_proj, temb, silu=not self.skip_time_act)
        if self.time_embedding_norm == "scale_shift" and told is not None:
            x = shared.group_norm(x, self.norm2, silu=True, told=_halves(told, x))
        else:
            x = x if told is None else x + told[:, :, None, None]
            x = shared.group_norm(x, self.norm2, silu=True)
        return _with_shortcut(self, input_tensor, self.conv2(x))

    return forward


def conditioned_resnet_forward(shared: Shared) -> Forward:
    """The forward of one ResnetBlockCondNorm2D: the x2 upscaler's and MoVQ's, whose norms take the embedding."""

    def forward(self: Any, input_tensor: Tensor, temb: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs:
            return type(self).forward(self, input_tensor, temb, *args, **kwargs)  # type: ignore[no-any-return]
        x = self.nonlinearity(self.norm1(input_tensor, temb))
        if (resize := self.upsample or self.downsample) is not None:
            input_tensor, x = resize(input_tensor), resize(x)
        x = self.nonlinearity(self.norm2(self.conv1(x), temb))
        return _with_shortcut(self, input_tensor, self.conv2(self.dropout(x)))

    return forward


def _with_shortcut(block: Any, x: Tensor, more: Tensor) -> Tensor:
    total = (x if block.conv_shortcut is None else block.conv_shortcut(x)) + more
    return total if block.output_scale_factor == 1.0 else total / block.output_scale_factor


def ada_group_norm_forward(shared: Shared) -> Forward:
    """The forward of one AdaGroupNorm without activation."""

    def forward(self: Any, x: Tensor, emb: Tensor) -> Tensor:
        told = projected(shared, self.linear, emb, silu=False)
        scale, shift = _halves(told, x)
        return group_norm_silu(x, self.num_groups, eps=self.eps, silu=False, scale=scale, shift=shift, backend=shared.norms)

    return forward


def _halves(told: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and shift for every picture."""
    scale, shift = told.expand(len(x), -1).chunk(2, dim=1)
    return scale, shift


def projected(shared: Shared, projection: nn.Linear, embedding: Tensor, *, silu: bool) -> Tensor:
    """What a block makes of the time embedding: computed ahead, or now."""
    if shared.kept is not None and (ahead := shared.kept.projected(projection, embedding)) is not None:
        return ahead
    out: Tensor = projection(F.silu(embedding) if silu else embedding)
    return out


def transformer_forward(shared: Shared) -> Forward:
    """The forward of one Transformer2DModel over a picture: in channels-last memory its tokens are the picture itself."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        timestep: Any = None,
        added_cond_kwargs: Any = None,
        class_labels: Any = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        kind = nn.Linear if self.use_linear_projection else nn.Conv2d
        parts = {"norm": (self.norm, nn.GroupNorm), "proj_in": (self.proj_in, kind), "proj_out": (self.proj_out, kind)}
        why = first_fault(parts)
        masked = attention_mask is not None or encoder_attention_mask is not None
        if why or masked or return_dict or (self.gradient_checkpointing and torch.is_grad_enabled()):
            if why:
                shared.say(self, why)
            return type(self).forward(
                self, hidden_states, encoder_hidden_states, timestep, added_cond_kwargs, class_labels,
                cross_attention_kwargs, attention_mask, encoder_attention_mask, return_dict,
            )  # fmt: skip
        tokens = shared.group_norm(hidden_states, self.norm).permute(0, 2, 3, 1).flatten(1, 2)
        tokens = _on_tokens(self.proj_in, tokens)
        for block in self.transformer_blocks:
            tokens = block(
                tokens,
                encoder_hidden_states=encoder_hidden_states,
                timestep=timestep,
                cross_attention_kwargs=cross_attention_kwargs,
                class_labels=class_labels,
            )
        tokens = _on_tokens(self.proj_out, tokens)
        return (_picture(tokens, hidden_states) + hidden_states,)

    return forward


def _picture(tokens: Tensor, like: Tensor) -> Tensor:
    batch, _, height, width = like.shape
    return tokens.view(batch, height, width, -1).permute(0, 3, 1, 2)


def _on_tokens(projection: Any, tokens: Tensor) -> Tensor:
    """A 1x1 convolution is a Linear on tokens."""
    if isinstance(projection, nn.Linear):
        return projection(tokens)  # type: ignore[no-any-return]
    return F.linear(tokens, projection.weight.flatten(1), projection.bias)


def block_forward(shared: Shared) -> Forward:
    """The forward of one BasicTransformerBlock with LayerNorms."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Any = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        class_labels: Any = None,
        added_cond_kwargs: Any = None,
    ) -> Tensor:
        norms = {name: (getattr(self, name), nn.LayerNorm) for name in ("norm1", "norm2", "norm3")}
        why = first_fault(norms)
        gligen = cross_attention_kwargs is not None and "gligen" in cross_attention_kwargs
        if why or gligen or self._chunk_size is not None:
            if why:
                shared.say(self, why)
            return type(self).forward(  # type: ignore[no-any-return]
                self, hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask, timestep,
                cross_attention_kwargs, class_labels, added_cond_kwargs,
            )  # fmt: skip
        more, x = cross_attention_kwargs or {}, hidden_states
        own_context = encoder_hidden_states if self.only_cross_attention else None
        out = self.attn1(
            layer_norm(x, *_weights(self.norm1), eps=self.norm1.eps, backend=shared.norms),
            encoder_hidden_states=own_context,
            attention_mask=attention_mask,
            **more,
        )
        if self.attn2 is not None:
            x, normed = add_layer_norm(x, out, *_weights(self.norm2), eps=self.norm2.eps, backend=shared.norms)
            out = self.attn2(
                normed, encoder_hidden_states=encoder_hidden_states, attention_mask=encoder_attention_mask, **more
            )
        x, normed = add_layer_norm(x, out, *_weights(self.norm3), eps=self.norm3.eps, backend=shared.norms)
        return x + self.ff(normed)  # type: ignore[no-any-return]

    return forward


def geglu_forward(shared: Shared) -> Forward:
    """The forward of one GEGLU."""

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return geglu(self.proj(hidden_states), backend=shared.norms)

    return forward


def layer_norm_forward(shared: Shared) -> Forward:
    """The forward of one LayerNorm."""

    def forward(self: Any, input: Tensor) -> Tensor:
        return layer_norm(input, *_weights(self), eps=self.eps, backend=shared.norms)

    return forward


def _weights(norm: Any) -> tuple[Tensor | None, Tensor | None]:
    return norm.weight, norm.bias


def coder_forward(shared: Shared) -> Forward:
    """The forward of a VAE's Encoder or Decoder: as diffusers', but for the last norm and its activation."""

    def forward(self: Any, sample: Tensor, latent_embeds: Tensor | None = None) -> Tensor:
        why = first_fault({"conv_norm_out": (self.conv_norm_out, nn.GroupNorm), "conv_act": (self.conv_act, nn.SiLU)})
        if why or latent_embeds is not None or (self.gradient_checkpointing and torch.is_grad_enabled()):
            if why:
                shared.say(self, why)
            given = () if latent_embeds is None else (latent_embeds,)
            return type(self).forward(self, sample, *given)  # type: ignore[no-any-return]
        x = self.conv_in(sample)
        if hasattr(self, "down_blocks"):
            for block in self.down_blocks:
                x = block(x)
            x = self.mid_block(x)
        else:
            x = self.mid_block(x, None)
            for block in self.up_blocks:
                x = block(x, None)
        return self.conv_out(shared.group_norm(x, self.conv_norm_out, silu=True))  # type: ignore[no-any-return]

    return forward


def k_downsample_forward(shared: Shared) -> Forward:
    """The forward of the x2 upscaler's KDownsample2D: its filter channel by channel, not as a matrix of channels."""

    def forward(self: Any, inputs: Tensor) -> Tensor:
        x = F.pad(inputs, (self.pad,) * 4, self.pad_mode)
        return F.conv2d(x, _per_channel(self.kernel, x), stride=2, groups=x.shape[1])

    return forward


def k_upsample_forward(shared: Shared) -> Forward:
    """The forward of KUpsample2D, likewise."""

    def forward(self: Any, inputs: Tensor) -> Tensor:
        x = F.pad(inputs, ((self.pad + 1) // 2,) * 4, self.pad_mode)
        filters = _per_channel(self.kernel, x)
        return F.conv_transpose2d(x, filters, stride=2, padding=self.pad * 2 + 1, groups=x.shape[1])

    return forward


def _per_channel(kernel: Tensor, x: Tensor) -> Tensor:
    return kernel.to(x).expand(x.shape[1], 1, *kernel.shape)
