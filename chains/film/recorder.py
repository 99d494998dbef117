"""What is seen of every step of one run of the loop."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

import torch
from PIL import Image
from torch import Tensor

from ...core.errors import BadInput, NonFinite
from ...core.guidance import GuidanceScale
from ...core.latents import Latents
from ...core.loop import Step
from ...core.prediction import Prediction
from ..trail import digest
from .colours import coloured, fitted, glow, small, unfitted, webp
from .heat import Heat
from .values import Frame, Guided, Norms

Decoder = Callable[[Latents], list[Image.Image]]

Show = Callable[[Image.Image, str], object]
"""Called with a picture of every step's x0, and what it is in words."""


@dataclass
class Preview:
    """Pictures of the x0 of every step: decoded every so many steps and, as that is slow, in the latents' colours between.

    Args:
        every: 1 decodes all.
        show: is called with each.
    """

    decode: Decoder
    every: int = 1
    show: Show | None = None
    linear: Tensor | None = field(default=None, init=False)
    count: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        require_every(self.every)

    def __call__(self, step: Step) -> Image.Image | None:
        """The decoded picture of the first image, if this is a step for one."""
        decoded = self.decoded(step.preview) if self.count % self.every == 0 else None
        self.count += 1
        if self.show is not None:
            z = step.x0[0]
            seen = decoded or coloured(z, unfitted(len(z)) if self.linear is None else self.linear)
            self.show(seen, f"x0 in step {step.index + 1} of {step.total}, sigma {step.sigma:.3g}")
        return decoded

    def decoded(self, latents: Latents) -> Image.Image | None:
        """The first image of clean latents, small, unless the decoder gives NaN; the latents' colours are fitted to it."""
        try:
            picture = self.decode(latents[:1])[0]
        except NonFinite:
            return None
        self.linear = fitted(latents.x[0], picture)
        return small(picture)


def require_every(every: int) -> None:
    """Raise BadInput unless it is a number of steps."""
    if every < 1:
        raise BadInput(f"Previews are decoded every so many steps, 1 or more, got {every}.")


class Recorder:
    """Makes frames of steps: ``see`` each, then take ``frames()``.

    Args:
        preview: makes their pictures.
        guidance_scale: what the denoiser was given, if it is known.
        heat: the words that are looked at, while :func:`unrolled.kernels.attending.attending` runs its ``edit``.
    """

    def __init__(self, preview: Preview, guidance_scale: GuidanceScale | None = None, heat: Heat | None = None) -> None:
        self.preview, self.guidance_scale, self.heat = preview, guidance_scale, heat
        self.taken, self.newest = list[_Taken](), list[Step]()

    def see(self, step: Step) -> None:
        """Look at one step; changes nothing but that torch's peak of a GPU's memory counts from here again."""
        seconds = step.seconds + _waited(step.x.device)
        x, prediction = step.x[0].float().cpu(), step.prediction
        frame = Frame(
            index=step.index,
            total=step.total,
            sigma=step.sigma,
            sigma_next=step.sigma_next,
            timestep=step.timestep,
            evaluations=len(step.predictions),
            seconds=seconds,
            memory=_memory(step.x.device),
            norms=Norms(*map(_rms, (step.x, step.x0, prediction.eps, prediction.out))),
            guided=_guided(prediction, self.guidance_scale),
            digest=digest(x.contiguous().numpy().tobytes()),
        )
        heat = self.heat.taken((x.shape[-2], x.shape[-1]), prediction.cond is not None) if self.heat else {}
        self.taken.append(_Taken(frame, x / math.hypot(1.0, step.sigma_next), step.x0[0].cpu(), self.preview(step), heat))
        self.newest[:] = [step]

    def frames(self) -> tuple[Frame, ...]:
        """All that was seen, with pictures; latents in the colours that fit the last step's."""
        if not self.taken:
            return ()
        (step,), last = self.newest, self.taken[-1]
        last.picture = last.picture or self.preview.decoded(step.preview)
        linear = unfitted(len(last.x)) if self.preview.linear is None else self.preview.linear
        finished = self.preview.decoded(step.latents) if step.latents.is_clean else None
        heat = {word: _stretched([one.heat[word] for one in self.taken]) for word in last.heat}
        return tuple(
            replace(
                one.frame,
                x=webp(finished if finished and one is last else coloured(one.x, linear)),
                x0=webp(one.picture or coloured(one.x0, linear)),
                finished=finished is not None and one is last,
                decoded=one.picture is not None,
                heat={word: webp(glow(maps[i])) for word, maps in heat.items()},
            )
            for i, one in enumerate(self.taken)
        )


@dataclass
class _Taken:
    """What is kept of a step until all are there; ``x`` in unit variance."""

    frame: Frame
    x: Tensor
    x0: Tensor
    picture: Image.Image | None
    heat: dict[str, Tensor]


def _guided(prediction: Prediction, guidance_scale: GuidanceScale | None) -> Guided | None:
    cond, uncond = prediction.cond, prediction.uncond
    if cond is None or uncond is None:
        return None
    scale = guidance_scale(prediction.sigma) if callable(guidance_scale) else guidance_scale
    edited = prediction.kind == "x0"  # by with_x0: no network here is guided that speaks of x0
    return Guided(
        scale=scale,
        cond=_rms(cond),
        uncond=_rms(uncond),
        added=None if scale is None else _rms(scale * (cond - uncond)),
        moved=None if edited else _rms(prediction.out - cond),
    )


def _stretched(maps: Sequence[Tensor]) -> list[Tensor]:
    """From the least of all to the most of all as from 0 to 1."""
    low, high = min(float(one.min()) for one in maps), max(float(one.max()) for one in maps)
    return [(one - low) / max(high - low, 1e-12) for one in maps]


def _rms(tensor: Tensor) -> float | None:
    """Of the first image."""
    value = float(tensor[0].double().square().mean().sqrt())
    return value if math.isfinite(value) else None


def _waited(device: torch.device) -> float:
    """Seconds until the device has done what it was given, which the loop's own clock does not wait for."""
    began = time.perf_counter()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def _memory(device: torch.device) -> int | None:
    if device.type == "cuda":
        most = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return most
    with suppress(ImportError):  # Windows has none
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return None
