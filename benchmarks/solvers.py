"""Work and precision of every solver and spacing on mixtures of Gaussians, where the truth is known.

Deterministic solvers and, for one of them, spacings: root mean square distance from the true solution of the
probability-flow ODE. Stochastic ones: distance from the true distribution, exact (no sampling) on a Gaussian, by
samples on the mixture. Noise falls from Stable Diffusion's highest training level to its lowest, not to 0: a last
step to 0 is of first order whatever the solver. LCM and TCD are for models that say more than the mean, and left out.

    python -P benchmarks/solvers.py            # prints the tables, writes results/solvers.json and, from it, solvers.png
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import runpy
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from functools import cache
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from unrolled.chains.record import versions
from unrolled.core.latents import Latents
from unrolled.core.loop import denoise
from unrolled.core.mixture import GaussianMixture
from unrolled.core.noise import DiffusersNoise, Levels, NoiseSource
from unrolled.core.prediction import Prediction
from unrolled.core.schedule import Schedule
from unrolled.core.solver import Solver
from unrolled.schedulers import (
    DEIS,
    DPM2,
    IPNDM,
    LMS,
    PLMS,
    Churned,
    DPMpp2M,
    DPMpp2MSDE,
    DPMpp2S,
    DPMpp3M,
    DPMpp3MSDE,
    DPMppSDE,
    Euler,
    EulerAncestral,
    Heun,
    SASolver,
    Singlestep,
    UniPC,
    spacing,
)
from unrolled.schedulers.training import sigmas_of, training_alphas

RESULTS = Path(__file__).parent / "results"
TRAINING = sigmas_of(training_alphas(1000, 0.00085, 0.012, "scaled_linear"))
LOW, HIGH = TRAINING[0], TRAINING[-1]
PICTURES, SAMPLES, MOST = 200, 10_000, 100

# Eight of them on a circle, near and far, wide and narrow; unit variance.
_TURN = torch.arange(8, dtype=torch.float64) * (math.tau / 8)
MIXTURE = GaussianMixture(
    1.33 * torch.stack([_TURN.cos(), _TURN.sin()], 1),
    torch.linspace(0.2, 0.6, 8, dtype=torch.float64),
    torch.tensor([3.0, 1.0, 2.0, 2.0, 1.0, 3.0, 2.0, 1.0]),
)

# Details of all sizes, as pictures have.
GAUSSIAN = GaussianMixture(
    torch.zeros(1, 12, dtype=torch.float64), torch.logspace(-1.0, 0.3, 12, dtype=torch.float64)[None], torch.ones(1)
)

Make = Callable[[int], Solver]
"""The solver of a run of so many steps."""

DETERMINISTIC: dict[str, dict[str, Make]] = {
    "one step": {
        "Euler = DDIM": lambda n: Euler(),
        "Heun": lambda n: Heun(),
        "DPM2": lambda n: DPM2(),
        "DPM++ 2S": lambda n: DPMpp2S(),
        "DPM++ 3S": lambda n: Singlestep(3),
    },
    "multistep on the noise": {
        "LMS 4": lambda n: LMS(4),
        "IPNDM 4": lambda n: IPNDM(4),
        "PLMS": lambda n: PLMS(),
        "DEIS 2": lambda n: DEIS(2),
        "DEIS 3": lambda n: DEIS(3),
    },
    "multistep on x0": {
        "DPM++ 2M": lambda n: DPMpp2M(),
        "DPM++ 3M": lambda n: DPMpp3M(),
        "SA 3": lambda n: SASolver(3, 0),
    },
    "with a corrector": {
        "UniPC 2": lambda n: UniPC(2),
        "UniPC 3": lambda n: UniPC(3),
        "SA 3, 4": lambda n: SASolver(3, 4),
    },
}
STOCHASTIC: dict[str, dict[str, Make]] = {
    "one step": {
        "Euler a = DDPM": lambda n: EulerAncestral(),
        "DPM2 a": lambda n: DPM2(1.0),
        "DPM++ 2S a": lambda n: DPMpp2S(1.0),
        "DPM++ SDE": lambda n: DPMppSDE(),
        "DPM++ 2S SDE": lambda n: Singlestep(2, tau=1.0),
        "Heun, churned": lambda n: Churned(Heun(), min(4.0 / n, 0.41)),
    },
    "multistep on x0": {
        "DPM++ 2M SDE": lambda n: DPMpp2MSDE(),
        "DPM++ 3M SDE": lambda n: DPMpp3MSDE(),
        "2M, churned": lambda n: Churned(DPMpp2M(), min(4.0 / n, 0.41)),
    },
    "with a corrector": {
        "SA 2, 2": lambda n: SASolver(2, 2, tau=1.0),
        "SA 3, 4": lambda n: SASolver(3, 4, tau=1.0),
    },
    "no noise, to compare": {"Euler": lambda n: Euler(), "DPM++ 2M": lambda n: DPMpp2M()},
}
SPACINGS: dict[str, dict[str, Callable[[int], Sequence[float]]]] = {
    "by training timestep": {
        "leading": lambda n: spacing.at_timesteps(spacing.leading(n, 1000, 1), TRAINING),
        "trailing": lambda n: spacing.at_timesteps(spacing.trailing(n, 1000), TRAINING),
        "linspace": lambda n: spacing.at_timesteps(spacing.linspace(n, 1000, extra=1), TRAINING),
    },
    "by noise level": {
        "Karras": lambda n: spacing.karras(n + 1, LOW, HIGH),
        "exponential": lambda n: spacing.exponential(n + 1, LOW, HIGH),
        "polyexponential 2": lambda n: spacing.polyexponential(n + 1, LOW, HIGH, 2.0),
        "KL-optimal": lambda n: spacing.kl_optimal(n + 1, LOW, HIGH),
        "beta": lambda n: spacing.beta(n + 1, LOW, HIGH),
        "linear-quadratic": lambda n: spacing.linear_quadratic(n, HIGH),
        "align-your-steps": lambda n: spacing.align_your_steps(n, LOW, HIGH),
    },
}
Measure = Callable[[Solver, Schedule], tuple[int, float]]
Line = list[tuple[int, float]]
"""(evaluations, error)."""
Lines = dict[str, dict[str, Line]]
"""By family and name."""


def schedule(levels: Sequence[float]) -> Schedule:
    """Those levels that lie above the lowest training level, and that."""
    return Schedule.at([*(level for level in levels if level > LOW * 1.001), LOW])


def karras(steps: int) -> Schedule:
    return schedule(spacing.karras(steps + 1, LOW, HIGH))


def run(solver: Solver, mixture: GaussianMixture, x: Tensor, plan: Schedule, noise: NoiseSource) -> tuple[int, Tensor]:
    """How often the denoiser was asked, and where the run ends."""
    asked = 0

    def counting(x: Tensor, sigma: float, timestep: float) -> Prediction:
        nonlocal asked
        asked += 1
        return mixture(x, sigma)

    start = Latents(x.reshape(len(x), -1, 1, 1), mixture.space, plan.sigmas[0])
    end = denoise(counting, start, plan, solver, noise=noise)
    return asked, end.x.reshape(x.shape)


@cache
def paths(sigma: float) -> tuple[Tensor, Tensor]:
    """Pictures at a noise level, and where the true solution takes them."""
    x = MIXTURE.sample(range(PICTURES), sigma, DiffusersNoise.seeded(0))
    return x, MIXTURE.solve(x, sigma, LOW)


def off_path(solver: Solver, plan: Schedule) -> tuple[int, float]:
    """Evaluations, and the root mean square distance from the true solution."""
    x, truth = paths(plan.sigmas[0])
    asked, end = run(solver, MIXTURE, x, plan, DiffusersNoise.seeded(1))
    return asked, float((end - truth).square().mean().sqrt())


class Impulses:
    """Noise that is 0 but for one picture of the batch, in the next draw the next one."""

    drawn = 1

    def __call__(
        self, shape: Sequence[int], purpose: str, step: int = 0, draw: int = 0, levels: Levels | None = None
    ) -> Tensor:
        """The next impulse."""
        unit = torch.zeros(*shape)
        self.drawn += 1
        unit[self.drawn] = 1.0
        return unit


def off_gaussian(solver: Solver, plan: Schedule) -> tuple[int, float]:
    """Evaluations, and the exact Wasserstein distance from a Gaussian.

    There a run is linear: its variance adds up over where it starts (picture 1, one standard deviation off) and
    what is drawn (the pictures after), and the distance of two Gaussians is that of their standard deviations.
    """
    x = torch.zeros(2 + 3 * len(plan.sigmas), 12, dtype=torch.float64)
    x[1] = (GAUSSIAN.stds[0] ** 2 + plan.sigmas[0] ** 2).sqrt()
    asked, end = run(solver, GAUSSIAN, x, plan, Impulses())
    spread, true = end.square().sum(0).sqrt(), (GAUSSIAN.stds[0] ** 2 + LOW**2).sqrt()
    return asked, float((spread - true).square().sum().sqrt())


def off_mixture(solver: Solver, plan: Schedule) -> tuple[int, float]:
    """Evaluations, and the sliced Wasserstein distance of samples from the mixture."""
    x = MIXTURE.sample(range(SAMPLES), plan.sigmas[0], DiffusersNoise.seeded(0))
    asked, end = run(solver, MIXTURE, x, plan, DiffusersNoise.seeded(1))
    return asked, MIXTURE.distance(end, LOW)


def lines(families: Mapping[str, Mapping[str, Make]], measure: Measure, steps: Sequence[int]) -> Lines:
    def line(make: Make) -> Line:
        measured = (measure(make(n), karras(n)) for n in steps)
        return [(asked, error) for asked, error in measured if asked <= MOST + 1]

    return {family: {name: line(make) for name, make in members.items()} for family, members in families.items()}


def at(line: Line, evaluations: int) -> float:
    """The error after so many evaluations, straight in logarithms between those measured."""
    counts, errors = zip(*line, strict=True)
    inside = counts[0] <= evaluations <= counts[-1]
    return float(np.exp(np.interp(math.log(evaluations), np.log(counts), np.log(errors)))) if inside else math.nan


def order(line: Line) -> float:
    """The slope of log error over log evaluations in the last three points."""
    counts, errors = zip(*line[-3:], strict=True)
    return -float(np.polyfit(np.log(counts), np.log(errors), 1)[0])


def show(title: str, found: Lines, columns: Sequence[int] = (10, 20, 50)) -> None:
    table = Table("evaluations", *map(str, columns), "slope", title=title, title_justify="left")
    named = [item for family in found.values() for item in family.items()]
    for name, line in sorted(named, key=lambda item: at(item[1], columns[-1])):
        table.add_row(name, *(f"{at(line, n):.2g}" for n in columns), f"{order(line):.1f}")
    Console().print(table)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    began = time.perf_counter()
    steps = (3, 4, 5, 6, 8, 10, 13, 16, 20, 25, 33, 40, 50, 66, 80, 100)
    found = {
        "deterministic": lines(DETERMINISTIC, off_path, steps),
        "stochastic": lines(STOCHASTIC, off_gaussian, steps),
        "stochastic, sampled": lines(STOCHASTIC, off_mixture, (5, 10, 20, 40)),
        "spacings": {
            family: {name: [off_path(DPMpp2M(), schedule(levels(n))) for n in steps[1:]] for name, levels in members.items()}
            for family, members in SPACINGS.items()
        },
    }
    samples = [MIXTURE.sample(range(SAMPLES), LOW, DiffusersNoise.seeded(seed)) for seed in range(8)]
    floor = float(np.mean([MIXTURE.distance(sample, LOW) for sample in samples]))
    seconds = time.perf_counter() - began

    show("Deterministic solvers: root mean square error", found["deterministic"])
    show("Stochastic solvers: exact Wasserstein distance on a Gaussian", found["stochastic"])
    show("The same: sliced Wasserstein distance of samples on the mixture", found["stochastic, sampled"], (10, 20, 40))
    show("Spacings with DPM++ 2M: root mean square error", found["spacings"])
    print(f"{SAMPLES} true samples are {floor:.2g} away from the mixture; all in {seconds:.0f} s")
    result = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, 1 torch thread",
        "job": f"sigma {HIGH:.4g} to {LOW:.4g}, float64; mixture of 8 in the plane, {PICTURES} paths, {SAMPLES} samples",
        "seconds": round(seconds),
        "versions": versions() | {name: version(name) for name in ("numpy", "scipy", "matplotlib")},
        "true_samples": float(f"{floor:.4g}"),
        "columns": ["evaluations", "error"],
    }
    text = json.dumps(result | found, indent=1)
    text = re.sub(
        r"\[\s+(\d+),\s+(\S+)\s+\]", lambda point: f"[{point[1]}, {float(point[2]):.4g}]", text
    )  # a point to a line
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "solvers.json").write_text(text + "\n")
    runpy.run_path(str(Path(__file__).with_name("solvers_picture.py")), run_name="__main__")


if __name__ == "__main__":
    main()
