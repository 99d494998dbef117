"""A film: what was seen of a run, as plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Norms:
    """Root mean squares over the first image's latents: 1 is the size of unit noise, None is not finite.

    Args:
        x: after the step.
        x0, eps: the estimates of the clean latents and of the noise.
        out: the network's output, guided.
    """

    x: float | None
    x0: float | None
    eps: float | None
    out: float | None


@dataclass(frozen=True)
class Guided:
    """What guidance did to one prediction; sizes as in :class:`Norms`.

    Args:
        scale: the guidance scale at this noise level, if it is known.
        cond, uncond: the two outputs.
        added: ``scale * (cond - uncond)``, what was added to uncond.
        moved: ``guided - cond``; None if the prediction was edited afterwards and is no output of the network any more.
    """

    scale: float | None
    cond: float | None
    uncond: float | None
    added: float | None
    moved: float | None


@dataclass(frozen=True)
class Frame:
    """One step, of the first image of the batch; pictures are WebP files of at most 256 pixels a side.

    Args:
        index, total, sigma, sigma_next, timestep: as of :class:`unrolled.core.loop.Step`.
        evaluations: calls of the denoiser.
        seconds: how long it took, without what filming took.
        memory: bytes, the most that was in use: of the GPU during the step, else of this process until then.
        x: after the step: the finished picture if ``finished``, else in the latents' colours.
        x0: the estimate of the clean latents: decoded if ``decoded``, else in the latents' colours.
        heat: for each word, where in the picture it was attended to.
        digest: of x; two steps with the same digest left the same latents, bit for bit.
    """

    index: int
    total: int
    sigma: float
    sigma_next: float
    timestep: float
    evaluations: int
    seconds: float
    memory: int | None
    norms: Norms
    guided: Guided | None
    digest: str
    x: bytes = b""
    x0: bytes = b""
    finished: bool = False
    decoded: bool = False
    heat: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Scene:
    """One stage, or one repetition of it, step by step.

    Args:
        stage: its name.
        repetition: how often the stage had run before.
        solver: where the schedule came from, in words.
    """

    stage: str
    repetition: int = 0
    model: str = ""
    solver: str = ""
    prompt: str = ""
    negative_prompt: str = ""
    frames: tuple[Frame, ...] = ()


@dataclass(frozen=True)
class Film:
    """A recorded run.

    Args:
        title: what to call it.
        seed: of the image that is shown.
        device: what it ran on, in words.
        versions: of what shaped it.
    """

    title: str
    scenes: tuple[Scene, ...] = ()
    seed: int = 0
    device: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)

    def save(self, path: str | Path, beside: Film | None = None) -> Path:
        """Write it as one HTML page that needs nothing else.

        Args:
            path: is overwritten.
            beside: another film, to be shown on the left of this one, step by step: a fork's parent, say.

        Raises:
            BadInput: the name does not end in .html; CannotWrite: see :func:`unrolled.core.files.write_atomically`.
        """
        from .page import save

        return save(path, self, beside)

    @classmethod
    def load(cls, path: str | Path) -> Film:
        """Read a film from its page; of two, the one that was saved.

        Raises:
            BadInput: there is none.
        """
        from .page import load

        return load(path)
