"""Finds how our kernels are best cut on this card, and which backend is the fastest, at the sizes of the real networks.

Every cut and every other backend runs interleaved in one process, the L2 flushed before each call, and only if its output
is right. What is found is written to kernels/measured/, where the kernels and "auto" look it up; what became of every
side, those that did not compile too, to results/tune.json.

    python benchmarks/tune.py           # minutes, nearly all of them compiling; what --limit leaves out is named
    python benchmarks/tune.py --check   # tiny shapes, in Triton's interpreter without a device; keeps nothing
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

# Triton settles at its import how kernels are run.
os.environ["TRITON_INTERPRET"] = str(int("--check" in sys.argv and not torch.cuda.is_available()))
from operation_cases import Case, Tuned, cases, tiny_cases
from operations import RESULTS, Row, drawing, errors
from timing import clocks, device_or_refuse, environment, kernels_run, quantiles, single_calls
from unrolled.kernels import measured_table
from unrolled.kernels.measured_table import Blocks, Cut, Key, Measured, Rows, Strips, Tile
from unrolled.kernels.tuning import fitting

OTHERS = ("sdpa", "xformers", "torch")
ONE_BLOCK = [(32, 128, 4, 1), (64, 128, 4, 1), (64, 128, 8, 1), (128, 128, 4, 1), (128, 64, 4, 2), (64, 64, 4, 2)]
SMALL_HEADS = [
    (128, 64, 4, 2), (128, 64, 4, 3), (128, 64, 4, 4), (128, 128, 8, 2), (128, 128, 8, 3), (64, 64, 4, 3), (64, 128, 4, 2),
    (64, 128, 4, 3), (128, 64, 8, 3),
]  # fmt: skip
LARGE_HEADS = [
    (128, 64, 4, 2), (128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 8, 2),
    (128, 32, 4, 3),
]  # fmt: skip
VAE_HEADS = [(64, 16, 4, 2), (64, 32, 4, 1), (64, 32, 8, 1), (64, 64, 8, 1), (128, 32, 8, 1), (32, 32, 4, 2), (32, 32, 8, 2)]


def candidates(key: Key, guess: Cut, device: torch.device) -> list[Cut]:
    """What our kernel takes unasked, and what may be better and would be taken as it is."""
    more: list[Cut]
    if isinstance(guess, Blocks):
        few, small, large = key.near[2] <= 128, key.same[0] <= 64, key.same[0] > 160
        numbers = VAE_HEADS if large else ONE_BLOCK if few else SMALL_HEADS if small else LARGE_HEADS
        more = [Blocks(*n) for n in numbers if fitting(Blocks(*n), key, device) == n]
    elif isinstance(guess, Strips):
        p, c, stretch, w = guess
        more = [Strips(p, c, 2 * stretch, w), Strips(p, c, max(p, stretch // 2), w), Strips(p, c, stretch, 8)]
        more += [Strips(2 * p, c, 2 * stretch, w) for w in (4, 8)] + [Strips(max(1, p // 2), c, stretch, 4)]
    elif isinstance(guess, Tile):
        more = [Tile(n // wide, wide, w) for n in (1024, 2048, 4096) for wide in (256, 512, 1024) for w in (4, 8)]
    else:
        more = [Rows(rows, warps) for rows in (1, 2, 4) for warps in (4, 8)]
    return list(dict.fromkeys([guess, *more]))


def tune(case: Case, tuned: Tuned, device: torch.device, dtype: torch.dtype, seconds: float) -> tuple[Measured | None, Row]:
    """What goes into the table, if anything was right, and what became of every side."""
    cuts = {f"triton {tuple(cut)}": cut for cut in candidates(tuned.key, tuned.guess, device)}
    sides = {name: case.sides[name] for name in OTHERS if name in case.sides}
    sides |= {name: partial(tuned.launch, cut) for name, cut in cuts.items()}
    found = errors(replace(case, sides=sides), dtype)
    right = {name: run for name, run in sides.items() if "fault" not in found[name]}
    for name, times in single_calls(right, device, seconds / 2).items():
        found[name]["ms"] = quantiles(times)
    best = min((name for name in right if name in cuts), key=lambda name: found[name]["ms"]["q0.5"], default=None)
    # Once more, because the least of many is too low.
    last = {name: run for name, run in right.items() if name == best or name not in cuts}
    again = {name: statistics.median(times) for name, times in single_calls(last, device, seconds / 2).items()}
    record: Row = {"operation": case.operation, "case": case.name, "best": best, "again_ms": again, "sides": found}
    if "sdpa" in right:
        record["sdpa_kernels"] = kernels_run(right["sdpa"], device)
    took = {"triton" if name == best else name: round(1e3 * ms, 3) for name, ms in again.items()}
    return Measured(tuned.key, None if best is None else cuts[best], took) if took else None, record


def write(folder: Path, card: str, where: Row, rows: list[Measured]) -> Path:
    """The table of a card, a shape a line."""
    head = {
        "format": measured_table.FORMAT, "card": card, "date": where["when"][:10], "versions": where["versions"],
        "driver": where["clocks"].get("driver_version"), "cuda": where["cuda"],
    }  # fmt: skip
    lines = ",\n  ".join(json.dumps(measured_table.written(row)) for row in rows)
    folder.mkdir(parents=True, exist_ok=True)
    path = measured_table.file(card, folder)
    path.write_text(f'{json.dumps(head, indent=1)[:-2]},\n "rows": [\n  {lines}\n ]\n}}\n', encoding="utf-8")
    return path


def measure(device: torch.device, dtype: torch.dtype, limit: float, folder: Path, log: Path) -> None:
    """Everything, written after every shape, so that whatever ends it leaves what there is."""
    began, draw = time.perf_counter(), drawing(device, dtype)
    where, card = environment(device), torch.cuda.get_device_name(device)
    rows = [row for row in measured_table.table(card).rows if row.key.dtype != dtype]
    result: Row = where | {"dtype": str(dtype)[6:], "cases": [], "left_out": []}
    for make in cases(draw):
        case = make()
        if case.tuned is None:
            continue
        if time.perf_counter() - began > limit:
            result["left_out"].append(f"{case.operation}, {case.name}")
            continue
        row, record = tune(case, case.tuned, device, dtype, 1.0)
        rows += [row] if row is not None else []
        result["cases"].append(record)
        show(record)
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(json.dumps(result | {"clocks_after": clocks()}, indent=1, ensure_ascii=False) + "\n")
        write(folder, card, where, rows)


def check(device: torch.device) -> None:
    """Tiny shapes, and the table that is made of them read again."""
    rows, where = [], environment(device)
    for dtype in (torch.float16, torch.float32):
        for make in tiny_cases(drawing(device, dtype)):
            case = make()
            if case.tuned is None:
                continue
            row, record = tune(case, case.tuned, device, dtype, 0.0)
            show(record)
            wrong = {name: side for name, side in record["sides"].items() if name.startswith("triton") and "fault" in side}
            if wrong or row is None:
                raise SystemExit(f"The harness is wrong: {case.operation}, {case.name}: {wrong}")
            rows.append(row)
    with tempfile.TemporaryDirectory() as folder:
        if measured_table.read(write(Path(folder), "check", where, rows), "check").rows != tuple(rows):
            raise SystemExit("The harness is wrong: the table is not read as it was written.")


def show(record: Row) -> None:
    print(f"{record['operation']}, {record['case']}: ours best as {record['best']}", flush=True)
    for name, side in record["sides"].items():
        if "fault" in side:
            print(f"  {name}: {side['fault']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="tiny shapes, and nothing is kept")
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds, after which no other shape is begun")
    parser.add_argument("--folder", type=Path, default=measured_table.FOLDER, help="of the table")
    parser.add_argument("--output", type=Path, default=RESULTS / "tune.json", help="of what became of every side")
    args = parser.parse_args()
    device = device_or_refuse(args.check and not torch.cuda.is_available())
    with torch.inference_mode():
        if args.check:
            check(device)
        else:
            measure(device, getattr(torch, args.dtype), args.limit, args.folder, args.output)


if __name__ == "__main__":
    main()
