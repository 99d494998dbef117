"""Attention on the CPU: in chunks against torch's own, at the shapes of Stable Diffusion 1.5 and a VAE.

By processor time of one thread, the better of some runs, sides interleaved; beside it the distance from float64.

    python benchmarks/cpu_attention.py       # prints the table, writes results/cpu_attention.json
"""

from __future__ import annotations

import argparse
import json
import os
import time
from datetime import date
from pathlib import Path
from typing import Any, get_args

import torch
from cpu_unet import processor
from rich.console import Console
from rich.table import Table
from unrolled.chains.record import versions
from unrolled.kernels.attention import attention
from unrolled.kernels.backends import Backend

RESULTS = Path(__file__).parent / "results"
SHAPES = {
    "SD 1.5, 4096 tokens": (4096, 4096, 8, 40),
    "SD 1.5, 1024 tokens": (1024, 1024, 8, 80),
    "SD 1.5, 256 tokens": (256, 256, 8, 160),
    "SD 1.5, the prompt": (4096, 77, 8, 40),
    "SDXL, 1024 tokens": (1024, 1024, 20, 64),
    "VAE, 4096 tokens": (4096, 4096, 1, 512),
}
SIDES: tuple[Backend, ...] = tuple(name for name in get_args(Backend) if name in ("sdpa", "chunked"))


def measure(shape: tuple[int, ...], dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    queries, keys, heads, size = shape
    q, k, v = (torch.randn(1, n, heads, size).to(dtype) for n in (queries, keys, keys))
    exact = attention(q.double(), k.double(), v.double(), backend="sdpa")
    times: dict[str, list[float]] = {name: [] for name in SIDES}
    for _ in range(rounds):
        for name in (*SIDES, *reversed(SIDES)):
            began = time.process_time()
            attention(q, k, v, backend=name)
            times[name].append(time.process_time() - began)
    gflop = 4e-9 * queries * keys * heads * size
    return {
        name: {
            "gflops": gflop / min(times[name]),
            "seconds": times[name],
            "error": float((attention(q, k, v, backend=name).double() - exact).norm() / exact.norm()),
        }
        for name in SIDES
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS / "cpu_attention.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    table, rows = Table("shape", "dtype", *(f"{name} GFLOP/s (error)" for name in SIDES)), dict[str, Any]()
    for dtype in (torch.bfloat16, torch.float32):
        for name, shape in SHAPES.items():
            key = str(dtype).removeprefix("torch.")
            rows[f"{name}, {key}"] = found = measure(shape, dtype, args.rounds)
            table.add_row(name, key, *(f"{found[s]['gflops']:.0f} ({found[s]['error']:.0e})" for s in SIDES))
    Console().print(table)
    result = {
        "date": date.today().isoformat(),
        "machine": f"{processor()}, {os.cpu_count()} cores, 1 torch thread",
        "load_average": os.getloadavg(),
        "note": "the machine was shared and under load: processor seconds, the best of each",
        "versions": versions(),
        "rows": rows,
    }
    args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
