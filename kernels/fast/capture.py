"""A whole step as one piece: the network for both conditionings, guidance and, for solvers that can, the update.

On CUDA it is captured in a graph and replayed; elsewhere the same piece runs as it is. It stands where a guided denoiser
and its solver stand, so that the loop, hooks, edits of ``step.x`` and wrappers around the denoiser work as ever: what is
looked at by somebody runs in the parts that it needs, and a Note says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...core.conditioning import Conditioning
from ...core.denoiser import ConditionalDenoiser, Denoiser, UNetDenoiser, UpscalerDenoiser
from ...core.errors import BadInput
from ...core.guidance import GuidanceScale, classifier_free, paired
from ...core.prediction import Kind, Prediction
from ...core.schedule import Schedule
from ...core.solver import Draw, Evaluate, History, Solver
from ..guided_step import EARLIER, step_numbers
from .kept import FastDenoiser
from .network import fast_of
from .piece import NO_UPDATE, Piece
from .recorded import Mode, Recorder


def captured(
    network: ConditionalDenoiser,
    cond: Conditioning,
    uncond: Conditioning,
    guidance_scale: GuidanceScale,
    schedule: Schedule,
    solver: Solver,
    *,
    rescale: float = 0.0,
    mode: Mode = "auto",
    compiler: dict[str, Any] | None = None,
) -> CapturedStep:
    """Guidance and solver for :func:`~unrolled.core.loop.steps`, as one piece.

    ``step = captured(model.denoiser, cond, uncond, 7.5, schedule, Euler())`` gives ``step.denoiser`` and ``step.solver``.

    Args:
        network: ``model.denoiser`` of a model whose UNet was optimised.
        solver: any. If its step is a row of numbers without noise or corrector (Euler, DPM++ 2M, PLMS), the update is part
            of the piece, else it works on what comes out.
        rescale: of guidance, see :func:`~unrolled.core.guidance.classifier_free`.
        mode: "graph" captures a CUDA graph, "compile" is torch.compile, "compile+graph" both; on a CPU there are no
            graphs. "auto" is "eager" until somebody has measured what wins.
        compiler: what to hand to ``torch.compile``, e.g. ``{"mode": "max-autotune-no-cudagraphs"}``.

    Raises:
        BadInput: the UNet was not optimised, there is no such mode, or rescale is not from 0 to 1.
    """
    if type(network) not in (UNetDenoiser, UpscalerDenoiser) or fast_of(network.unet) is None:  # type: ignore[attr-defined]
        raise BadInput("Only the denoiser of an optimised UNet can be captured: call optimise(model.unet) first.")
    fast = FastDenoiser(network, schedule)  # type: ignore[arg-type]
    parts = classifier_free(fast, cond, uncond, guidance_scale, rescale=rescale)
    recorder = Recorder("step", "runs in parts", mode, compiler)
    return CapturedStep(fast, cond, uncond, guidance_scale, rescale, solver, parts, recorder)


class Coming(NamedTuple):
    """What our solver asks for before it calls the denoiser: the numbers of the step, and the estimates they are for."""

    x: Tensor
    sigma: float
    row: tuple[float, tuple[float, ...], float]
    earlier: tuple[Tensor, ...]


@dataclass(eq=False)
class CapturedStep:
    """See :func:`captured`. ``parts`` is the same guided denoiser, for what does not run as one piece."""

    fast: FastDenoiser
    cond: Conditioning
    uncond: Conditioning
    guidance_scale: GuidanceScale
    rescale: float
    inner_solver: Solver
    parts: Denoiser
    recorder: Recorder

    def __post_init__(self) -> None:
        self._pair = paired(self.cond, self.uncond)
        self._coming: Coming | None = None
        self._done: tuple[Prediction, Tensor] | None = None

    @property
    def seconds(self) -> float:
        """What making the pieces took, the first call's cost beside the step itself."""
        return self.recorder.seconds

    def denoiser(self, x: Tensor, sigma: float, timestep: float) -> Prediction:
        """The guided prediction; if our solver asked for it, the next x is computed with it."""
        coming, self._coming, self._done = self._coming, None, None
        scale = self.guidance_scale(sigma) if callable(self.guidance_scale) else self.guidance_scale
        guided = scale > 1.0
        piece = self._piece(x, guided)
        kept = (
            None if piece is None else self.fast.kept_for(self._for(x, guided), x.new_empty(2 * len(x), 1) if guided else x)
        )
        if piece is None or kept is None:
            return self.parts(x, sigma, timestep)
        if coming is not None and (coming.x is not x or coming.sigma != sigma):
            coming = None  # somebody in between asks for something else
        row, earlier = (NO_UPDATE, ()) if coming is None else (coming.row, coming.earlier)
        inner = self.fast.inner
        numbers = step_numbers(scale, self._kind, sigma, row, getattr(self.inner_solver, "predicts", "x0"))
        out, mixed, x_next, x0 = piece.run(x, inner.input_scale(sigma), numbers, earlier, kept, inner.tells(sigma, timestep))
        prediction = inner.read(out, x, sigma)
        if guided:
            prediction = _guided(prediction, mixed, x)
        vars(prediction)["x0"] = x0  # the same as it would compute
        if coming is not None:
            self._done = prediction, x_next
        return prediction

    def solver(
        self, denoise: Evaluate, x: Tensor, sigma: float, sigma_next: float, history: History, noise: Draw, /
    ) -> tuple[Tensor, History]:
        """The next x from the same piece, if it is ours to compute, else by the solver itself."""
        row: Callable[[float, float, History], Any] | None = getattr(self.inner_solver, "row", None)
        found = None if row is None or not self.recorder.records else row(sigma, sigma_next, history)
        if found is None or len(found[1]) > EARLIER:
            return self.inner_solver(denoise, x, sigma, sigma_next, history, noise)
        self._coming, self._done = Coming(x, sigma, *found), None
        prediction = denoise(x, sigma)
        done, self._coming, self._done = self._done, None, None
        if done is not None and done[0] is prediction:
            return done[1], self.inner_solver.remembering(history, sigma, prediction)
        if done is not None:
            self.recorder.say(
                "something between the denoiser and the solver changes the prediction: the solver works on that"
            )
        return self.inner_solver(lambda *_: prediction, x, sigma, sigma_next, history, noise)

    @property
    def _kind(self) -> Kind:
        return self.fast.inner.kind if isinstance(self.fast.inner, UNetDenoiser) else "v"

    @property
    def _earlier(self) -> int:
        """How many earlier estimates the solver takes at most."""
        order = getattr(self.inner_solver, "order", 1) if hasattr(self.inner_solver, "row") else 1
        return min(int(order) - 1, EARLIER)

    def _for(self, x: Tensor, guided: bool) -> Conditioning:
        with torch.inference_mode(False), torch.no_grad():  # what is kept of it is looked up by its versions
            return self._pair(len(x)) if guided else self.cond

    def _piece(self, x: Tensor, guided: bool) -> Piece | None:
        """The piece for these latents, made if need be; None if the step has to run in parts."""
        if guided and not self.cond.stackable(self.uncond):
            return None
        made = fast_of(self.fast.inner.unet)

        def make() -> Piece:
            assert made is not None
            settings = guided, self.rescale, self._earlier, self.recorder.mode, self.recorder.compiler
            return Piece(self.fast, made.shared, self._for(x, guided), x, *settings)

        key = (self._kind, guided, self.rescale, x.shape, x.dtype, x.device, self._earlier, repr(self.cond))
        return self.recorder.piece(made, self.fast.inner.unet, key, make)


def _guided(both: Prediction, out: Tensor, x: Tensor) -> Prediction:
    """The guided prediction, from that of both conditionings and what guidance made of their outputs."""
    uncond, cond = both.out.chunk(2)
    variance = None if both.variance is None else both.variance[len(x) :]
    return replace(both, out=out, x=x, cond=cond, uncond=uncond, variance=variance)
