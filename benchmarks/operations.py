"""Our kernels against every other way there is to do the same, at the sizes of the real networks, on one CUDA device.

Device events around single calls, the L2 cache flushed before each, sides interleaved A B B A in one process. Beside
every time: its error against float64, without which there is no time, and the fraction of the floor that it reaches,
which is the larger of operations over the rate of a matrix product and of bytes over that of a copy, both measured first.

    python benchmarks/operations.py            # under 3 minutes on an H200; writes results/operations.json
    python benchmarks/operations.py --check    # tiny shapes, results only; without a device in Triton's interpreter
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

# Triton settles at its import how kernels are run.
os.environ["TRITON_INTERPRET"] = str(int("--check" in sys.argv and not torch.cuda.is_available()))
from operation_cases import Case, Draw, cases, tiny_cases
from rich.console import Console
from rich.table import Table
from timing import clocks, device_or_refuse, environment, kernels_run, quantiles, single_calls

RESULTS = Path(__file__).parent / "results"
ALLOWED = {torch.float16: 2e-3, torch.bfloat16: 1.2e-2, torch.float32: 1e-4}
"""Of |out - exact| / |exact|, beyond which a side is wrong and not timed."""

Row = dict[str, Any]


def drawing(device: torch.device, dtype: torch.dtype) -> Draw:
    generator = torch.Generator(device).manual_seed(0)
    return lambda *shape: torch.randn(shape, generator=generator, device=device).to(dtype)


def errors(case: Case, dtype: torch.dtype) -> dict[str, Row]:
    """Of every side, or why there is none."""
    exact = case.of(case.exact()).double()
    found: dict[str, Row] = {}
    for name, run in case.sides.items():
        try:
            error = ((case.of(run()).double() - exact).norm() / exact.norm()).item()
        except Exception as problem:  # whatever it is, it is this side's line
            found[name] = {"fault": (str(problem) or type(problem).__name__).splitlines()[0][:200]}
            continue
        found[name] = {"error": error} if error <= ALLOWED[dtype] else {"error": error, "fault": "wrong"}
    return found


def ceilings(draw: Draw, device: torch.device) -> tuple[float, float]:
    """FLOP/s of a large matrix product and bytes/s, read and written, of a large copy; of random numbers, not of zeros."""
    a, b, source = draw(8192, 8192), draw(8192, 8192), draw(1 << 30)
    into = torch.empty_like(source)
    sides = {"product": lambda: a @ b, "copy": lambda: into.copy_(source)}
    took = {name: statistics.median(times) / 1e3 for name, times in single_calls(sides, device, 1.0).items()}
    return 2 * 8192**3 / took["product"], 2 * source.numel() * source.element_size() / took["copy"]


def measure(device: torch.device, dtype: torch.dtype, only: str | None, seconds: float) -> dict[str, Any]:
    """Everything for the result file; cases that the time does not suffice for are named in it."""
    began, draw = time.perf_counter(), drawing(device, dtype)
    product, copy = ceilings(draw, device)
    result: dict[str, Any] = environment(device) | {
        "dtype": str(dtype)[6:], "ceilings": {"tflops": product / 1e12, "gb_per_s": copy / 1e9}, "rows": [], "left_out": [],
    }  # fmt: skip
    makers = list(cases(draw))
    for i, make in enumerate(makers):
        case, left = make(), seconds - (time.perf_counter() - began)
        if only and case.operation != only:
            continue
        if left <= 0:
            result["left_out"].append(f"{case.operation}, {case.name}")
            continue
        found = errors(case, dtype)
        right = {name: case.sides[name] for name, row in found.items() if "fault" not in row}
        times = single_calls(right, device, 0.5 * left / (len(makers) - i))
        if "sdpa" in right:
            found["sdpa"]["kernels"] = kernels_run(right["sdpa"], device)
        floor = 1e3 * max(case.flops / product, case.moved / copy)
        for name, row in found.items():
            if name in times:
                row["ms"] = quantiles(times[name])
                middle = row["ms"]["q0.5"]
                row |= {"floor_ms": floor, "of_floor": floor / middle}
                row |= {"tflops": case.flops / middle / 1e9} if case.flops else {"gb_per_s": case.moved / middle / 1e6}
            result["rows"].append({"operation": case.operation, "case": case.name, "side": name, **case.note, **row})
    return result | {"clocks_after": clocks(), "seconds": time.perf_counter() - began}


def check(device: torch.device) -> list[Row]:
    """Every operation at tiny sizes: errors alone."""
    dtypes = [torch.float16, torch.float32, *[torch.bfloat16] * (device.type == "cuda")]
    made = ((dtype, make()) for dtype in dtypes for make in tiny_cases(drawing(device, dtype)))
    return [
        {"operation": case.operation, "case": f"{case.name}, {str(dtype)[6:]}", "side": name, **row}
        for dtype, case in made
        for name, row in errors(case, dtype).items()
    ]


def show(rows: list[Row]) -> None:
    table = Table("operation", "case", "side", "µs", "20–80 %", "rate", "of floor", "error")
    for row in rows:
        cells = [row["operation"], row["case"], row["side"]]
        if ms := row.get("ms"):
            rate = f"{row['tflops']:.0f} TFLOP/s" if "tflops" in row else f"{row['gb_per_s']:.0f} GB/s"
            spread = f"{1e3 * ms['q0.2']:.1f}–{1e3 * ms['q0.8']:.1f}"
            cells += [f"{1e3 * ms['q0.5']:.1f}", spread, rate, f"{row['of_floor']:.0%}"]
        else:
            cells += ["", row.get("fault", ""), "", ""]
        table.add_row(*cells, f"{row['error']:.1e}" if "error" in row else "")
    Console(width=180).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="tiny shapes, results only")
    parser.add_argument("--only", help="one operation")
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--seconds", type=float, default=150.0, help="after which no other case is begun")
    parser.add_argument("--output", type=Path, default=RESULTS / "operations.json")
    args = parser.parse_args()
    device = device_or_refuse(args.check and not torch.cuda.is_available())
    with torch.inference_mode():
        if args.check:
            rows = check(device)
            show(rows)
            wrong = [row for row in rows if row["side"] == "triton" and "fault" in row]
            raise SystemExit(f"{len(wrong)} of our results are wrong." if wrong else 0)
        result = measure(device, getattr(torch, args.dtype), args.only, args.seconds)
    args.output.parent.mkdir(exist_ok=True)
    args.output.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    show(result["rows"])


if __name__ == "__main__":
    main()
