"""What it costs to keep a run: its trail (always), a file after every step, the cache of its steps.

The miniature of Stable Diffusion 1.5, one image; sides interleaved in one process (A B C … C B A), and the pictures compared
byte by byte. What the trail takes is measured alone, on latents of three sizes: beside a network it is lost in the noise.

    python benchmarks/recording.py          # prints the table, writes results/recording.json
    python benchmarks/recording.py --check  # few steps, and no result file
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from cpu_unet import processor
from rich.console import Console
from rich.table import Table
from unrolled.chains.cache import Cache
from unrolled.chains.chain import Chain, TextToImage
from unrolled.chains.outputs import Result
from unrolled.chains.record import versions
from unrolled.chains.run import run
from unrolled.chains.trail import marks
from unrolled.core.loading import Shelf

RESULTS = Path(__file__).parent / "results"
SIZES = {"64x64 (SD 1.5, 512 px)": 64, "96x96 (768 px)": 96, "128x128 (SDXL, 1024 px)": 128}


def sides(chain: Chain, shelf: Shelf, folder: Path) -> dict[str, Callable[[], Result]]:
    """Ways to run one chain; each with a folder of its own."""

    def fresh() -> Path:
        return Path(tempfile.mkdtemp(dir=folder))

    return {
        "nothing kept": lambda: run(chain, shelf),
        "saved after every step": lambda: run(chain, shelf, fresh(), save_every=1),
        "written, not saved": lambda: run(chain, shelf, fresh()),
        "into an empty cache": lambda: run(chain, shelf, cache=Cache(fresh())),
    }


def measure(ways: dict[str, Callable[[], Result]], rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in ways}
    pictures = {name: way().pictures[0].tobytes() for name, way in ways.items()}  # and warm up
    if len(set(pictures.values())) > 1:
        raise SystemExit("The sides do not make the same picture, so their times mean nothing.")
    for i in range(2 * rounds):
        for name in list(ways) if i % 2 == 0 else list(ways)[::-1]:
            began = time.perf_counter()
            ways[name]()
            times[name].append(time.perf_counter() - began)
    return times


def trail_microseconds(side: int, repeats: int = 200) -> float:
    """Of one image's mark after one step."""
    x = torch.randn(1, 4, side, side)
    times = []
    for step in range(repeats):
        began = time.perf_counter()
        marks(x, step, 1.0)
        times.append(time.perf_counter() - began)
    return 1e6 * statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6, help="each runs every side twice")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--output", type=Path, default=RESULTS / "recording.json")
    args = parser.parse_args()
    steps, rounds = (2, 1) if args.check else (args.steps, args.rounds)
    load = os.getloadavg()
    chain = Chain(stages=(TextToImage(prompt="a castle", steps=steps),))
    with tempfile.TemporaryDirectory() as folder:
        times = measure(sides(chain, Shelf(device="cpu"), Path(folder)), rounds)
    trail = {name: trail_microseconds(side) for name, side in SIZES.items()}
    rows: dict[str, dict[str, Any]] = {}
    base = statistics.median(times["nothing kept"])
    table = Table("side", "s", "ms a step more", title=f"{steps} steps of the miniature")
    for name, taken in times.items():
        median = statistics.median(taken)
        rows[name] = {"median_s": median, "all_s": taken, "more_ms_a_step": 1e3 * (median - base) / steps}
        table.add_row(name, f"{median:.3f}", f"{rows[name]['more_ms_a_step']:.2f}")
    Console().print(table)
    for name, microseconds in trail.items():
        print(f"trail, {name}: {microseconds:.0f} us a step")
    if args.check:
        return
    result = {
        "date": date.today().isoformat(),
        "machine": f"{processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads",
        "load_average": {"before": load, "after": os.getloadavg()},
        "job": f"text to image, miniature sd-1.5, {steps} steps, one image, its own solver",
        "statistic": f"median of {2 * rounds} runs a side, sides interleaved; the same picture from all",
        "versions": versions(),
        "sides": rows,
        "trail_us_a_step": trail,
    }
    args.output.parent.mkdir(exist_ok=True)
    args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
