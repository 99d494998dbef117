"""One captured step for latents of one shape: its buffers, and how they are filled, run and read.

What changes from step to step or from prompt to prompt lies in buffers that stay where they are, so that a CUDA graph may
be replayed; what comes out is copied before the next replay writes over it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...core.conditioning import Conditioning
from ...core.denoiser import UpscalerDenoiser, with_channels_of
from ...core.guidance import rescaled
from .. import guided_step
from ..backends import ours
from .attention_layer import keys_values
from .kept import FastDenoiser, Kept, keep, using
from .recorded import Mode, Recorded
from .shared import Shared

NO_UPDATE: guided_step.Row = (1.0, (0.0,), 0.0)
"""The row of a step that nobody asked for: x stays."""


class Piece:
    """The network for both conditionings, guidance, and a linear solver's update.

    Args:
        conditioning: of all images for both, or of the prompt alone if not ``guided``.
        x: latents as they will come.
        rescale: see :func:`~unrolled.core.guidance.classifier_free`.
        earlier: how many earlier estimates the solver may take.
    """

    def __init__(
        self,
        fast: FastDenoiser,
        shared: Shared,
        conditioning: Conditioning,
        x: Tensor,
        guided: bool,
        rescale: float,
        earlier: int,
        mode: Mode,
        compiler: dict[str, Any],
    ) -> None:
        self.fast, self.shared, self.guided, self.rescale = fast, shared, guided, rescale
        self.x = x.clone()
        self.earlier = [torch.zeros_like(x) for _ in range(earlier)]
        # The scale of the input, the timestep, and what guidance, estimates and step multiply with.
        numbers = guided_step.step_numbers(1.0, "epsilon", 1.0, NO_UPDATE)
        self.floats = torch.tensor([1.0, 1.0, *numbers], dtype=torch.float32, device=x.device)
        both = torch.cat([x, x]) if guided else x
        own = fast.inner.ready(conditioning, both)._map(torch.clone)
        self.kept = keep(fast.inner, fast.schedule, own, both)
        self._own_buffers()
        self.source: Kept | None = None
        self.recorded = Recorded(self._body, fast.inner.unet, x.device, mode, compiler)

    def run(
        self, x: Tensor, scale: float, numbers: tuple[float, ...], earlier: tuple[Tensor, ...], kept: Kept, tells: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What the network gives, that after guidance, the next x, and x0.

        Args:
            scale: of the input.
            numbers: see :func:`~unrolled.kernels.guided_step.step_numbers`.
            earlier: estimates, newest first, as many as the step takes.
            kept: of the conditioning.
            tells: what the network is told of the noise level.
        """
        self.x.copy_(x)
        for buffer, estimate in zip(self.earlier, earlier, strict=False):
            buffer.copy_(estimate)
        floats = torch.tensor([scale, tells, *numbers], pin_memory=x.device.type == "cuda")
        self.floats.copy_(floats, non_blocking=True)
        self._take(kept)
        self._go_to(kept, tells)
        out, guided, x_next, x0 = self.recorded()
        return out, guided, x_next, x0

    def _body(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        inner, kept = self.fast.inner, self.kept
        latents = (self.x * self.floats[0]).to(inner.dtype)
        latents = torch.cat([latents, latents]) if self.guided else latents
        latents = with_channels_of(kept.ready, latents, inner.unet.config.in_channels)
        with using(self.shared, kept):
            out = inner.unet(latents, kept.timestep, **kept.arguments, return_dict=False)[0]
        guided = (-out[:, :-1] if isinstance(inner, UpscalerDenoiser) else out[:, : self.x.shape[1]]).to(self.x.dtype)
        if self.guided:
            without, with_ = guided.chunk(2)
            guided = torch.lerp(without, with_, self.floats[2])
            guided = rescaled(guided, with_, self.rescale) if self.rescale else guided
        return out, guided, *self._updated(guided)

    def _updated(self, guided: Tensor) -> tuple[Tensor, Tensor]:
        """The next x, and x0."""
        if ours("guided_step", self.shared.norms, self.x):
            done: tuple[Tensor, Tensor] = guided_step.fused(self.x, guided, None, self.earlier, None, self.floats[2:])
            return done
        _, x_in_x0, out_in_x0, x_in_point, out_in_point, keep, _, newest, *older = self.floats[2:].unbind()
        x_next = self.x * (keep + newest * x_in_point) + guided * (newest * out_in_point)
        for estimate, number in zip(self.earlier, older, strict=False):
            x_next = x_next + estimate * number
        return x_next, self.x * x_in_x0 + guided * out_in_x0

    def _own_buffers(self) -> None:
        """The row of the current timestep in memory that stays where it is."""
        kept = self.kept
        kept.timestep = self.floats[1]
        if kept.embeddings is not None:
            kept.now = kept.embeddings[0].clone()
        if kept.projections is not None:
            kept.now_projected = kept.projections[0].clone()

    def _go_to(self, kept: Kept, tells: float) -> None:
        mine = self.kept
        embedding, projected = kept.row(tells, self.fast.inner)
        if mine.now is not None and embedding is not None:
            mine.now.copy_(embedding)
        if mine.now_projected is not None and projected is not None:
            mine.now_projected.copy_(projected)

    def _take(self, kept: Kept) -> None:
        """Another prompt, or other weights, into our buffers."""
        mine = self.kept
        if self.source is kept and mine.keys_hold():
            return
        for buffer, given in zip(_tensors(mine), _tensors(kept), strict=True):
            buffer.copy_(given)
        context = mine._context
        for layer, (keys, values, _) in mine.keys.items():
            assert context is not None
            fresh_keys, fresh_values = keys_values(layer, self.shared, context)
            keys.copy_(fresh_keys)
            values.copy_(fresh_values)
            mine.note(layer)
        self.source = kept


def _tensors(kept: Kept) -> list[Tensor]:
    """Everything a conditioning gives to the network, in one order."""
    added = kept.arguments.get("added_cond_kwargs") or {}
    given = [*kept.arguments.values(), *added.values(), kept.ready.channels, kept.made_context]
    return [tensor for tensor in given if isinstance(tensor, Tensor)]
