"""Whole chains side by side with diffusers' own pipelines: time, peak memory, and decodes and encodes that are not run.

Each of the seven chains as the packaged file says it and as the article writes it (article.py), on the same weights and
with the same noise. The pictures must be within 1 of 255, or no figure is written.

- Time: in one process, the sides interleaved (A B B A): "loaded", with the models of the whole chain in memory before
  the clock starts, and "from files", with all of the loading, ours on a new shelf and freeing what is no longer
  needed, as the command line does. ``cpu`` is the processor's time of the same runs, which
  other work on the machine hardly touches.
- Memory: every side in fresh processes. Both libraries and every class in use are imported
  first, on both sides alike; then the kernel's peak of resident memory (VmHWM) is set back, and read after one run
  from files: as it is, and less what the imports held.
- Calls of VAE.encode and .decode are counted; a handoff of latents is a pair of them that is not run.

    python benchmarks/chains.py            # prints the table, writes results/chains.json
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
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import date
from pathlib import Path
from typing import Any
from unittest.mock import patch

import diffusers
import torch
import transformers
from article import CHAINS, chain_of, difference, loader, ours  # type: ignore[import-not-found]
from PIL import Image
from rich.console import Console
from rich.table import Table
from unrolled.chains.chain import Chain
from unrolled.chains.plan import plan
from unrolled.chains.record import versions
from unrolled.core.checkpoint import COMPONENTS
from unrolled.core.loading import Shelf

RESULTS = Path(__file__).parent / "results"
SIDES = ("ours", "diffusers")
Run = Callable[[], Image.Image]
Sample = tuple[float, float]
"""Seconds by the clock and of the processor."""


def sides(name: str, chain: Chain, models: str, scratch: Path, *, keep: bool) -> dict[str, Run]:
    """Both, on models that stay loaded from the first run on, or are loaded in every run."""
    shelf, load = Shelf(models, device="cpu"), loader(models, scratch, keep=keep)
    return {
        "ours": lambda: ours(chain, shelf) if keep else ours(chain, Shelf(models, device="cpu"), free=True),
        "diffusers": lambda: CHAINS[name](chain, load),
    }


# --- the gate, and what is counted while it runs


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Calls of encode and decode of any VAE."""
    calls = {"encode": 0, "decode": 0}
    with ExitStack() as stack:
        for kind in (diffusers.AutoencoderKL, diffusers.VQModel):
            for name in calls:
                stack.enter_context(patch.object(kind, name, _counting(getattr(kind, name), name, calls)))
        yield calls


def _counting(method: Callable[..., Any], name: str, calls: dict[str, int]) -> Callable[..., Any]:
    def call(*args: Any, **options: Any) -> Any:
        calls[name] += 1
        return method(*args, **options)

    return call


def gate(name: str, models: str, chain: Chain, runs: dict[str, Run]) -> dict[str, Any]:
    """The largest difference of the pictures, calls of the VAEs, and the handoffs that need none.

    Sharpening doubles a difference of 1: there the picture before it is the gate.
    """
    pictures, calls = list[Image.Image](), dict[str, Any]()
    for side in SIDES:
        with counted() as calls[side]:
            pictures.append(runs[side]())
    calls["pairs_avoided"] = sum("latents" in item.takes for item in plan(chain, Shelf(models, device="cpu")))
    found: dict[str, Any] = {"largest_pixel_difference": difference(*pictures), "vae_calls": calls}
    if name == "text-to-image-and-finish":
        found["largest_pixel_difference_sharpened"] = found["largest_pixel_difference"]
        with tempfile.TemporaryDirectory() as scratch:
            soft = chain_of(name, models, "sharpened.percent=0", "enlarged.factor=1")
            before = sides(name, soft, models, Path(scratch), keep=True)
            found["largest_pixel_difference"] = difference(*(before[side]() for side in SIDES))
    if found["largest_pixel_difference"] > 1:
        raise SystemExit(f"{name}: the pictures differ by {found} of 255, so speed means nothing.")
    return found


# --- time


def timed(run: Run) -> Sample:
    began, busy = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - began, time.process_time() - busy


def compare(runs: dict[str, Run], rounds: int) -> dict[str, Any]:
    """Medians and quartiles over ``2 * rounds`` runs a side."""
    samples: dict[str, list[Sample]] = {side: [] for side in SIDES}
    for _ in range(rounds):
        for side in (*SIDES, *reversed(SIDES)):
            samples[side].append(timed(runs[side]))
    return {
        clock: {side: quartiles([sample[i] for sample in samples[side]]) for side in SIDES}
        | {"ratio": _ratio([statistics.median(sample[i] for sample in samples[side]) for side in SIDES])}
        for i, clock in enumerate(("wall", "cpu"))
    }


def quartiles(seconds: Sequence[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return {"median_s": middle, "quartile_1_s": low, "quartile_3_s": high}


# --- memory


def memory(name: str, models: str, processes: int) -> dict[str, Any]:
    """Medians over fresh processes, one of each side at a time."""
    samples: dict[str, list[tuple[float, float]]] = {side: [] for side in SIDES}
    for _ in range(processes):
        command = [sys.executable, __file__, "--chains", name, "--models", models, "--memory-of"]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        running = {side: subprocess.Popen([*command, side], **pipes) for side in SIDES}
        for side, process in running.items():
            imports, peak = process.communicate()[0].split()[-2:]
            samples[side].append((float(peak), float(peak) - float(imports)))
    result: dict[str, Any] = {}
    for i, figure in enumerate(("peak_mb", "above_imports_mb")):
        of = {side: statistics.median(sample[i] for sample in samples[side]) for side in SIDES}
        result[figure] = of | {"ratio": _ratio(list(of.values()))}
    return result


def run_side(name: str, models: str, side: str) -> None:
    """One run in this process: prints megabytes held after the imports, and at the worst moment."""
    chain = chain_of(name, models)
    for library in (diffusers, transformers):
        for kind in (kind for kinds in COMPONENTS.values() for kind in kinds):
            getattr(library, kind, None)
    _ = diffusers.AutoPipelineForInpainting, diffusers.KandinskyV22InpaintPipeline, diffusers.KandinskyV22PriorPipeline
    _ = diffusers.KandinskyV22Img2ImgPipeline, diffusers.StableDiffusionLatentUpscalePipeline, diffusers.UnCLIPScheduler
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    with tempfile.TemporaryDirectory() as scratch:
        sides(name, chain, models, Path(scratch), keep=False)[side]()
    print(before, _status("VmHWM"))


def _status(field: str) -> float:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


# --- all of it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chains", nargs="+", choices=list(CHAINS), default=list(CHAINS))
    parser.add_argument("--models", default="miniature", help="or a folder of model folders")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS / "chains.json")
    parser.add_argument("--memory-of", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    if args.memory_of:
        run_side(args.chains[0], args.models, args.memory_of)
        return
    done = json.loads(args.out.read_text())["chains"] if args.out.is_file() else {}
    result: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads",
        "job": f"each packaged chain, models: {args.models}, float32, one picture",
        "statistic": "medians and quartiles of interleaved runs; memory: medians of processes; both as many a side as said",
        "versions": versions(),
        "chains": {name: done[name] for name in CHAINS if name in done},  # those measured before stay
    }
    for name in args.chains:
        with tempfile.TemporaryDirectory() as scratch:
            chain = chain_of(name, args.models)
            loaded = sides(name, chain, args.models, Path(scratch), keep=True)
            row = gate(name, args.models, chain, loaded)  # and loads, and warms up
            row |= {"loaded": compare(loaded, args.rounds)}
            del loaded
            from_files = sides(name, chain, args.models, Path(scratch), keep=False)
            row |= {"from_files": compare(from_files, args.rounds), "memory": memory(name, args.models, args.processes)}
        result["chains"][name] = row | {
            "runs": 2 * args.rounds,
            "processes": args.processes,
            "load_average": os.getloadavg(),
        }
        args.out.parent.mkdir(exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    show(result["chains"])


def show(rows: dict[str, dict[str, Any]]) -> None:
    """Ours / diffusers = ratio."""
    table = Table(
        "chain", "loaded, s", "cpu", "from files, s", "cpu", "peak MB", "over imports", "pixels", "pairs", "enc", "dec"
    )

    def cell(part: dict[str, Any], *path: str, digits: int = 2) -> str:
        values = [part[side] for side in SIDES]
        shown = [f"{value['median_s'] if isinstance(value, dict) else value:.{digits}f}" for value in values]
        return f"{shown[0]} / {shown[1]} = {part['ratio']:.3f}"

    for name, row in rows.items():
        calls, took = row["vae_calls"], [row[kind] for kind in ("loaded", "from_files")]
        table.add_row(
            name,
            *(text for kind in took for text in (cell(kind["wall"]), f"{kind['cpu']['ratio']:.3f}")),
            *(cell(row["memory"][figure], digits=0) for figure in ("peak_mb", "above_imports_mb")),
            str(row["largest_pixel_difference"]),
            str(calls["pairs_avoided"]),
            *("/".join(str(calls[side][what]) for side in SIDES) for what in ("encode", "decode")),
        )
    Console(width=220).print(table)
    print(
        "ours / diffusers = ratio; pixels: largest difference of 255; pairs: decodes and encodes saved by handing on latents"
    )


def _ratio(pair: Sequence[float]) -> float:
    return pair[0] / pair[1]


if __name__ == "__main__":
    main()
