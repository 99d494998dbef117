"""Guidance and the solver's step in one pass over the latents: from the network's two outputs to the next ``x``.

Everything a multistep method does between two calls of the network is linear: guidance mixes two outputs, the estimate
mixes the result with x, the step mixes x, the estimates and noise. The numbers of the mixture are floats known before
the run, so that a captured step reads them from the device: :func:`step_numbers` of every step make a table, and
:func:`fused` takes a row of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..core.errors import BadInput
from ..core.prediction import Kind, Preconditioned, Prediction, preconditioning
from .backends import Choice, ours

Row = tuple[float, tuple[float, ...], float]
"""``x_next = x * row[0] + sum(row[1][i] * f[i]) + row[2] * noise``: what :class:`unrolled.schedulers.multistep.Row` says."""

EARLIER = 4
"""How many earlier estimates our kernel takes."""


def guided_step(
    x: Tensor,
    cond: Tensor,
    uncond: Tensor | None = None,
    *,
    guidance_scale: float = 1.0,
    kind: Kind = "epsilon",
    sigma: float,
    row: Row,
    predicts: str = "x0",
    history: Sequence[Tensor] = (),
    noise: Tensor | None = None,
    backend: Choice = "auto",
) -> tuple[Tensor, Tensor]:
    """One step of a linear multistep method from the network's outputs, and the x0 that it was made of.

    A step with a corrector is one too: correcting ``x`` by ``sum(d[i] * f[i])`` first is the row with
    ``points[i] + row.x * d[i]``.

    Args:
        x: (batch, channels, …) at ``sigma``.
        cond, uncond: outputs of the network like x, in any dtype; without ``uncond`` there is no guidance.
        guidance_scale: ``uncond + guidance_scale * (cond - uncond)``.
        kind: what the outputs are.
        sigma: noise level of x.
        row: the step's numbers; its points are the estimate made here and then ``history``.
        predicts: "x0" or "eps", which estimate the points are of.
        history: earlier estimates like x, newest first.
        noise: like x, if the row asks for it.
        backend: "auto" is torch's own.

    Returns:
        The next x and x0, like x.

    Raises:
        BadInput: the parts do not go together, or our kernel cannot run here.
    """
    _require(x, cond, uncond, kind, predicts, row, history, noise)
    if not ours("guided_step", backend, x):
        return reference(x, cond, uncond, guidance_scale, kind, sigma, row, predicts, history, noise)
    if len(history) > EARLIER:
        raise BadInput(f"Our kernel of guided_step takes up to {EARLIER} earlier estimates, but was given {len(history)}.")
    # From pinned memory, so that the host goes on.
    numbers = torch.tensor(step_numbers(guidance_scale, kind, sigma, row, predicts), pin_memory=x.is_cuda)
    numbers = numbers.to(x.device, non_blocking=True)
    x_next, x0 = fused(x, cond, uncond, list(history), noise if row[2] else None, numbers)
    return x_next, x0


def reference(
    x: Tensor,
    cond: Tensor,
    uncond: Tensor | None,
    guidance_scale: float,
    kind: Kind,
    sigma: float,
    row: Row,
    predicts: str,
    history: Sequence[Tensor],
    noise: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """As guidance, prediction and solver do it one after the other."""
    out = cond if uncond is None else torch.lerp(uncond, cond, guidance_scale)
    here = Prediction(out, x, sigma, kind)
    keep, points, fresh = row
    x_next = x * keep
    for weight, point in zip(points, (here.x0 if predicts == "x0" else here.eps, *history), strict=True):
        x_next = x_next.add(point, alpha=weight)
    if fresh and noise is not None:
        x_next = x_next.add(noise, alpha=fresh)
    return x_next.to(x.dtype).contiguous(), here.x0.to(x.dtype, copy=True).contiguous()


def step_numbers(guidance_scale: float, kind: Kind, sigma: float, row: Row, predicts: str = "x0") -> tuple[float, ...]:
    """What :func:`fused` multiplies with, 7 numbers and one for each of 1 + EARLIER points, 0 for those there are not.

    They are the guidance scale, x and output in x0, x and output in the newest point, x and noise in the step.
    """
    if kind == "x0":
        x0, eps = (0.0, 1.0), (1.0 / sigma, -1.0 / sigma)
    elif kind == "epsilon":
        x0, eps = (1.0, -sigma), (0.0, 1.0)
    else:
        data, sign = preconditioning(kind).sigma_data, preconditioning(kind).sign
        variance = data**2 + sigma**2
        x0 = (data**2 / variance, sign * data * sigma / variance**0.5)
        eps = (sigma / variance, -sign * data / variance**0.5)
    point = eps if predicts == "eps" else x0
    keep, points, fresh = row
    return guidance_scale, *x0, *point, keep, fresh, *points, *(0.0,) * (1 + EARLIER - len(points))


@torch.library.custom_op("unrolled::guided_step", mutates_args=())
def fused(
    x: Tensor, cond: Tensor, uncond: Tensor | None, history: Sequence[Tensor], noise: Tensor | None, numbers: Tensor
) -> tuple[Tensor, Tensor]:
    """Our kernel; ``numbers`` are :func:`step_numbers` in float32 on the device, where a captured step finds them."""
    from .guided_step_kernel import launch

    return launch(x, cond, uncond, history, noise, numbers)


@fused.register_fake
def _(
    x: Tensor, cond: Tensor, uncond: Tensor | None, history: Sequence[Tensor], noise: Tensor | None, numbers: Tensor
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _require(
    x: Tensor,
    cond: Tensor,
    uncond: Tensor | None,
    kind: Kind,
    predicts: str,
    row: Row,
    history: Sequence[Tensor],
    noise: Tensor | None,
) -> None:
    known = isinstance(kind, Preconditioned) or kind in ("epsilon", "v", "x0")
    if not known or predicts not in ("x0", "eps"):
        raise BadInput(
            f"A network's output is epsilon, v or x0 and a method extrapolates x0 or eps, not {kind!r} and {predicts!r}."
        )
    if x.ndim < 2:
        raise BadInput(f"Latents are (batch, channels, …), but were given as {tuple(x.shape)}.")
    parts = {"cond": cond, "uncond": uncond, "noise": noise} | {f"history[{i}]": past for i, past in enumerate(history)}
    for name, part in parts.items():
        if part is not None and part.shape != x.shape:
            raise BadInput(f"{name} is like x, {tuple(x.shape)}, but was given as {tuple(part.shape)}.")
    if len(row[1]) != 1 + len(history):
        raise BadInput(f"A row of {len(row[1])} points takes one less of earlier estimates, but {len(history)} were given.")
    if row[2] and noise is None:
        raise BadInput(f"This row adds {row[2]:g} of noise, but none was given: give noise of unit variance like x.")
