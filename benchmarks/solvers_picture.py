"""The work–precision diagram of ``benchmarks/solvers.py``, drawn from what it measured.

Needs matplotlib (``pip install 'unrolled[plot]'``).

    python benchmarks/solvers_picture.py            # reads results/solvers.json, writes results/solvers.png
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from PIL import Image

matplotlib.use("Agg")
from matplotlib import pyplot

RESULTS = Path(__file__).parent / "results"

# Okabe and Ito's colours (the purple darkened), which stay apart for every kind of colour vision.
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#AA4499", "#777777"
COLOURS = {
    "one step": BLUE,
    "multistep on the noise": ORANGE,
    "multistep on x0": GREEN,
    "with a corrector": PURPLE,
    "no noise, to compare": GREY,
    "by training timestep": ORANGE,
    "by noise level": BLUE,
}
STYLE: Any = {
    "font.size": 8.5,
    "axes.edgecolor": "#bbbbbb",
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), "#333333"),
    **dict.fromkeys(("xtick.major.size", "ytick.major.size"), 2),
}

Lines = Mapping[str, Mapping[str, Sequence[tuple[int, float]]]]
"""(evaluations, error) by family and name."""


def main() -> None:
    found = json.loads((RESULTS / "solvers.json").read_text())
    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(1, 3, figsize=(14, 5.6), gridspec_kw={"wspace": 0.58})
        panel(axes[0], "Deterministic solvers\nerror against the true solution", found["deterministic"])
        panel(axes[1], "Stochastic solvers\nWasserstein distance, Gaussian data", found["stochastic"])
        panel(axes[2], "Spacings, with DPM++ 2M\nerror against the true solution", found["spacings"])
        guides(axes[0], 34.0, 0.5, (1, 2, 3, 4))
        guides(axes[1], 34.0, 2.5, (1, 2))
        guides(axes[2], 4.8, 0.012, (1, 2))
        picture = io.BytesIO()
        figure.savefig(picture, dpi=140, bbox_inches="tight", facecolor="white")
        pyplot.close(figure)
    # A palette of 128 colours is all it needs, and a quarter of the bytes.
    Image.open(picture).convert("RGB").quantize(128).save(RESULTS / "solvers.png", optimize=True)


def panel(axes: Any, title: str, families: Lines) -> None:
    """Lines in the colours of their families, each with its name beside its end."""
    points = [point for family in families.values() for line in family.values() for point in line]
    errors = [error for _, error in points]
    axes.set(xscale="log", yscale="log", xlim=(4, 104), ylim=(min(errors) / 1.5, 1.5 * max(errors)))
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel("evaluations", loc="right")
    axes.set_xticks([5, 10, 20, 50, 100], ["5", "10", "20", "50", "100"])
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e9e9e9", lw=0.6)
    axes.set_axisbelow(True)
    for i, (family, lines) in enumerate(reversed(list(families.items()))):
        axes.text(0.03, 0.03 + 0.042 * i, family, color=COLOURS[family], transform=axes.transAxes, fontsize=9)
        for line in lines.values():
            axes.plot(*zip(*line, strict=True), color=COLOURS[family], lw=1.3, alpha=0.9, solid_capstyle="round")
    name_ends(axes, families)


def name_ends(axes: Any, families: Lines) -> None:
    """The names in a column right of the panel, as near to the height of their lines' ends as they fit."""
    to_axes = axes.transData + axes.transAxes.inverted()
    ends = [
        (*to_axes.transform(line[-1]), name, COLOURS[family])
        for family, lines in families.items()
        for name, line in lines.items()
    ]
    ends.sort(key=lambda end: float(end[1]))
    heights = [float(end[1]) for end in ends]
    for _ in range(500):  # neighbours push each other apart
        for i in range(len(heights) - 1):
            push = max(0.0, 0.037 - (heights[i + 1] - heights[i])) / 2
            heights[i], heights[i + 1] = heights[i] - push, heights[i + 1] + push
    for (x, y, name, colour), height in zip(ends, heights, strict=True):
        axes.text(1.065, height, name, color=colour, va="center", fontsize=8, transform=axes.transAxes)
        pointer = (x + 0.008, 1.035, 1.058), (y, height, height)
        axes.plot(*pointer, color=colour, lw=0.5, alpha=0.6, transform=axes.transAxes, clip_on=False)


def guides(axes: Any, x: float, y: float, orders: Sequence[int]) -> None:
    """How steep the orders are."""
    for order in orders:
        axes.plot((x, 1.9 * x), (y, y * 1.9**-order), color="#999999", lw=0.8, ls=(0, (3, 2)))
        axes.text(1.95 * x, y * 1.9**-order, f"order {order}", color="#777777", fontsize=7, va="center")


if __name__ == "__main__":
    main()
