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
from .. import guided_step
from .attention_layer import keys_values
from .kept import FastDenoiser, Kept, keep, using
from .shared import Shared
from .snapshot import Snapshot

NO_UPDATE = guided_step.step_numbers(1.0, "epsilon", 1.0, (1.0, (0.0,), 0.0))
WARM_UPS = 3
"""Runs before a capture, in which libraries choose their kernels and take their memory."""


class Piece:
    """The network for both conditionings, guidance, and a linear solver's update.

    Args:
        conditioning: of all images for both, or of the prompt alone if not ``guided``.
        x: latents as they will come.
        earlier: how many earlier estimates the solver may take.
    """

    def __init__(
        self,
        fast: FastDenoiser,
        shared: Shared,
        conditioning: Conditioning,
        x: Tensor,
        guided: bool,
        earlier: int,
        mode: str,
        compiler: dict[str, Any],
    ) -> None:
        self.fast, self.shared, self.guided = fast, shared, guided
        self.x = x.clone()
        self.earlier = [torch.zeros_like(x) for _ in range(earlier)]
        # The scale of the input, the timestep, and what guidance, estimates and step multiply with.
        self.floats = torch.ones(2 + len(NO_UPDATE), dtype=torch.float32, device=x.device)
        both = torch.cat([x, x]) if guided else x
        own = fast.inner.ready(conditioning, both)._map(torch.clone)
        self.kept = keep(fast.inner, fast.schedule, own, both)
        self._own_buffers()
        self.source: Kept | None = None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.body = self._body
        self.outputs = self._run_body()  # and the keys and values are kept
        if mode.startswith("compile"):
            self.body = torch.compile(self._body, **compiler)
            self.outputs = self._run_body()
        if mode.endswith("graph") and x.device.type == "cuda":
            self._capture()
        self.snapshot = Snapshot(fast.inner.unet)

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
        if self.graph is None:
            self.outputs = self._run_body()
        else:
            self.graph.replay()
        out, guided, x_next, x0 = self.outputs
        return out.clone(), guided.clone(), x_next.clone(), x0.clone()

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
        return out, guided, *self._updated(guided)

    def _updated(self, guided: Tensor) -> tuple[Tensor, Tensor]:
        """The next x, and x0."""
        if self.shared.norms == "triton":
            done: tuple[Tensor, Tensor] = guided_step.fused(self.x, guided, None, self.earlier, None, self.floats[2:])
            return done
        _, x_in_x0, out_in_x0, x_in_point, out_in_point, keep, _, newest, *older = self.floats[2:].unbind()
        x_next = self.x * (keep + newest * x_in_point) + guided * (newest * out_in_point)
        for estimate, number in zip(self.earlier, older, strict=False):
            x_next = x_next + estimate * number
        return x_next, self.x * x_in_x0 + guided * out_in_x0

    def _run_body(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        with torch.no_grad():
            return self.body()

    def _capture(self) -> None:
        stream: torch.cuda.Stream = torch.cuda.Stream(self.x.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self.x.device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self._run_body()
        torch.cuda.current_stream(self.x.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.outputs = self._run_body()
        self.graph = graph

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
        if self.source is kept:
            return
        mine = self.kept
        for ours, theirs in zip(_tensors(mine), _tensors(kept), strict=True):
            ours.copy_(theirs)
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
