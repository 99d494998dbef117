"""The pictures of report.py, from the same result files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot

Result = dict[str, Any]


def bars(found: Result) -> None:
    """Times of every side of every job."""
    jobs = [job for job in found["jobs"] if any("ms" in side for side in job["sides"].values())]
    _, grid = pyplot.subplots(len(jobs), 1, figsize=(8, 2.2 * len(jobs)), squeeze=False)
    for axes, job in zip(grid[:, 0], jobs, strict=True):
        sides = {name: side["ms"]["q0.5"] for name, side in job["sides"].items() if "ms" in side}
        axes.barh(list(sides), list(sides.values()), color=["C0" if name.startswith("ours") else "C7" for name in sides])
        axes.axvline(job["floor_ms"], color="C3", linestyle="--", label="floor")
        axes.set_title(f"{job['structure']}, {job['pixels']} px", loc="left", fontsize=10)
        axes.set_xlabel("ms")
        axes.invert_yaxis()
        axes.legend()


def curves_of_size(found: Result) -> None:
    """Time and memory of a step against what goes through the network: batch and resolution."""
    times, peaks = _curves(found, lambda job: 2 * job["batch"] * job["pixels"] ** 2 / 2**20)
    for axes in (times, peaks):
        axes.set_xscale("log")
        axes.set_xlabel("megapixels through the network (guidance counted)")
    times.set_yscale("log")


def curves_of_steps(found: Result) -> None:
    """Time and memory of a run against its steps."""
    for axes in _curves(found, lambda job: job["steps"]):
        axes.set_xlabel("steps")
        axes.set_ylim(bottom=0)


def _curves(found: Result, along: Any) -> Any:
    _, (times, peaks) = pyplot.subplots(1, 2, figsize=(10, 4))
    lines: dict[str, list[tuple[float, float, float]]] = {}
    for job in found["jobs"]:
        for name, side in job["sides"].items():
            if "ms" in side:
                point = along(job), side["ms"]["q0.5"], side.get("peak_gib", float("nan"))
                lines.setdefault(f"{job['structure']}, {name}", []).append(point)
    for label, points in lines.items():
        xs, ms, gib = zip(*sorted(points), strict=True)
        times.plot(xs, ms, "o-", label=label)
        peaks.plot(xs, gib, "o-", label=label)
    times.set_ylabel("ms")
    peaks.set_ylabel("peak GiB")
    if lines:
        times.legend(fontsize=7)
    return times, peaks


def points(found: Result) -> None:
    """Of every operation, the fraction of the floor that every side reaches."""
    rows = [row for row in found["rows"] if "of_floor" in row]
    operations = list(dict.fromkeys(row["operation"] for row in rows))
    cases = [list(dict.fromkeys(row["case"] for row in rows if row["operation"] == name)) for name in operations]
    heights = [1 + len(names) for names in cases]
    _, grid = pyplot.subplots(
        len(heights), 1, figsize=(10, 1 + 0.3 * sum(heights)), squeeze=False, height_ratios=heights, sharex=True
    )
    for axes, operation in zip(grid[:, 0], operations, strict=True):
        own = [row for row in rows if row["operation"] == operation]
        for side in dict.fromkeys(row["side"] for row in own):
            of_side = [row for row in own if row["side"] == side]
            axes.plot([100 * row["of_floor"] for row in of_side], [row["case"] for row in of_side], "o", label=side)
        axes.set_title(operation, loc="left", fontsize=10)
        axes.invert_yaxis()
        axes.legend(fontsize=6)
    grid[-1, 0].set_xlabel("% of the floor")


PICTURES = {
    "unet_step": bars, "compiled": bars, "pipelines": bars, "compiled_pipelines": bars, "scaling": curves_of_size,
    "steps": curves_of_steps, "operations": points,
}  # fmt: skip


def draw(name: str, found: Result, folder: Path) -> str | None:
    """The picture's name; None where there is nothing to draw."""
    if name not in PICTURES or not found.get("jobs", found.get("rows")):
        return None
    PICTURES[name](found)
    folder.mkdir(parents=True, exist_ok=True)
    pyplot.tight_layout()
    pyplot.savefig(folder / f"{name}.png", dpi=110)
    pyplot.close()
    return f"{name}.png"
