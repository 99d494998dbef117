"""Whole text-to-image pipelines side by side with diffusers on the CPU: time, peak memory, time outside the UNet.

Same weights, same noise, same schedule, in one process and interleaved (A B B A); memory is the peak of
a process of its own for each side. The pictures must agree, or no figure is written.

    python benchmarks/loop_overhead.py            # prints the table, writes results/loop_overhead.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from unrolled.chains.chain import TextToImage
from unrolled.chains.jobs import text_to_image
from unrolled.chains.record import versions
from unrolled.core.loading import MINIATURES, load
from unrolled.core.noise import DiffusersNoise
from unrolled.stages.decode import decode

RESULTS = Path(__file__).parent / "results"
PROMPT, STEPS, SEED = "a castle", 20, 0
SOLVERS = {
    "euler": "EulerDiscreteScheduler",
    "ddim": "DDIMScheduler",
    "pndm": "PNDMScheduler",
    "heun": "HeunDiscreteScheduler",
    "dpm++2m": "DPMSolverMultistepScheduler",
    "euler-ancestral": "EulerAncestralDiscreteScheduler",
}
Side = Callable[[], Any]


def ours(solver: str) -> tuple[Side, Any]:
    model = load("sd-1.5", device="cpu")
    spec = TextToImage(prompt=PROMPT, solver=solver, steps=STEPS, guidance_scale=7.0)

    def run() -> Any:
        latents = text_to_image(model, spec, [SEED], source=DiffusersNoise.seeded(SEED))
        return decode(model, latents)[0]

    return run, model.unet


def theirs(solver: str) -> tuple[Side, Any]:
    import diffusers

    pipe = diffusers.StableDiffusionPipeline.from_pretrained(
        MINIATURES / "sd-1.5", use_safetensors=True, torch_dtype=torch.float32
    )
    pipe.scheduler = getattr(diffusers, SOLVERS[solver]).from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)

    def run() -> Any:
        generator = torch.Generator().manual_seed(SEED)
        return pipe(PROMPT, num_inference_steps=STEPS, guidance_scale=7.0, generator=generator).images[0]

    return run, pipe.unet


def seconds(side: Side, unet: Any) -> tuple[float, float, int]:
    """Wall time of one picture, the part of it inside the UNet, and the number of its calls."""
    inside: list[float] = []
    began_at: list[float] = []
    handles = [
        unet.register_forward_pre_hook(lambda *_: began_at.append(time.perf_counter())),
        unet.register_forward_hook(lambda *_: inside.append(time.perf_counter() - began_at[-1])),
    ]
    began = time.perf_counter()
    side()
    total = time.perf_counter() - began
    for handle in handles:
        handle.remove()
    return total, sum(inside), len(inside)


def compare(solver: str, rounds: int) -> dict[str, float]:
    sides = {"ours": ours(solver), "diffusers": theirs(solver)}
    pictures = {name: torch.tensor(list(run().tobytes())) for name, (run, _) in sides.items()}  # and warm up
    difference = int((pictures["ours"] - pictures["diffusers"]).abs().max())
    if difference > 1:
        raise SystemExit(f"{solver}: the pictures differ by {difference} of 255, so speed means nothing.")
    times: dict[str, list[tuple[float, float, int]]] = {"ours": [], "diffusers": []}
    for _ in range(rounds):
        for name in ("ours", "diffusers", "diffusers", "ours"):
            times[name].append(seconds(*sides[name]))
    wall = {name: statistics.median(t[0] for t in rows) for name, rows in times.items()}
    outside = {name: statistics.median((t[0] - t[1]) / t[2] for t in rows) for name, rows in times.items()}
    return {
        "wall_ms": 1e3 * wall["ours"],
        "wall_ms_diffusers": 1e3 * wall["diffusers"],
        "wall_ratio": wall["ours"] / wall["diffusers"],
        "outside_unet_us_per_call": 1e6 * outside["ours"],
        "outside_unet_us_per_call_diffusers": 1e6 * outside["diffusers"],
        "largest_pixel_difference": difference,
    }


def peak_memory(side: str, solver: str) -> float:
    """Peak resident megabytes of a process that makes one picture."""
    command = [sys.executable, "-P", __file__, "--memory-of", side, "--solver", solver]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--solver", choices=[*SOLVERS], help="only this one")
    parser.add_argument("--memory-of", choices=["ours", "diffusers"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        (ours if args.memory_of == "ours" else theirs)(args.solver)[0]()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return
    table = Table("solver", "ours ms", "diffusers ms", "ratio", "outside UNet µs/call", "diffusers µs/call")
    rows = {}
    for solver in [args.solver] if args.solver else SOLVERS:
        rows[solver] = row = compare(solver, args.rounds)
        cells = (
            "wall_ms",
            "wall_ms_diffusers",
            "wall_ratio",
            "outside_unet_us_per_call",
            "outside_unet_us_per_call_diffusers",
        )
        table.add_row(solver, *(f"{row[c]:.2f}" if c == "wall_ratio" else f"{row[c]:.0f}" for c in cells))
    memory = {side: peak_memory(side, "euler") for side in ("ours", "diffusers")}
    ratio = memory["ours"] / memory["diffusers"]
    Console().print(table)
    print(f"peak memory: ours {memory['ours']:.0f} MB, diffusers {memory['diffusers']:.0f} MB, ratio {ratio:.2f}")
    result = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads",
        "model": "miniature sd-1.5, 64x64, float32",
        "job": f"text to image, {STEPS} steps, guidance 7.0, one picture; median of {2 * args.rounds} runs a side",
        "versions": versions(),
        "solvers": rows,
        "peak_memory_mb": memory | {"ratio": ratio},
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "loop_overhead.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
