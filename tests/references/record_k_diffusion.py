"""Records what k-diffusion's published samplers do on a closed-form denoiser, in float64.

    pip download k-diffusion==0.1.1.post1 --no-deps
    python tests/references/record_k_diffusion.py k_diffusion-0.1.1.post1-py3-none-any.whl

writes ``k_diffusion.safetensors`` beside this file; ``tests/schedulers/test_k_diffusion.py`` reads it. Of the wheel
only ``sampling.py`` runs. Nothing is random: denoiser, start and noise are formulas, and the test holds the same.
"""

from __future__ import annotations

import json
import sys
import types
import zipfile
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import save_file
from torch import Tensor

CELLS = torch.arange(16, dtype=torch.float64).view(1, 4, 2, 2)


def x0_of(x: Tensor, sigma: Tensor) -> Tensor:
    """The posterior mean for data that is ±0.8 with a spread of 0.5."""
    variance = 0.25 + sigma**2
    return (0.25 * x + sigma**2 * 0.8 * torch.tanh(0.8 * x / variance)) / variance


def path(sigma: float) -> Tensor:
    """Stands for a Brownian motion over sigma: its increments are as large, and it is a formula."""
    return torch.sin(5.0 * torch.tensor(sigma, dtype=torch.float64).log() + CELLS).mul(sigma**0.5)


def unit_noise(sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """The path's increment, brought to unit variance."""
    high, low = float(sigma), float(sigma_next)
    return (path(high) - path(low)).div(abs(high - low) ** 0.5)


def churn_noise(step: int) -> Tensor:
    """The noise of a churned step."""
    return torch.sin(3.0 * step + CELLS).mul(2.0**0.5)


CHURN = {"s_churn": 3.0, "s_tmin": 0.1, "s_tmax": 8.0, "s_noise": 1.01}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "euler": ("sample_euler", {}),
    "euler, churned": ("sample_euler", CHURN),
    "heun": ("sample_heun", {}),
    "heun, churned": ("sample_heun", CHURN),
    "dpm2": ("sample_dpm_2", {}),
    "dpm2, churned": ("sample_dpm_2", CHURN),
    "lms": ("sample_lms", {}),
    "lms, order 2": ("sample_lms", {"order": 2}),
    "dpm++2m": ("sample_dpmpp_2m", {}),
    **{
        f"{name}, eta {eta:g}": (f"sample_{sampler}", {"eta": eta, **more})
        for name, sampler, more in (
            ("euler ancestral", "euler_ancestral", {}),
            ("dpm2 ancestral", "dpm_2_ancestral", {}),
            ("dpm++2s", "dpmpp_2s_ancestral", {}),
            ("dpm++sde", "dpmpp_sde", {}),
            ("dpm++2m sde", "dpmpp_2m_sde", {}),
            ("dpm++2m sde heun", "dpmpp_2m_sde", {"solver_type": "heun"}),
            ("dpm++3m sde", "dpmpp_3m_sde", {}),
        )
        for eta in (0.0, 0.5, 1.0)
    },
}
RUNS_TO_ABOVE_ZERO = ("lms", "dpm++2m", "dpm++2m sde, eta 1", "dpm++3m sde, eta 1", "dpm++sde, eta 1")
FAST = {"dpm fast, 12 evaluations": 12, "dpm fast, 13 evaluations": 13, "dpm fast, 14 evaluations": 14}


def sampling_of(wheel: Path) -> types.ModuleType:
    """k-diffusion's sampling module alone: what it imports but does not need here is left empty."""

    def append_dims(x: Tensor, dims: int) -> Tensor:
        return x[(...,) + (None,) * (dims - x.ndim)]

    def module(name: str, **held: object) -> types.ModuleType:
        made = types.ModuleType(name)
        vars(made).update(held)
        return made

    package = module("k_diffusion", utils=module("k_diffusion.utils", append_dims=append_dims))
    stubs = {"torchdiffeq": module("torchdiffeq", odeint=None), "torchsde": module("torchsde"), "k_diffusion": package}
    sampling = module("k_diffusion.sampling", __package__="k_diffusion")
    with zipfile.ZipFile(wheel) as archive, mock.patch.dict(sys.modules, stubs):
        exec(compile(archive.read("k_diffusion/sampling.py"), "k_diffusion/sampling.py", "exec"), vars(sampling))
    return sampling


def recorded(sampler: Callable[..., Tensor], start: float, *args: Any, **options: Any) -> dict[str, Tensor]:
    """Every x and sigma the denoiser was asked at, in order, and the x at the end."""
    asked: list[tuple[Tensor, Tensor]] = []
    churn = map(churn_noise, count())  # k-diffusion draws it in every step, used or not

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        asked.append((x.clone(), sigma.clone()))
        return x0_of(x, sigma.view(-1, 1, 1, 1))

    with mock.patch.object(torch, "randn_like", side_effect=churn):
        end = sampler(denoise, start * torch.cos(2.0 * CELLS), *args, disable=True, **options)
    return {"x": torch.cat([x for x, _ in asked]), "sigma": torch.cat([sigma for _, sigma in asked]), "end": end}


def main(wheel: Path) -> None:
    torch.set_default_dtype(torch.float64)
    k = sampling_of(wheel)
    grids = {
        "karras": k.get_sigmas_karras(10, 0.03, 14.6),
        "karras, rho 5": k.get_sigmas_karras(6, 0.1, 80.0, rho=5.0),
        "exponential": k.get_sigmas_exponential(10, 0.03, 14.6),
        "polyexponential": k.get_sigmas_polyexponential(10, 0.03, 14.6, rho=1.5),
    }
    tensors = {f"sigmas/{name}": sigmas for name, sigmas in grids.items()}
    runs: dict[str, dict[str, Tensor]] = {}
    for name, (sampler, options) in CASES.items():
        noise = {"noise_sampler": unit_noise} if "eta" in options else {}
        for grid in ("karras", "above zero") if name in RUNS_TO_ABOVE_ZERO else ("karras",):
            sigmas = grids["karras"] if grid == "karras" else grids["polyexponential"][:-1]
            runs[f"{name}/{grid}"] = recorded(getattr(k, sampler), float(sigmas[0]), sigmas, **options, **noise)
    for name, evaluations in FAST.items():
        runs[f"{name}/even"] = recorded(k.sample_dpm_fast, 14.6, 0.03, 14.6, evaluations, noise_sampler=unit_noise)
    tensors |= {f"{run}/{part}": value for run, parts in runs.items() for part, value in parts.items()}
    facts = json.dumps({"version": wheel.name.split("-")[1], "cases": CASES})
    save_file(tensors, Path(__file__).with_name("k_diffusion.safetensors"), {"k-diffusion": facts})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
