"""Tables and plots of the benchmarks, from their result files and nothing else.

    python benchmarks/report.py                          # Markdown on standard output
    python benchmarks/report.py --output docs/benchmarks.md  # and plots beside it, in docs/benchmarks/ (needs matplotlib)

A result file that is not there is said not to have been measured.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
COMMANDS = {
    "operations": "benchmarks/operations.py",
    "tune": "benchmarks/tune.py",
    "unet_step": "benchmarks/unet_step.py",
    "compiled": "benchmarks/unet_step.py --structures sd-1.5 sdxl-base --compile --output benchmarks/results/compiled.json",
    "pipelines": "benchmarks/pipelines.py",
    "compiled_pipelines": "benchmarks/pipelines.py --structures sd-1.5 sdxl-base --compile "
    "--output benchmarks/results/compiled_pipelines.json",
    "steps": "benchmarks/pipelines.py --structures sd-1.5 --steps 10 20 50 --output benchmarks/results/steps.json",
    "scaling": "benchmarks/unet_step.py --scaling",
    "cpu_unet": "benchmarks/cpu_unet.py",
}
Result = dict[str, Any]


def table(columns: list[str], rows: Iterable[list[str]]) -> str:
    """In Markdown, the first column to the left and all others to the right."""
    lines = ["| " + " | ".join(columns) + " |", "|---|" + "---:|" * (len(columns) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def machine(found: Result) -> str:
    """One sentence: what it was measured on."""
    where = found.get("environment", found)
    if "card" not in where:
        return f"On {found.get('machine', 'an unnamed machine')}, {found.get('date', where.get('when', ''))}."
    clocks = where.get("clocks", {})
    libraries = ", ".join(f"{name} {v}" for name, v in where["versions"].items() if v and name != "unrolled")
    driver = clocks.get("driver_version", "unknown")
    return (
        f"On one {where['card']} ({where['multiprocessors']} multiprocessors, {where['memory_gib']} GiB), driver {driver}, "
        f"CUDA {where['cuda']}, {libraries}; clocks at the start {clocks.get('clocks.sm', '?')} and "
        f"{clocks.get('clocks.mem', '?')}; {where['when']}."
    )


def unet_steps(found: Result) -> Iterator[str]:
    """A table for each structure."""
    for job in found["jobs"]:
        title = f"{job['structure']}, {job['pixels']} px, batch {job['batch']}, {job['dtype']}"
        yield f"**{title}**: one guided step; the floor is {job['floor_ms']:.2f} ms\n"
        columns = [
            "side", "ms (median)", "20–80 %", "times eager", "of floor", "error against float32", "peak GiB", "first call s",
            "kernels", "launches",
        ]  # fmt: skip
        base = job["sides"].get("diffusers eager", {}).get("ms", {}).get("q0.5")
        yield table(columns, (_step_row(name, side, base) for name, side in job["sides"].items()))
    yield from _left_out(found)


def _step_row(name: str, side: Result, base: float | None) -> list[str]:
    if "ms" not in side:
        return [name, side.get("refused", "not measured"), *[""] * 8]
    ms, launches = side["ms"], side.get("launches") or {}
    return [
        name,
        f"{ms['q0.5']:.2f}",
        f"{ms['q0.2']:.2f}–{ms['q0.8']:.2f}",
        f"{base / ms['q0.5']:.2f}" if base else "",
        f"{side['of_floor']:.0%}",
        f"{side['error_against_fp32']:.1e}",
        f"{side['peak_gib']:.1f}" if "peak_gib" in side else "",
        f"{side['first_call_s']:.1f}",
        str(launches.get("on_device", "")),
        str(launches.get("from_host", "")),
    ]


def pipelines(found: Result) -> Iterator[str]:
    """One table of all runs."""
    rows = []
    for job in found["jobs"]:
        base = job["sides"].get("diffusers pipeline", job["sides"].get("diffusers networks in our loop", {})).get("ms", {})
        for name, side in job["sides"].items():
            if "ms" not in side:
                rows.append([f"{job['structure']}: {name}", side.get("refused", "not measured"), *[""] * 7])
                continue
            ms, middle = side["ms"], side["ms"]["q0.5"]
            away, apart = side.get("latents_from_diffusers"), side.get("pixels_from_pipeline")
            rows.append(
                [
                    f"{job['structure']}, {job['pixels']} px, {job['steps']} steps: {name}",
                    f"{middle:.0f}",
                    f"{ms['q0.2']:.0f}–{ms['q0.8']:.0f}",
                    f"{base['q0.5'] / middle:.2f}" if base else "",
                    f"{side['of_floor']:.0%}",
                    f"{away:.1e}" if away is not None else "",
                    f"{apart:.1e}" if apart is not None else "",
                    f"{side['peak_gib']:.1f}" if "peak_gib" in side else "",
                    f"{side['first_run_s']:.1f}",
                ]
            )
    columns = [
        "run", "ms", "20–80 %", "times diffusers", "of floor", "latents away from diffusers", "pixels away", "peak GiB",
        "first s",
    ]  # fmt: skip
    yield table(columns, rows)
    yield from _left_out(found)


def scaling(found: Result) -> Iterator[str]:
    """Time and memory against batch and size."""
    rows = []
    for job in found["jobs"]:
        for name, side in job["sides"].items():
            if "ms" in side:
                middle = side["ms"]["q0.5"]
                peak = f"{side['peak_gib']:.1f}" if "peak_gib" in side else ""
                cells = [f"{middle:.1f}", f"{middle / job['batch']:.1f}", f"{side['of_floor']:.0%}", peak]
                rows.append([f"{job['structure']}, {job['pixels']} px, batch {job['batch']}: {name}", *cells])
    yield table(["step", "ms", "ms an image", "of floor", "peak GiB"], rows)
    yield from _left_out(found)


def operations(found: Result) -> Iterator[str]:
    """A table for each operation."""
    for operation in dict.fromkeys(row["operation"] for row in found["rows"]):
        yield f"**{operation}**, {found['dtype']}\n"
        rows = [row for row in found["rows"] if row["operation"] == operation]
        yield table(["case: side", "µs", "20–80 %", "rate", "of floor", "error"], map(_operation_row, rows))
    yield from _left_out(found)


def _operation_row(row: Result) -> list[str]:
    inner = f" ({row['sdpa_chooses']})" if row["side"] == "sdpa" and "sdpa_chooses" in row else ""
    name, error = f"{row['case']}: {row['side']}{inner}", f"{row['error']:.1e}" if "error" in row else ""
    if "ms" not in row:
        return [name, row.get("fault", "not measured"), "", "", "", error]
    rate = f"{row['tflops']:.0f} TFLOP/s" if "tflops" in row else f"{row['gb_per_s']:.0f} GB/s"
    ms = {q: 1e3 * row["ms"][q] for q in ("q0.2", "q0.5", "q0.8")}
    spread = f"{ms['q0.2']:.1f}–{ms['q0.8']:.1f}"
    return [name, f"{ms['q0.5']:.1f}", spread, rate, f"{row['of_floor']:.0%}", error]


def tune(found: Result) -> Iterator[str]:
    """One table: our best cut, and every backend's time with it."""
    yield f"Microseconds (median), {found['dtype']}; ours at its best cut, which `kernels/measured/` keeps.\n"
    others = ("sdpa", "xformers", "torch")
    rows = []
    for case in found["cases"]:
        times = {name: f"{1e3 * ms:.1f}" for name, ms in case["again_ms"].items()}
        best = case["best"] or ""
        ours = [best.removeprefix("triton "), times.get(best, "none was right")]
        rows.append([f"{case['operation']}, {case['case']}", *ours, *(times.get(name, "") for name in others)])
    yield table(["shape", "cut", "triton", *others], rows)
    yield from _left_out(found)


def cpu_unet(found: Result) -> Iterator[str]:
    """One table, by processor time."""
    base = found["sides"]["diffusers fp32"]["processor_s"]
    yield f"{found['job']}; {found['note']} (load average {found['load_average']['before'][0]:.1f}).\n"
    rows = (
        [
            name,
            f"{r['processor_s']:.2f}",
            f"{r['wall_s']:.2f}",
            f"{base / r['processor_s']:.2f}",
            f"{r['error_against_fp32']:.1e}",
        ]
        for name, r in found["sides"].items()
    )
    yield table(["side", "processor s", "wall s", "times diffusers fp32", "error against float32"], rows)


def _left_out(found: Result) -> Iterator[str]:
    if found.get("left_out"):
        yield f"Not measured, for want of time: {'; '.join(found['left_out'])}.\n"


SECTIONS: dict[str, tuple[str, Callable[[Result], Iterator[str]]]] = {
    "unet_step": ("One step of the UNet", unet_steps),
    "compiled": ("One step, with torch.compile", unet_steps),
    "pipelines": ("Whole runs", pipelines),
    "compiled_pipelines": ("Whole runs, with torch.compile", pipelines),
    "steps": ("Steps", pipelines),
    "scaling": ("Batch and resolution", scaling),
    "operations": ("Operations", operations),
    "tune": ("The fastest backend of an operation", tune),
    "cpu_unet": ("On the CPU", cpu_unet),
}


def report(folder: Path, plots: Path | None = None) -> str:
    """The whole page."""
    parts = ["# Benchmarks\n", "Made by `benchmarks/report.py` from `benchmarks/results/`; no figure has another source.\n"]
    for name, (title, render) in SECTIONS.items():
        parts.append(f"## {title}\n")
        file = folder / f"{name}.json"
        if not file.exists():
            parts.append(f"Not measured yet: `python {COMMANDS[name]}`.\n")
            continue
        found = json.loads(file.read_text(encoding="utf-8"))
        parts += [machine(found) + "\n", *render(found)]
        if plots is not None and (picture := _picture(name, found, plots)):
            parts.append(f"![{title}]({plots.name}/{picture})\n")
    return "\n".join(parts)


def _picture(name: str, found: Result, folder: Path) -> str | None:
    try:
        from report_pictures import draw
    except ImportError:
        raise SystemExit("The plots need matplotlib: pip install matplotlib, or leave --output out for tables.") from None
    picture: str | None = draw(name, found, folder)
    return picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--output", type=Path, help="the page; plots go into a folder of its name beside it")
    args = parser.parse_args()
    if args.output is None:
        print(report(args.results))
        return
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(report(args.results, args.output.with_suffix("")), encoding="utf-8")


if __name__ == "__main__":
    main()
