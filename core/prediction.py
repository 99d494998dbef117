"""What a denoiser says about ``x`` at ``sigma``, in whichever parametrisation its network speaks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Preconditioned:
    """The clean latents as a mean of ``x`` and the output (Karras et al., arXiv:2206.00364, table 1).

    ``x0 = c_skip x + sign c_out out`` with ``c_skip = sigma_data^2 / (sigma^2 + sigma_data^2)`` and ``c_out = sigma
    sigma_data / sqrt(sigma^2 + sigma_data^2)``. With unit data and the sign turned this is v prediction.

    Args:
        sigma_data: standard deviation of the clean latents; the network takes x over ``sqrt(sigma^2 + sigma_data^2)``.
    """

    sigma_data: float = 0.5
    sign: Literal[1, -1] = 1


Kind = Literal["epsilon", "v", "x0"] | Preconditioned
"""What a network's output means."""


def preconditioning(kind: Kind) -> Preconditioned:
    """That of a network; every one that is not ``Preconditioned`` otherwise was trained on data of unit variance."""
    return kind if isinstance(kind, Preconditioned) else Preconditioned(1.0, -1)


@dataclass(frozen=True, repr=False, eq=False)
class Prediction:
    """A network's output at ``x``, and what it means in ``x = x0 + sigma * noise``.

    ``out`` is the output after guidance, of the given ``kind``; ``cond`` and ``uncond`` are the two it
    was made of, where there were two, as the network gave them. ``kept_eps`` holds a noise estimate
    that is not the one ``out`` implies, ``variance`` what a network that learned it says of the variance of an
    ancestral step, about -1 to 1. Guidance is linear in ``out``, so that it is the same thing done on x0 or on
    the noise. To change a prediction use ``dataclasses.replace(prediction, out=...)`` or :meth:`with_x0`.
    """

    out: Tensor
    x: Tensor
    sigma: float
    kind: Kind = "epsilon"
    cond: Tensor | None = None
    uncond: Tensor | None = None
    kept_eps: Tensor | None = None
    variance: Tensor | None = None

    @classmethod
    def from_x0(cls, x0: Tensor, x: Tensor, sigma: float) -> Prediction:
        """For denoisers that know the clean latents directly, e.g. a closed form."""
        return cls(x0, x, sigma, "x0")

    @cached_property
    def x0(self) -> Tensor:
        """The estimate of the clean latents."""
        if self.kind == "x0":
            return self.out
        if self.kind == "epsilon":
            return torch.sub(self.x, self.out, alpha=self.sigma)
        # v = alpha * eps - sigma_vp * x0 (Salimans & Ho, arXiv:2202.00512, app. D),
        # with alpha = 1 / sqrt(1 + sigma^2) and x_vp = alpha * x.
        data, sign = preconditioning(self.kind).sigma_data, preconditioning(self.kind).sign
        variance = data**2 + self.sigma**2
        return torch.add(self.x / (variance / data**2), self.out, alpha=sign * data * self.sigma / variance**0.5)

    @cached_property
    def eps(self) -> Tensor:
        """The estimate of the noise, of unit variance."""
        if self.kept_eps is not None:
            return self.kept_eps
        if self.kind == "epsilon":
            return self.out
        if self.kind == "x0":
            return (self.x - self.out) / self.sigma
        data, sign = preconditioning(self.kind).sigma_data, preconditioning(self.kind).sign
        variance = data**2 + self.sigma**2
        return torch.add(self.out / (-sign * variance**0.5 / data), self.x, alpha=self.sigma / variance)

    def with_x0(self, x0: Tensor, *, keep_eps: bool = False) -> Prediction:
        """The same prediction with another clean estimate.

        ``keep_eps`` leaves the noise estimate as it was, which is how DDIM clips (it moves x0 but
        not the direction); else the noise follows from ``x`` and the new x0.
        """
        eps = self.eps if keep_eps else None
        return Prediction(x0, self.x, self.sigma, "x0", self.cond, self.uncond, eps, self.variance)
