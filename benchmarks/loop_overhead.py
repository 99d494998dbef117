"""Whole text-to-image pipelines side by side with diffusers on the CPU: time, peak memory, time outside the UNet.

Same weights, same noise, same schedule, in one process and interleaved (A B B A), on a tiny random network (what
is left is overhead) and on the trained miniature; memory is the peak of a process of its own for each side. The
pictures must agree, or no figure is written.

    python benchmarks/loop_overhead.py            # prints the table, writes results/loop_overhead.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
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
from unrolled.core.loading import load
from unrolled.core.noise import DiffusersNoise
from unrolled.core.source import MINIATURES
from unrolled.miniatures.tiny import write_tiny
from unrolled.stages.decode import decode

RESULTS = Path(__file__).parent / "results"
PROMPT, STEPS, GUIDANCE, SEED = "a castle", 20, 5.0, 0
SOLVERS = {
    "euler": "EulerDiscreteScheduler",
    "ddim": "DDIMScheduler",
    "pndm": "PNDMScheduler",
    "heun": "HeunDiscreteScheduler",
    "dpm++2m": "DPMSolverMultistepScheduler",
    "euler-ancestral": "EulerAncestralDiscreteScheduler",
}
Side = Callable[[], Any]


def ours(folder: Path, solver: str) -> tuple[Side, Any]:
    model = load(str(folder), device="cpu")
    spec = TextToImage(prompt=PROMPT, solver=solver, steps=STEPS, guidance_scale=GUIDANCE)

    def run() -> Any:
        latents = text_to_image(model, spec, [SEED], source=DiffusersNoise.seeded(SEED))
        return decode(model, latents)[0]

    return run, model.unet


def theirs(folder: Path, solver: str) -> tuple[Side, Any]:
    import diffusers

    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, use_safetensors=True, torch_dtype=torch.float32)
    pipe.scheduler = getattr(diffusers, SOLVERS[solver]).from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)

    def run() -> Any:
        generator = torch.Generator().manual_seed(SEED)
        return pipe(PROMPT, num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=generator).images[0]

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


def compare(folder: Path, solver: str, rounds: int) -> dict[str, float]:
    """Quantiles are medians over ``2 * rounds`` runs a side."""
    sides = {"ours": ours(folder, solver), "diffusers": theirs(folder, solver)}
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


def peak_memory(side: str, folder: Path) -> float:
    """Peak resident megabytes of a process that makes one picture."""
    command = [sys.executable, "-P", __file__, "--memory-of", side, "--folder", str(folder)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def own_peak() -> float:
    """Of this process since it was started; ``ru_maxrss`` would count its parent's from before the exec."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory-of", choices=["ours", "diffusers"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        (ours if args.memory_of == "ours" else theirs)(args.folder, "euler")[0]()
        print(own_peak())
        return
    result: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads",
        "job": f"text to image, {STEPS} steps, guidance {GUIDANCE}, one picture of 64x64, float32",
        "statistic": f"median of {2 * args.rounds} runs a side, interleaved",
        "versions": versions(),
    }
    with tempfile.TemporaryDirectory() as scratch:
        models = {"tiny": write_tiny(Path(scratch) / "tiny"), "miniature": MINIATURES / "sd-1.5"}
        for name, folder in models.items():
            rows = {solver: compare(folder, solver, args.rounds) for solver in SOLVERS}
            memory = {side: peak_memory(side, folder) for side in ("ours", "diffusers")}
            result[name] = {"solvers": rows, "peak_memory_mb": memory | {"ratio": memory["ours"] / memory["diffusers"]}}
            show(name, rows, memory)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "loop_overhead.json").write_text(json.dumps(result, indent=1) + "\n")


def show(name: str, rows: dict[str, dict[str, float]], memory: dict[str, float]) -> None:
    table = Table("solver", "ours ms", "diffusers ms", "ratio", "outside UNet µs/call", "diffusers µs/call", title=name)
    outside = ("outside_unet_us_per_call", "outside_unet_us_per_call_diffusers")
    for solver, row in rows.items():
        cells = ("wall_ms", "wall_ms_diffusers", "wall_ratio", *outside)
        table.add_row(solver, *(f"{row[c]:.2f}" if c == "wall_ratio" else f"{row[c]:.0f}" for c in cells))
    Console().print(table)
    print(f"peak memory: ours {memory['ours']:.0f} MB, diffusers {memory['diffusers']:.0f} MB")


if __name__ == "__main__":
    main()
