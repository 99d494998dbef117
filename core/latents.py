"""Latents that know which VAE they belong to and how noisy they are."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .errors import BadInput, NonFinite, SpaceMismatch
from .files import write_atomically
from .solver import History, Past

FORMAT = "unrolled-latents-1"


@dataclass(frozen=True)
class LatentSpace:
    """Which VAE latents belong to.

    The fingerprint is of the *encoder*: it defines the space, a fine-tuned decoder does not.
    ``scaling`` takes the encoder's output to unit variance; ``downscale`` is pixels per latent.
    """

    family: str
    channels: int
    downscale: int
    scaling: float
    fingerprint: str

    def __str__(self) -> str:
        return f"{self.family}/{self.downscale} {self.fingerprint[:8]}"

    def require(self, other: LatentSpace, what: str) -> None:
        """Raise :class:`SpaceMismatch` unless ``other`` is this space."""
        if self != other:
            mine, others = str(self), str(other)
            if mine == others:
                mine, others = f"{mine}, scaled by {self.scaling:.5g}", f"{others}, scaled by {other.scaling:.5g}"
            raise SpaceMismatch(
                f"{what} works in latent space [{mine}] but was given latents of [{others}]: "
                'decode and encode in between (via = "pixels" in a chain).'
            )


@dataclass(frozen=True, repr=False)
class Latents:
    """The handoff between stages: ``x = x0 + sigma * noise``.

    Args:
        x: (batch, channels, height / downscale, width / downscale), float32.
        space: the VAE these latents belong to.
        sigma: how noisy they are.
        end: the level at which their schedule ends; there, or at 0, they count as clean. Some of
            diffusers' schedules end at the lowest training noise (0.029 for Stable Diffusion).
        seeds: one per image, so that what follows can draw the same noise again.
        stream: which of a seed's streams of noise this run draws from.
        history: what the solver remembers, oldest first; valid only for the same model.
    """

    x: Tensor
    space: LatentSpace
    sigma: float = 0.0
    seeds: tuple[int, ...] = ()
    stream: str = ""
    history: History = field(default=())
    end: float = 0.0

    def __post_init__(self) -> None:
        if self.x.ndim != 4 or self.x.shape[1] != self.space.channels:
            raise BadInput(
                f"Latents of [{self.space}] are (batch, {self.space.channels}, height, width), "
                f"but the tensor given is {tuple(self.x.shape)}."
            )
        if self.seeds and len(self.seeds) != len(self.x):
            raise BadInput(f"{len(self.x)} latents were given with {len(self.seeds)} seeds: one seed per image is needed.")

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, part: slice) -> Latents:
        """Some images of the batch, history and seeds with them."""
        past = tuple(Past(p.sigma, p.x[part], p.x0[part]) for p in self.history)
        return replace(self, x=self.x[part], seeds=self.seeds[part], history=past)

    def __repr__(self) -> str:
        dtype = str(self.x.dtype).removeprefix("torch.")
        state = "clean" if self.is_clean else "noisy"
        return (
            f"Latents({'x'.join(map(str, self.x.shape))} {dtype} {self.x.device} "
            f"space=[{self.space}] sigma={self.sigma:.4g} {state}, history={len(self.history)}, seeds={list(self.seeds)})"
        )

    @property
    def is_clean(self) -> bool:
        """Whether the noise left is no more than their finished schedule leaves."""
        return self.sigma <= self.end

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        height, width = self.x.shape[-2:]
        return height * self.space.downscale, width * self.space.downscale

    @property
    def clean(self) -> Tensor:
        """``x`` of clean latents without the factor a last sigma above 0 leaves.

        There the variance-preserving state ``x / sqrt(1 + sigma^2)`` is the clean picture, as diffusers
        takes it.
        """
        self.require_clean("take as a picture")
        return self.x / math.sqrt(1.0 + self.sigma**2) if self.sigma else self.x

    @property
    def unscaled(self) -> Tensor:
        """:attr:`clean` as the VAE's decoder takes it."""
        self.require_clean("decode")
        return self.clean / self.space.scaling

    def to(self, device: torch.device | str) -> Latents:
        """Moved to a device, history with them."""
        past = tuple(Past(p.sigma, p.x.to(device), p.x0.to(device)) for p in self.history)
        return replace(self, x=self.x.to(device), history=past)

    def handed_on(self, stream: str) -> Latents:
        """For another run than the one they come from: without what its solver remembers, with noise of its own stream."""
        return replace(self, stream=stream, history=())

    def require_clean(self, what: str) -> None:
        """Raise :class:`BadInput` if these latents still hold noise."""
        if not self.is_clean:
            raise BadInput(
                f"Cannot {what} latents that still hold noise at sigma {self.sigma:.4g} (clean is at most {self.end:.3g}): "
                "denoise them to the end, or take a step's x0 estimate (step.preview)."
            )

    def save(self, path: str | Path) -> None:
        """Write everything to one safetensors file, atomically.

        Raises:
            NonFinite: x holds NaN or infinity; CannotWrite: see :func:`write_atomically`.
        """
        tensors, facts = packed(self)
        write_atomically(path, save(tensors, {"format": FORMAT, "latents": json.dumps(facts)}))

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> Latents:
        """Read what :meth:`save` wrote; bit-exact."""
        if not os.path.isfile(path):
            raise BadInput(f"There is no latents file at {path}.")
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise BadInput(f"{path} is a safetensors file but not one that Latents.save wrote.")
                return unpacked(file.get_tensor, json.loads(metadata["latents"]))
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise BadInput(f"{path} is damaged and cannot be read as latents ({error}).") from error


def packed(latents: Latents, prefix: str = "") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """As tensors on the CPU by name, and what JSON can hold; :func:`unpacked` is the way back.

    Raises:
        NonFinite: x holds NaN or infinity.
    """
    if not bool(torch.isfinite(latents.x).all()):
        raise NonFinite("These latents hold NaN or infinity and are not worth saving: the fault lies before.")
    tensors = {"x": latents.x}
    for i, past in enumerate(latents.history):
        tensors |= {f"history.{i}.x": past.x, f"history.{i}.x0": past.x0}
    facts = {
        "space": asdict(latents.space),
        "sigma": latents.sigma,
        "seeds": latents.seeds,
        "stream": latents.stream,
        "end": latents.end,
        "history": [past.sigma for past in latents.history],
    }
    return {prefix + name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}, facts


def unpacked(tensor: Callable[[str], Tensor], facts: Mapping[str, Any], prefix: str = "") -> Latents:
    """What :func:`packed` was given; KeyError, TypeError or ValueError if that is not what this is."""

    def read(name: str) -> Tensor:
        # Into memory of torch's own: sums come out otherwise where a file happens to lie across cache lines.
        return tensor(prefix + name).clone()

    history = tuple(Past(sigma, read(f"history.{i}.x"), read(f"history.{i}.x0")) for i, sigma in enumerate(facts["history"]))
    space, seeds = LatentSpace(**facts["space"]), tuple(facts["seeds"])
    return Latents(read("x"), space, facts["sigma"], seeds, facts["stream"], history, facts["end"])


def batch(parts: Sequence[Latents]) -> Latents:
    """Several latents of one space, sigma, size, stream and history as one batch."""
    if not parts:
        raise BadInput("A batch needs at least one set of latents.")
    first = parts[0]
    for part in parts[1:]:
        first.space.require(part.space, "A batch")
        if part.sigma != first.sigma:
            raise BadInput(f"A batch needs one noise level, but was given sigma {first.sigma:.4g} and {part.sigma:.4g}.")
        if part.size != first.size:
            (h, w), (h2, w2) = first.size, part.size
            raise BadInput(f"A batch needs one size, but was given {w}x{h} and {w2}x{h2}.")
        if part.stream != first.stream:
            raise BadInput(f"A batch needs one stream of noise, but was given {first.stream!r} and {part.stream!r}.")
        if [p.sigma for p in part.history] != [p.sigma for p in first.history]:
            raise BadInput("A batch needs one history: these latents have been through different noise levels.")
    history = tuple(
        Past(points[0].sigma, torch.cat([p.x for p in points]), torch.cat([p.x0 for p in points]))
        for points in zip(*(part.history for part in parts), strict=True)
    )
    seeds = tuple(seed for part in parts for seed in part.seeds)
    return replace(first, x=torch.cat([part.x for part in parts]), seeds=seeds, history=history)
