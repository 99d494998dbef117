"""What holds for all solvers alike: splits, resuming, batches, and that a step never waits for the device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from unrolled import schedulers
from unrolled.core.conditioning import Conditioning
from unrolled.core.denoiser import Denoiser
from unrolled.core.guidance import classifier_free
from unrolled.core.latents import Latents, LatentSpace
from unrolled.core.loop import denoise, steps
from unrolled.core.noise import Brownian, Levels, Noise
from unrolled.core.prediction import Prediction
from unrolled.core.schedule import Schedule
from unrolled.core.solver import Draw, Evaluate, History, Solver
from unrolled.schedulers.config import read_scheduler
from unrolled.schedulers.faithful import DiffusersDDIM, DiffusersNoiseAtEnd, DiffusersPLMS

SPACE = LatentSpace("test", 4, 1, 1.0, "0" * 16)
STEPS = 8
CONFIG = {
    "_class_name": "EulerDiscreteScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "timestep_spacing": "trailing",
}
SCHEDULE = read_scheduler(CONFIG).schedule(STEPS)
TABLE, TAPER = SCHEDULE.training_sigmas, SCHEDULE.sigmas[-3:]

SOLVERS: dict[str, Solver] = {
    "Euler": schedulers.Euler(),
    "DDIM": schedulers.DDIM(0.5),
    "DDPM": schedulers.DDPM("large"),
    "EulerAncestral": schedulers.EulerAncestral(),
    "Heun": schedulers.Heun(),
    "PLMS": schedulers.PLMS(),
    "PNDM": schedulers.PNDM(TABLE),
    "LMS": schedulers.LMS(),
    "IPNDM": schedulers.IPNDM(),
    "DEIS": schedulers.DEIS(3, TAPER),
    "DPMSolver": schedulers.DPMSolver(3, predicts="eps", taper=TAPER),
    "DPMSolver, SDE": schedulers.DPMSolver(2, predicts="eps", tau=1.0),
    "DPMpp2M": schedulers.DPMpp2M(),
    "DPMpp2MSDE": schedulers.DPMpp2MSDE(),
    "DPMpp3M": schedulers.DPMpp3M(TAPER),
    "DPMpp3MSDE": schedulers.DPMpp3MSDE(),
    "UniPC": schedulers.UniPC(3, taper=TAPER),
    "UniPC, eps": schedulers.UniPC(2, solver_type="bh1", predicts="eps", uncorrected=SCHEDULE.sigmas[:3]),
    "SASolver": schedulers.SASolver(3, 4, tau=schedulers.TauBetween(0.1, 5.0), taper=TAPER),
    "SASolver, eps": schedulers.SASolver(1, 3, tau=0.7, predicts="eps"),
    "Singlestep": schedulers.Singlestep(3),
    "Singlestep, SDE": schedulers.Singlestep(2, tau=1.0),
    "DPM2": schedulers.DPM2(),
    "DPM2, ancestral": schedulers.DPM2(1.0),
    "DPMpp2S": schedulers.DPMpp2S(0.5),
    "DPMppSDE": schedulers.DPMppSDE(),
    "LCM": schedulers.LCM(TABLE),
    "TCD": schedulers.TCD(0.3, TABLE),
    "Renoised": schedulers.Renoised(schedulers.DPMpp2M(), schedulers.Ancestral(0.5)),
    "Churned": schedulers.Churned(schedulers.Heun(), 0.2, scale=1.01),
    "Clipped": schedulers.Clipped(schedulers.DPMpp2M(), 1.0, keep_eps=True),
    "Thresholded": schedulers.Thresholded(schedulers.UniPC(2), 0.9, 2.0),
    "diffusers' DDIM": DiffusersDDIM(0.5, TABLE, 125, TABLE[0], 1.0),
    "diffusers' DDPM": DiffusersNoiseAtEnd(schedulers.DDPM("large"), TABLE[0]),
    "diffusers' PLMS": DiffusersPLMS(TABLE, 125, 0.0),
}
NOT_SOLVERS = {"Ancestral", "TauBetween", "ToZero"}
every_solver = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS.keys())


def network(x: Tensor, sigma: float, timestep: float) -> Prediction:
    seen = x / (1 + sigma**2) ** 0.5
    return Prediction(torch.tanh(seen) + 0.3 * torch.cos(2 * seen + timestep / 500), x, sigma)


def latents(*seeds: int, schedule: Schedule = SCHEDULE) -> Latents:
    x = schedule.sigmas[0] * Noise(seeds)((len(seeds), 4, 8, 8), "latents")
    return Latents(x, SPACE, schedule.sigmas[0], seeds)


def run(solver: Solver, start: Latents, schedule: Schedule = SCHEDULE, *, path: bool = False) -> Latents:
    noise = Brownian(start.seeds) if path else None
    return denoise(network, start, schedule, solver, noise=noise)


def test_the_list_is_complete() -> None:
    named = {name.split(",")[0] for name in SOLVERS}
    assert set(schedulers.__all__) - NOT_SOLVERS == {name for name in named if not name.startswith("diffusers'")}


@every_solver
def test_split_anywhere_and_resumed_from_disk(solver: Solver, tmp_path: Path) -> None:
    whole = run(solver, latents(5, 6))
    for cut in range(1, STEPS):
        before, after = SCHEDULE.split(cut)
        run(solver, latents(5, 6), before).save(tmp_path / "half.safetensors")
        resumed = run(solver, Latents.load(tmp_path / "half.safetensors"), after)
        assert torch.equal(resumed.x, whole.x), f"split at {cut}"
        assert resumed.sigma == whole.sigma


def test_the_split_test_sees_a_lost_history() -> None:
    before, after = SCHEDULE.split(4)
    solver = SOLVERS["LMS"]
    half = run(solver, latents(5), before)
    assert not torch.equal(run(solver, replace(half, history=()), after).x, run(solver, latents(5)).x)


@every_solver
def test_an_image_does_not_know_its_batch(solver: Solver) -> None:
    together = run(solver, latents(5, 6, 7))
    turned = run(solver, latents(7, 5, 6))
    assert torch.equal(turned.x[[1, 2, 0]], together.x)
    for i in range(3):
        assert torch.equal(run(solver, latents(5 + i)).x, together.x[i : i + 1])
    before, after = SCHEDULE.split(STEPS // 2)  # parted in the middle, its part of the history with it
    half = run(solver, latents(5, 6, 7), before)
    assert torch.equal(run(solver, half[1:], after).x, together.x[1:])


@pytest.mark.parametrize("name", ["DPMppSDE", "DPMpp3MSDE", "SASolver", "EulerAncestral"])
def test_the_same_on_one_path_of_noise(name: str) -> None:
    whole = run(SOLVERS[name], latents(5, 6), path=True)
    assert not torch.equal(whole.x, run(SOLVERS[name], latents(5, 6)).x)
    assert torch.equal(run(SOLVERS[name], latents(6), path=True).x, whole.x[1:])
    for cut in range(1, STEPS):
        before, after = SCHEDULE.split(cut)
        half = run(SOLVERS[name], latents(5, 6), before, path=True)
        assert torch.equal(run(SOLVERS[name], half, after, path=True).x, whole.x), f"split at {cut}"


# --- waiting for the device

READS = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select", "unique", "_unique2", "_to_cpu"}


class Watched(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Fails at an operation that the host waits for, and at a tensor that lies elsewhere than on the device.

    The device is "meta", which has shapes and no numbers: what asks for a number fails there by itself too.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in READS, f"{name} waits for the device"
        out = func(*args, **(kwargs or {}))
        elsewhere = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor) and t.device.type != "meta"]
        assert not elsewhere, f"{name} takes or makes a tensor on the {elsewhere[0].device}"
        return out


def noise_on_device(
    shape: Sequence[int], purpose: str, step: int = 0, draw: int = 0, levels: Levels | None = None
) -> Tensor:
    """``Noise`` draws on the CPU on purpose; what it costs to bring that over is not looked at here."""
    return torch.empty(list(shape), device="meta")


def guided_on_device() -> Denoiser:
    context = torch.empty(1, 3, 2, device="meta")

    def conditional(x: Tensor, sigma: float, timestep: float, conditioning: Conditioning, /) -> Prediction:
        assert conditioning.context is not None
        return Prediction(torch.tanh(x) + conditioning.context.mean(), x, sigma)

    return classifier_free(conditional, Conditioning(context=context), Conditioning(context=context), 5.0)


def steps_watched(solver: Solver) -> Iterator[int]:
    """The steps of the loop but the last, after which the loop does wait, once, to see that all was finite."""
    start = Latents(torch.empty(2, 4, 8, 8, device="meta"), SPACE, SCHEDULE.sigmas[0], (5, 6))
    with Watched():  # type: ignore[no-untyped-call]
        for step in islice(steps(guided_on_device(), start, SCHEDULE, solver, noise_on_device), STEPS):
            yield step.index


@every_solver
def test_no_step_waits_for_the_device(solver: Solver) -> None:
    assert list(steps_watched(solver)) == list(range(STEPS))


def reads_a_number(
    denoise: Evaluate, x: Tensor, sigma: float, sigma_next: float, history: History, noise: Draw, /
) -> tuple[Tensor, History]:
    size = (x != x).sum()  # a count of what is NaN
    return (x if float(size) else denoise(x, sigma).x0), ()


def makes_a_tensor_here(
    denoise: Evaluate, x: Tensor, sigma: float, sigma_next: float, history: History, noise: Draw, /
) -> tuple[Tensor, History]:
    return x * torch.tensor(sigma_next / sigma), ()


@pytest.mark.parametrize(
    ("solver", "complaint"),
    [(reads_a_number, "_local_scalar_dense waits for the device"), (makes_a_tensor_here, "a tensor on the cpu")],
)
def test_the_watch_sees_what_waits(solver: Solver, complaint: str) -> None:
    with pytest.raises(AssertionError, match=complaint):
        list(steps_watched(solver))
