"""What a step costs besides the network: guidance and solver, beside diffusers' pipeline code and ``scheduler.step``.

The network's outputs are there already. Both sides batch the two conditionings, scale the input, combine the outputs
and move x, at batch 1 on 4x64x64 latents (a picture of 512 pixels), whole runs of 25 steps interleaved (A B B A) in
one process on one thread; where they end must agree, or no figure is written.

    python -P benchmarks/step_cost.py             # prints the table, writes results/step_cost.json
"""

from __future__ import annotations

import json
import logging
import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import Any

import diffusers
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from unrolled.chains.record import versions
from unrolled.core.conditioning import Conditioning
from unrolled.core.guidance import classifier_free
from unrolled.core.prediction import Prediction
from unrolled.core.solver import History
from unrolled.schedulers.config import read_scheduler

RESULT = Path(__file__).parent / "results" / "step_cost.json"
STEPS, GUIDANCE, ROUNDS, SHAPE = 25, 7.5, 30, (1, 4, 64, 64)
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
FIRST_ORDER = ("EulerDiscrete", "DDIM", "DDPM", "EulerAncestralDiscrete", "LCM", "TCD")
OTHERS = (
    "DPMSolverMultistep",
    "UniPCMultistep",
    "DEISMultistep",
    "LMSDiscrete",
    "SASolver",
    "HeunDiscrete",
    "KDPM2Discrete",
)
Side = Callable[[], tuple[float, Tensor]]
"""Runs once: seconds a network call, and where it ended."""


def options(name: str) -> dict[str, Any]:
    return BETAS | ({"clip_sample": False} if name in ("DDIM", "DDPM") else {})


def ours(name: str, start: Tensor, out: Tensor, noises: Tensor) -> Side:
    config = read_scheduler({"_class_name": f"{name}Scheduler", **options(name)})
    schedule, solver = config.sampling(STEPS, eta=0.3 if name == "TCD" else 0.0)
    text = Conditioning(torch.zeros(1, 1, 1))
    calls = 0

    def network(x: Tensor, sigma: float, timestep: float, conditioning: Conditioning) -> Prediction:
        nonlocal calls
        calls += 1
        x * (1.0 / (1.0 + sigma**2) ** 0.5)  # what a UNet would be given
        return Prediction(out, x, sigma)

    guided = classifier_free(network, text, text, GUIDANCE)
    last = schedule.sigmas[-1]

    def run() -> tuple[float, Tensor]:
        nonlocal calls
        calls, history = 0, History()
        x = start * (schedule.start_std or 1.0)
        began = time.perf_counter()
        for (sigma, sigma_next), z in zip(pairwise(schedule.sigmas), noises, strict=False):
            x, history = solver(
                lambda x, s: guided(x, s, schedule.timestep_at(s)), x, sigma, sigma_next, history, lambda *_, z=z: z
            )
        return (time.perf_counter() - began) / calls, x if config.scales_input else x / (1.0 + last**2) ** 0.5

    return run


def theirs(name: str, start: Tensor, out: Tensor, noises: Tensor) -> Side:
    scheduler = getattr(diffusers, f"{name}Scheduler")(**options(name))
    module = sys.modules[type(scheduler).__module__]

    def run() -> tuple[float, Tensor]:
        scheduler.set_timesteps(STEPS)
        x = start * scheduler.init_noise_sigma
        began = time.perf_counter()
        for timestep, z in zip(scheduler.timesteps, noises, strict=False):
            vars(module)["randn_tensor"] = lambda *_, z=z, **__: z
            scheduler.scale_model_input(torch.cat([x] * 2), timestep)
            uncond, cond = out.chunk(2)
            x = scheduler.step(uncond + GUIDANCE * (cond - uncond), timestep, x, return_dict=False)[0]
        return (time.perf_counter() - began) / len(scheduler.timesteps), x

    return run


def compare(name: str) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)
    start, noises = torch.randn(SHAPE, generator=generator), torch.randn(2 * STEPS, *SHAPE, generator=generator)
    out = torch.randn(2, *SHAPE[1:], generator=generator)
    sides = {"ours": ours(name, start, out, noises), "diffusers": theirs(name, start, out, noises)}
    ends = {side: run()[1] for side, run in sides.items()}  # and warm up
    away = float((ends["ours"] - ends["diffusers"]).abs().max() / ends["diffusers"].abs().max())
    if away > 1e-4:
        raise SystemExit(f"{name}: the two end {away:.1e} apart, so speed means nothing.")
    times: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(ROUNDS):
        for side in ("ours", "diffusers", "diffusers", "ours"):
            times[side].append(1e6 * sides[side]()[0])
    medians = {side: statistics.median(values) for side, values in times.items()}
    low, high = (statistics.quantiles(times["ours"], n=5)[i] for i in (0, 3))
    return {
        "us_per_evaluation": medians["ours"],
        "us_per_evaluation_20_80": [low, high],  # type: ignore[dict-item]
        "us_per_evaluation_diffusers": medians["diffusers"],
        "ratio": medians["ours"] / medians["diffusers"],
        "difference": away,
    }


def main() -> None:
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    with torch.no_grad():
        rows = {name: compare(name) for name in (*FIRST_ORDER, *OTHERS)}
    result = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, one thread",
        "job": f"{STEPS} steps, guidance on, {'x'.join(map(str, SHAPE))} latents, float32, the network left out",
        "statistic": f"median over {2 * ROUNDS} runs a side, interleaved; the 20 % and 80 % quantiles",
        "versions": versions(),
        "solvers": rows,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    table = Table("scheduler", "ours µs", "diffusers µs", "ratio", title="guidance and solver, per evaluation")
    for name, row in rows.items():
        cells = (row["us_per_evaluation"], row["us_per_evaluation_diffusers"])
        table.add_row(name, *(f"{cell:.0f}" for cell in cells), f"{row['ratio']:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
