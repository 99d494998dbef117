"""A test bench with a closed form: Gaussian mixtures, of which everything a solver approximates is known exactly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor

from .errors import BadInput
from .latents import Latents, LatentSpace
from .noise import Noise, NoiseSource
from .prediction import Kind, Prediction
from .schedule import Schedule


@dataclass(frozen=True, repr=False, eq=False)
class GaussianMixture:
    """Pictures that follow a mixture of Gaussians: their exact denoiser, score, density, samples and ODE solution.

    The mixture *is* a denoiser, for the loop to call where a network would stand::

        means, stds = torch.tensor([[-1.0, 0.0], [1.0, 0.5]]), torch.tensor([0.1, 0.3])
        mixture = GaussianMixture(means, stds, torch.tensor([0.4, 0.6]))
        schedule = Schedule.at([20.0, 8.0, 3.0, 1.0, 0.3, 0.1, 0.0])
        start = mixture.latents(range(1000), schedule)
        end = denoise(mixture, start, schedule, DPMpp2M())
        error = (end.x - mixture.solve(start.x, 20.0, 0.0)).abs().max()  # of the solver, on every path
        distance = mixture.distance(end.x)  # of the pictures' distribution from the true one

    With noise added, ``x = x0 + sigma * noise``, a mixture stays a mixture: each variance grows by sigma^2.
    Everything is reckoned in float64 and comes back in the dtype of ``x``, which may have any shape
    (n, …) with as many numbers to a picture as a mean has.

    Args:
        means: (k, …), one picture per component, e.g. (k, 2) or (k, 4, 8, 8).
        stds: (k,), or like ``means`` for one each; 0 or more. With 0 a component is a single picture, and
            a mixture of those is a data set with its ideal denoiser.
        weights: (k,), above 0; need not add up to 1.
        kind: in which parametrisation it speaks, as a network would.
    """

    means: Tensor
    stds: Tensor
    weights: Tensor
    kind: Kind = "x0"

    def __post_init__(self) -> None:
        k = len(self.means) if self.means.ndim > 1 else 0
        if not k or self.weights.shape != (k,) or self.stds.shape not in ((k,), self.means.shape):
            raise BadInput(
                "A mixture takes means (k, …), stds (k,) or like the means, and weights (k,), but was given "
                f"{tuple(self.means.shape)}, {tuple(self.stds.shape)} and {tuple(self.weights.shape)}."
            )
        if not bool((self.stds >= 0).all()) or not bool((self.weights > 0).all()):
            raise BadInput("The stds of a mixture must be 0 or more and its weights above 0.")

    def __repr__(self) -> str:
        picture = "x".join(map(str, self.means.shape[1:]))
        return f"GaussianMixture({len(self.means)} components of {picture}, kind {self.kind})"

    def __call__(self, x: Tensor, sigma: float, timestep: float = 0.0, /) -> Prediction:
        """E[x0 | x] at noise level ``sigma``, said in ``kind``; the timestep is not looked at.

        Given the component, x0 is normal around ``mean + std^2 / (std^2 + sigma^2) (x - mean)``; the mean over
        components is by their share in ``x``.
        """
        log_joint, pull = self._components(x, sigma)
        share = log_joint.softmax(1).unsqueeze(2)
        eps = sigma * (share * pull).sum(1)
        if self.kind != "epsilon":
            means, stds, _ = self._parts(x.device)
            x0 = (share * (means + stds**2 * pull)).sum(1)
        out = eps if self.kind == "epsilon" else x0 if self.kind == "x0" else (eps - sigma * x0) / math.sqrt(1 + sigma**2)
        return Prediction(out.reshape(x.shape).to(x.dtype), x, sigma, self.kind)

    def score(self, x: Tensor, sigma: float) -> Tensor:
        """The gradient of :meth:`log_density`: ``-eps / sigma``, where it points to likelier pictures."""
        log_joint, pull = self._components(x, sigma)
        return -(log_joint.softmax(1).unsqueeze(2) * pull).sum(1).reshape(x.shape).to(x.dtype)

    def log_density(self, x: Tensor, sigma: float = 0.0) -> Tensor:
        """Log of the density at noise level ``sigma``: (n,), float64, in nats."""
        return self._components(x, sigma)[0].logsumexp(1)

    def sample(self, seeds: Sequence[int], sigma: float = 0.0, source: NoiseSource | None = None) -> Tensor:
        """True samples at noise level ``sigma``: (n, …) float64, one per seed, the same whatever the others are.

        ``source`` draws instead of the seeds, e.g. ``DiffusersNoise(generator)`` for many at once.
        """
        source, n = source or Noise(tuple(seeds)), len(seeds)
        means, stds, log_weights = self._parts("cpu")
        chance = torch.special.ndtr(source((n, 1), "component").double()).flatten()
        which = torch.searchsorted(log_weights.exp().cumsum(0), chance).clamp_max(len(means) - 1)
        size = (n, means.shape[1])
        x0 = means[which] + stds[which] * source(size, "picture")
        return (x0 + sigma * source(size, "latents")).reshape(n, *self.means.shape[1:])

    def latents(self, seeds: Sequence[int], schedule: Schedule, source: NoiseSource | None = None) -> Latents:
        """Where a run starts: samples at the schedule's first level, which pure noise only comes close to.

        Means of (k, d) give latents of (n, d, 1, 1).

        Raises:
            BadInput: the means are neither (k, d) nor (k, channels, height, width).
        """
        sigma = schedule.sigmas[0]
        shape = (len(seeds), *self._latent_shape())
        x = self.sample(seeds, sigma, source).reshape(shape)
        return Latents(x, self.space, sigma, tuple(seeds), end=schedule.finished_at)

    @cached_property
    def space(self) -> LatentSpace:
        """The latent space of this mixture and no other."""
        parts = b"".join(part.cpu().contiguous().numpy().tobytes() for part in self._parts("cpu"))
        return LatentSpace("GaussianMixture", self._latent_shape()[0], 1, 1.0, sha256(parts).hexdigest()[:16])

    def solve(self, x: Tensor, sigma: float, sigma_next: float) -> Tensor:
        """Where the probability-flow ODE ``dx / dsigma = eps(x, sigma)`` takes ``x``, to about 1e-11.

        Down to 0 as well, and up (the noise that leads to a picture). An explicit Runge–Kutta method of eighth
        order (scipy's DOP853) in ``asinh(sigma / smallest std)``: log sigma far up, sigma near 0.

        Raises:
            BadInput: a level of 0 where a component is a single picture (solve to a small one and take its x0), or one
                below 0.
        """
        from scipy.integrate import solve_ivp

        if min(sigma, sigma_next) < 0.0:
            raise BadInput(f"Noise levels are 0 or more, got {sigma:g} and {sigma_next:g}.")
        if sigma == sigma_next:
            return x
        if not min(sigma, sigma_next):
            self._require_spread()
        epsilon = GaussianMixture(self.means.cpu(), self.stds.cpu(), self.weights.cpu(), "epsilon")
        scale = float(self.stds.min()) or min(sigma, sigma_next)

        def slope(time: float, flat: Any) -> Any:
            here = max(scale * math.sinh(time), 0.0)  # rounding may take the last evaluation just below
            eps = epsilon(torch.from_numpy(flat).view(x.shape), here).out
            return math.hypot(here, scale) * eps.flatten().numpy()

        span = (math.asinh(sigma / scale), math.asinh(sigma_next / scale))
        flat = x.detach().cpu().double().flatten().numpy()
        solved = solve_ivp(slope, span, flat, method="DOP853", t_eval=span[1:], rtol=1e-12, atol=1e-12)
        return torch.from_numpy(solved.y[:, -1].copy()).view(x.shape).to(x)

    def distance(self, x: Tensor, sigma: float = 0.0, directions: int = 64) -> float:
        """The sliced Wasserstein-1 distance between pictures ``x`` (n, …) and the mixture at noise level ``sigma``.

        Seen along one direction the mixture is a mixture in one dimension, whose distribution function is known, so
        that only ``x`` is finite; the mean over fixed random directions. n true samples are about ``std / sqrt(n)`` away.
        """
        means, stds, log_weights = self._parts("cpu")
        flat, d = x.detach().cpu().double().flatten(1), means.shape[1]
        along = torch.randn(directions, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        along = along / along.norm(dim=1, keepdim=True) if d > 1 else torch.ones(1, 1, dtype=torch.float64)
        centres, seen = along @ means.T, (along @ flat.T).sort(1).values
        widths = (along.square() @ (stds.expand_as(means) ** 2 + sigma**2).T).sqrt().clamp_min(1e-300)
        low = torch.minimum((centres - 8 * widths).amin(1), seen[:, 0])
        high = torch.maximum((centres + 8 * widths).amax(1), seen[:, -1])
        at = torch.lerp(low[:, None], high[:, None], torch.linspace(0, 1, 4096, dtype=torch.float64))
        cumulative = torch.special.ndtr((at[..., None] - centres[:, None]) / widths[:, None]) @ log_weights.exp()
        empirical = torch.searchsorted(seen, at, right=True) / len(x)
        return float(((empirical - cumulative).abs().mean(1) * (high - low)).mean())

    def _parts(self, device: torch.device | str) -> tuple[Tensor, Tensor, Tensor]:
        """Means (k, d), stds (k, 1) or (k, d) and log weights (k,) in float64."""
        means, stds, weights = (part.to(device, torch.float64) for part in (self.means, self.stds, self.weights))
        return means.flatten(1), stds.reshape(len(stds), -1), weights.log().log_softmax(0)

    def _components(self, x: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
        """Log density of ``x`` together with each component, (n, k), and ``(x - mean) / variance``, (n, k, d)."""
        means, stds, log_weights = self._parts(x.device)
        if x.ndim < 2 or x[0].numel() != means.shape[1]:
            raise BadInput(f"{self} takes pictures (n, …) of {means.shape[1]} numbers each, but was given {tuple(x.shape)}.")
        if not sigma:
            self._require_spread()
        offset, variance = x.double().reshape(len(x), 1, -1) - means, stds**2 + sigma**2
        pull = offset / variance
        log_normal = -0.5 * (offset * pull + (2 * math.pi * variance).log()).sum(2)
        return log_weights + log_normal, pull

    def _require_spread(self) -> None:
        if not bool((self.stds > 0).all()):
            raise BadInput("A mixture with a std of 0 has no density at sigma 0: ask above 0, there its x0 is exact.")

    def _latent_shape(self) -> tuple[int, int, int]:
        shape = (*self.means.shape[1:], 1, 1) if self.means.ndim == 2 else tuple(self.means.shape[1:])
        if len(shape) != 3:
            raise BadInput(
                f"Latents need means of (k, d) or (k, channels, height, width), but these are {tuple(self.means.shape)}."
            )
        return shape
