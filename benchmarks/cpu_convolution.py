"""3x3 convolutions on the CPU in bfloat16: torch's own against Winograd's filtering, at the shapes of Stable Diffusion 1.5.

By processor time of one thread, the better of some runs, sides interleaved; beside it the distance from float32.

    python benchmarks/cpu_convolution.py     # prints the table, writes results/cpu_convolution.json
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from cpu_unet import processor
from rich.console import Console
from rich.table import Table
from torch import Tensor
from unrolled.chains.record import versions
from unrolled.kernels.winograd import winograd, winograd_weights

RESULTS = Path(__file__).parent / "results"
SHAPES = [  # side, in, out
    (64, 320, 320), (64, 960, 320), (64, 640, 640), (32, 640, 640), (32, 1280, 1280), (16, 1280, 1280), (16, 2560, 1280),
    (8, 1280, 1280), (8, 2560, 1280), (128, 256, 256), (256, 128, 128),
]  # fmt: skip


def measure(side: int, inputs: int, outputs: int, rounds: int) -> dict[str, Any]:
    x = torch.randn(1, inputs, side, side).bfloat16().contiguous(memory_format=torch.channels_last)
    weight = (torch.randn(outputs, inputs, 3, 3) / (9 * inputs) ** 0.5).bfloat16()
    weight, bias = weight.contiguous(memory_format=torch.channels_last), torch.zeros(outputs, dtype=torch.bfloat16)
    filtered = winograd_weights(weight)
    exact = F.conv2d(x.float(), weight.float(), padding=1)
    sides: dict[str, Callable[[], Tensor]] = {
        "torch": lambda: F.conv2d(x, weight, bias, padding=1),
        "winograd": lambda: winograd(x, filtered, bias),
    }
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name in (*sides, *reversed(sides)):
            began = time.process_time()
            sides[name]()
            times[name].append(time.process_time() - began)
    return {
        name: {
            "ms": 1e3 * min(times[name]),
            "gflops": 18e-9 * side * side * inputs * outputs / min(times[name]),
            "seconds": times[name],
            "error": float((call().float() - exact).norm() / exact.norm()),
        }
        for name, call in sides.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS / "cpu_convolution.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    table, rows = Table("picture", "torch ms (error)", "Winograd ms (error)", "times"), dict[str, Any]()
    for side, inputs, outputs in SHAPES:
        name = f"{side}x{side}, {inputs} to {outputs}"
        rows[name] = found = measure(side, inputs, outputs, args.rounds)
        cells = (f"{found[s]['ms']:.1f} ({found[s]['error']:.1e})" for s in ("torch", "winograd"))
        table.add_row(name, *cells, f"{found['torch']['ms'] / found['winograd']['ms']:.2f}")
    Console().print(table)
    result = {
        "date": date.today().isoformat(),
        "machine": f"{processor()}, {os.cpu_count()} cores, 1 torch thread",
        "load_average": os.getloadavg(),
        "note": "the machine was shared and under load: processor seconds, the best of each; operations counted as of the "
        "convolution as it is written",
        "versions": versions(),
        "rows": rows,
    }
    args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
