"""The UNet of Stable Diffusion 1.5 at full size on the CPU: diffusers' settings side by side with ours.

Random weights, one image, one call. Sides are interleaved in one process (A B C … C B A), a warm-up each before; beside
the time stands how far the output is from float32's. The processor time of the process is given beside the wall time: on
a machine that others use it is the better witness.

    python benchmarks/cpu_unet.py            # prints the table, writes results/cpu_unet.json
    python benchmarks/cpu_unet.py --compile  # and torch.compile with freezing, which takes minutes to compile
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from structures import STRUCTURES, Compiled, conditioning, denoiser, network
from torch import Tensor
from unrolled.chains.record import versions
from unrolled.core.schedule import Schedule
from unrolled.kernels.fast import optimise, prepared

RESULTS = Path(__file__).parent / "results"
SCHEDULE = Schedule((3.0, 1.0, 0.0), (400.0, 200.0))
Call = Callable[[], Tensor]


@contextmanager
def channels_last(unet: Any) -> Iterator[None]:
    unet.to(memory_format=torch.channels_last)
    try:
        yield
    finally:
        unet.to(memory_format=torch.contiguous_format)


class Sides:
    """What is compared: each a context in which ``call`` is its way to do it."""

    def __init__(self, side: int, tiny: str | None, compile_too: bool) -> None:
        self.wide = network(STRUCTURES["sd-1.5"].component, "cpu", torch.float32, tiny)
        self.half = network(STRUCTURES["sd-1.5"].component, "cpu", torch.bfloat16, tiny)
        self.half.load_state_dict(self.wide.state_dict())
        self.cond = conditioning("sd-1.5", self.wide, side, 1, torch.float32)
        self.x = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(2))
        self.names = [
            "diffusers fp32", "diffusers fp32 NHWC", "diffusers bf16 autocast", "diffusers bf16 NHWC",
            "ours fp32", "ours bf16", "ours bf16, Winograd",
        ]  # fmt: skip
        if compile_too:
            self.names += ["diffusers bf16 NHWC compiled, frozen", "ours bf16 compiled, frozen"]
        self.compiled: dict[str, Any] = {}

    @contextmanager
    def ready(self, name: str) -> Iterator[Call]:
        """The side's call, while its way to do it holds."""
        unet = self.half if "bf16" in name and "autocast" not in name else self.wide
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            plain = network_call = denoiser("sd-1.5", unet)
            if name.startswith("ours") and "compiled" not in name:
                stack.enter_context(optimise(unet, winograd="Winograd" in name))
                network_call = prepared(plain, SCHEDULE)
            elif "NHWC" in name and "compiled" not in name:
                stack.enter_context(channels_last(unet))
            if "autocast" in name:
                stack.enter_context(torch.autocast("cpu", torch.bfloat16))
            if "compiled" in name:
                network_call = self.frozen(name)
            yield lambda: network_call(self.x, 3.0, 400.0, self.cond).out

    def frozen(self, name: str) -> Any:
        """A network of its own, compiled once and kept."""
        if name not in self.compiled:
            unet = copy.deepcopy(self.half)
            if name.startswith("ours"):
                optimise(unet)
            else:
                unet.to(memory_format=torch.channels_last)
            made = torch.compile(unet, options={"freezing": True})
            self.compiled[name] = denoiser("sd-1.5", Compiled(made, unet))
        return self.compiled[name]


def measure(sides: Sides, rounds: int) -> dict[str, dict[str, Any]]:
    wall: dict[str, list[float]] = {name: [] for name in sides.names}
    busy: dict[str, list[float]] = {name: [] for name in sides.names}
    out: dict[str, Tensor] = {}
    for i in range(2 * rounds):
        for name in sides.names if i % 2 == 0 else sides.names[::-1]:
            with sides.ready(name) as call:
                call()  # warm up: oneDNN lays out weights at the first, Winograd's are made
                began, began_busy = time.perf_counter(), time.process_time()
                out[name] = call()
                wall[name].append(time.perf_counter() - began)
                busy[name].append(time.process_time() - began_busy)
            print(f"{name}: {wall[name][-1]:.2f} s, {busy[name][-1]:.2f} s of processor", flush=True)
    exact = out["diffusers fp32"]
    return {
        name: {
            "wall_s": statistics.median(wall[name]),
            "processor_s": statistics.median(busy[name]),
            "all_wall_s": wall[name],
            "all_processor_s": busy[name],
            "error_against_fp32": float((out[name].float() - exact).norm() / exact.norm()),
        }
        for name in sides.names
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=1, help="each runs every side twice")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--check", action="store_true", help="a tiny network, and no result file")
    parser.add_argument("--output", type=Path, default=RESULTS / "cpu_unet.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    side = 16 if args.check else 64
    load = os.getloadavg()
    rows = measure(Sides(side, "sd-1.5" if args.check else None, args.compile), args.rounds)
    worst = max(row["error_against_fp32"] for name, row in rows.items() if "fp32" in name)
    if worst > 1e-5:
        raise SystemExit(f"In float32 a side is {worst:.1e} away from diffusers, so speed means nothing.")
    base = rows["diffusers fp32"]["processor_s"]
    table = Table("side", "wall s", "processor s", "times diffusers fp32", "error", title="SD 1.5's UNet, one call")
    for name, row in rows.items():
        cells = (f"{row['wall_s']:.2f}", f"{row['processor_s']:.2f}", f"{base / row['processor_s']:.2f}")
        table.add_row(name, *cells, f"{row['error_against_fp32']:.1e}")
    Console().print(table)
    if args.check:
        return
    result = {
        "date": date.today().isoformat(),
        "machine": f"{processor()}, {os.cpu_count()} cores, {args.threads} torch threads",
        "load_average": {"before": load, "after": os.getloadavg()},
        "note": "the machine was shared and under load: compare processor seconds, not wall seconds",
        "job": f"one call of SD 1.5's UNet, random weights, one image, {side}x{side} latents",
        "statistic": f"median of {2 * args.rounds} runs a side, sides interleaved",
        "versions": versions(),
        "sides": rows,
    }
    args.output.parent.mkdir(exist_ok=True)
    args.output.write_text(json.dumps(result, indent=1) + "\n")


def processor() -> str:
    """Its name, and whether it multiplies bfloat16."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    found = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    flags = next((line for line in lines if line.startswith("flags")), "")
    return found + (", AVX-512 BF16" if "avx512_bf16" in flags else "")


if __name__ == "__main__":
    main()
