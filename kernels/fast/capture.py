"""A whole step as one piece: the network for both conditionings, guidance and, for solvers that can, the update.

On CUDA it is captured in a graph and replayed; elsewhere the same piece runs as it is. It stands where a guided denoiser
and its solver stand, so that the loop, hooks, edits of ``step.x`` and wrappers around the denoiser work as ever: what is
looked at by somebody runs in the parts that it needs, and a Note says so.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from ...core.conditioning import Conditioning
from ...core.denoiser import ConditionalDenoiser, UNetDenoiser, UpscalerDenoiser
from ...core.errors import BadInput, Note
from ...core.guidance import GuidanceScale, classifier_free, paired
from ...core.prediction import Kind, Prediction
from ...core.schedule import Schedule
from ...core.solver import Draw, Evaluate, History, Solver
from ..guided_step import EARLIER, step_numbers
from .kept import FastDenoiser
from .network import fast_of
from .piece import Piece
from .snapshot import strangers

Mode = Literal["auto", "eager", "graph", "compile", "compile+graph"]

AT_MOST = 4
"""Pieces kept for a network, one per shape; the oldest goes."""


def captured(
    network: ConditionalDenoiser,
    cond: Conditioning,
    uncond: Conditioning,
    guidance_scale: GuidanceScale,
    schedule: Schedule,
    solver: Solver,
    *,
    mode: Mode = "auto",
    compiler: dict[str, Any] | None = None,
) -> CapturedStep:
    """Guidance and solver for :func:`~unrolled.core.loop.steps`, as one piece.

    ``step = captured(model.denoiser, cond, uncond, 7.5, schedule, Euler())`` gives ``step.denoiser`` and ``step.solver``.

    Args:
        network: ``model.denoiser`` of a model whose UNet was optimised.
        solver: any. If its step is a row of numbers without noise or corrector (Euler, DPM++ 2M, PLMS), the update is part
            of the piece, else it works on what comes out.
        mode: "graph" captures a CUDA graph, "compile" is torch.compile, "compile+graph" both; on a CPU there are no
            graphs. "auto" is "eager" until somebody has measured what wins.
        compiler: what to hand to ``torch.compile``, e.g. ``{"mode": "max-autotune-no-cudagraphs"}``.

    Raises:
        BadInput: the UNet was not optimised, or there is no such mode.
    """
    if mode not in get_args(Mode):
        raise BadInput(f"There is no mode {mode!r} of capturing: use {', '.join(get_args(Mode))}.")
    if type(network) not in (UNetDenoiser, UpscalerDenoiser) or fast_of(network.unet) is None:  # type: ignore[attr-defined]
        raise BadInput("Only the denoiser of an optimised UNet can be captured: call optimise(model.unet) first.")
    fast = FastDenoiser(network, schedule)  # type: ignore[arg-type]
    return CapturedStep(fast, cond, uncond, guidance_scale, solver, mode, compiler or {})


class Coming(NamedTuple):
    """What our solver asks for before it calls the denoiser: the numbers of the step, and the estimates they are for."""

    x: Tensor
    sigma: float
    row: tuple[float, tuple[float, ...], float]
    earlier: tuple[Tensor, ...]


class CapturedStep:
    """See :func:`captured`. ``seconds`` is what making the pieces took, the first call's cost beside the step itself."""

    def __init__(
        self,
        fast: FastDenoiser,
        cond: Conditioning,
        uncond: Conditioning,
        guidance_scale: GuidanceScale,
        solver: Solver,
        mode: Mode,
        compiler: dict[str, Any],
    ) -> None:
        self.fast, self.cond, self.guidance_scale, self.mode, self.compiler = fast, cond, guidance_scale, mode, compiler
        self.parts = classifier_free(fast, cond, uncond, guidance_scale)
        self.inner_solver, self.uncond = solver, uncond
        self.seconds = 0.0
        self._pair = paired(cond, uncond)
        self._coming: Coming | None = None
        self._done: tuple[Prediction, Tensor] | None = None
        self._said = set[str]()

    def denoiser(self, x: Tensor, sigma: float, timestep: float) -> Prediction:
        """The guided prediction; if our solver asked for it, the next x is computed with it."""
        scale = self.guidance_scale(sigma) if callable(self.guidance_scale) else self.guidance_scale
        coming, self._coming, self._done = self._coming, None, None
        piece = self._piece(x, guided=scale > 1.0)
        if piece is None:
            return self.parts(x, sigma, timestep)
        conditioning = self._pair(len(x)) if scale > 1.0 else self.cond
        kept = self.fast.kept_for(conditioning, x if scale <= 1.0 else x.new_empty(2 * len(x), 1))
        if kept is None:
            return self.parts(x, sigma, timestep)
        inner = self.fast.inner
        asked = coming is not None and coming.x is x and coming.sigma == sigma
        row, earlier = (coming.row, coming.earlier) if asked and coming is not None else ((1.0, (0.0,), 0.0), ())
        numbers = step_numbers(scale, self._kind, sigma, row, getattr(self.inner_solver, "predicts", "x0"))
        tells = inner.tells(sigma, timestep)
        out, guided, x_next, x0 = piece.run(x, inner.input_scale(sigma), numbers, earlier, kept, tells)
        prediction = inner.read(out, x, sigma)
        if scale > 1.0:
            without, with_ = prediction.out.chunk(2)
            variance = None if prediction.variance is None else prediction.variance[len(x) :]
            prediction = replace(prediction, out=guided, x=x, cond=with_, uncond=without, variance=variance)
        vars(prediction)["x0"] = x0  # the same as it would compute
        if asked:
            self._done = prediction, x_next
        return prediction

    def solver(
        self, denoise: Evaluate, x: Tensor, sigma: float, sigma_next: float, history: History, noise: Draw, /
    ) -> tuple[Tensor, History]:
        """The next x from the same piece, if it is ours to compute, else by the solver itself."""
        row: Callable[[float, float, History], Any] | None = getattr(self.inner_solver, "row", None)
        found = None if row is None or self.mode in ("auto", "eager") else row(sigma, sigma_next, history)
        if found is None or len(found[1]) > EARLIER:
            return self.inner_solver(denoise, x, sigma, sigma_next, history, noise)
        self._coming, self._done = Coming(x, sigma, *found), None
        prediction = denoise(x, sigma)
        done, self._coming, self._done = self._done, None, None
        if done is not None and done[0] is prediction:
            return done[1], self.inner_solver.remembering(history, sigma, prediction)
        if done is not None:
            self._say("something between the denoiser and the solver changes the prediction: the solver works on that")
        return self.inner_solver(lambda *_: prediction, x, sigma, sigma_next, history, noise)

    @property
    def _kind(self) -> Kind:
        return self.fast.inner.kind if isinstance(self.fast.inner, UNetDenoiser) else "v"

    @property
    def _earlier(self) -> int:
        """How many earlier estimates the solver takes at most."""
        order = getattr(self.inner_solver, "order", 1) if hasattr(self.inner_solver, "row") else 1
        return min(int(order) - 1, EARLIER)

    def _piece(self, x: Tensor, guided: bool) -> Piece | None:
        """The piece for these latents, made if need be; None if the step has to run in parts."""
        made = fast_of(self.fast.inner.unet)
        if self.mode in ("auto", "eager") or made is None or torch.is_grad_enabled():
            return None
        if guided and not self.cond.stackable(self.uncond):
            return None
        unet = self.fast.inner.unet
        key = (
            self.mode,
            repr(self.compiler),
            self._kind,
            guided,
            x.shape,
            x.dtype,
            x.device,
            self._earlier,
            repr(self.cond),
        )
        piece: Piece | None = made.pieces.get(key)
        if piece is not None and piece.snapshot.holds():
            return piece
        if why := strangers(unet, made.shared):
            self._say(f"{why}: the step runs in parts, and is not captured")
            return None
        began = time.perf_counter()
        if len(made.pieces) >= AT_MOST:
            made.pieces.pop(next(iter(made.pieces)))
        made.pieces.pop(key, None)
        conditioning = self._pair(len(x)) if guided else self.cond
        try:
            piece = Piece(self.fast, made.shared, conditioning, x, guided, self._earlier, self.mode, self.compiler)
        except RuntimeError as error:  # of CUDA's capture, or of memory
            self._say(f"the step could not be captured ({str(error).splitlines()[0]}), and runs in parts")
            return None
        made.pieces[key] = piece
        self.seconds += time.perf_counter() - began
        return piece

    def _say(self, sentence: str) -> None:
        if sentence not in self._said:
            self._said.add(sentence)
            warnings.warn(f"{sentence[0].upper()}{sentence[1:]}.", Note, stacklevel=4)
