"""A plan as it is shown: the tables and the curve in a terminal, the picture, and the command's switches."""

import io
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console
from unrolled import __main__ as command
from unrolled.chains.chain import Resize
from unrolled.chains.checks import Finding
from unrolled.chains.drawing import draw_plan, figure_of
from unrolled.chains.plan import StagePlan, plan
from unrolled.chains.read import packaged_chains, read_chain
from unrolled.chains.terminal import colours, curve, finding_list, stage_table, step_table
from unrolled.chains.trace import planned_steps
from unrolled.core.errors import BadInput
from unrolled.core.loading import Shelf


def planned(name: str, *overrides: str) -> list[StagePlan]:
    return plan(read_chain(name, overrides), Shelf(device="cpu"))


def printed(what: object, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(what)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


# --- in the terminal


@pytest.mark.parametrize("name", packaged_chains())
@pytest.mark.parametrize("width", [80, 120])
def test_the_table_breaks_no_name(name: str, width: int) -> None:
    plans = planned(name)
    text = printed(stage_table(plans), width)
    for item in plans:
        model = getattr(item.stage, "model", "")
        assert (item.stage.name in text, model in text) == (True, True)
        if item.run:
            assert item.run.schedule.origin in text
    assert all(len(line) <= width for line in text.splitlines())


def test_the_table_says_what_is_run() -> None:
    text = printed(stage_table(planned("image-to-upscaler-to-super-resolution", "changed.repeat=3", "x2.solver=heun")), 120)
    assert "15 of 25, 3 times" in text
    assert "12, 23 calls" in text
    assert "sigma 2.28 → 0" in text
    assert "512x512" in text
    assert "MiB resident" in text
    assert "layer by layer" in printed(stage_table(plan(read_chain("text-to-image"), Shelf(device="cpu", offload="layer"))))


def bars(plans: list[StagePlan], width: int = 80) -> list[str]:
    """The columns of the curve, from the bottom up, without the axis."""
    lines = curve(plans, width).plain.splitlines()[:8]
    return ["".join(reversed(column)).rstrip() for column in zip(*(line[7:] for line in lines), strict=True)]


def test_the_curve_is_the_levels_evaluated() -> None:
    plans = planned("text-to-image", "solver=euler", "steps=12")
    heights = [sum(" ▁▂▃▄▅▆▇█".index(part) for part in column) for column in bars(plans)]
    assert len(heights) == 12 * 6, "as many columns for each evaluation"
    each = heights[::6]
    assert each[0] == 64
    assert each == sorted(each, reverse=True)
    levels = [step.sigma for step in planned_steps(plans)]
    low = math.log(levels[-1]) - 0.08 * math.log(levels[0] / levels[-1])
    for height, level in zip(each, levels, strict=True):
        assert height == pytest.approx(64 * (math.log(level) - low) / (math.log(levels[0]) - low), abs=0.5)


def test_stages_are_apart_but_for_noisy_latents() -> None:
    assert "" not in bars(planned("base-to-refiner"))
    assert bars(planned("image-to-image")).count("") == 1
    assert bars(planned("iterated-style-transfer")).count("") == 5


@pytest.mark.parametrize("overrides", [(), ("steps=300",), ("solver=heun",), ("steps=7",)], ids=str)
@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_curve_keeps_within_its_width(width: int, overrides: tuple[str, ...]) -> None:
    for name in packaged_chains():
        lines = curve(planned(name, *overrides), width).plain.splitlines()
        assert max(len(line.rstrip()) for line in lines) <= width
        assert len(lines) == 10


def test_the_curve_names_its_stages_and_levels() -> None:
    text = curve(planned("image-to-upscaler-to-super-resolution"))
    assert all(name in text.plain.splitlines()[-2] for name in ("changed", "x2", "x4"))
    assert text.plain.splitlines()[-1].strip() == "sigma at each of 39 evaluations"
    assert [line[:7].strip(" ┤│") for line in text.plain.splitlines()[:8] if "┤" in line[:7]] == ["10", "1", "0.1", "0.01"]
    styles = {str(span.style) for span in text.spans}
    assert set(colours(planned("image-to-upscaler-to-super-resolution")).values()) <= styles
    assert "refiner" in curve(planned("base-to-refiner", "refiner.steps=30")).plain, "there is room to the right of it"
    assert "ref… " in curve(planned("base-to-refiner", "steps=24"), 31).plain
    narrow = curve(planned("iterated-style-transfer", "strength=0.1"), 80).plain
    assert "1.0" in narrow or "0.2" in narrow, "the ends are labelled where no power of ten is in sight"
    assert curve(planned("text-to-image")[:0]).plain == ""


def test_the_table_of_steps_leaves_out_the_middle_of_long_stages() -> None:
    plans = planned("text-to-image", "solver=heun", "steps=30", "guidance_interval=[0, 3]", "guidance_scale=7.0")
    short, full = printed(step_table(plans), 120), printed(step_table(plans, every=True), 120)
    assert (short.count("⋮"), full.count("⋮")) == (2, 0)
    rows = [line.split() for line in full.splitlines() if "text-to-image" in line]
    assert [row[0] for row in rows] == [str(i) for i in range(30)]
    first = planned_steps(plans)[0]
    high, low = f"{first.sigma:.4g}", f"{first.sigma_next:.4g}"
    assert rows[0] == ["0", "0", "999", high, low, "7", "2", f"({low})", "text-to-image"]
    assert (rows[3][5], rows[-1][5:]) == ("off", ["off", "1", "text-to-image"])
    assert len([line for line in short.splitlines() if "text-to-image" in line]) == 10
    again = printed(step_table(planned("iterated-style-transfer"), every=True), 120)
    assert [line.split()[6] for line in again.splitlines() if "style, again (2)" in line][1:4] == ["1"] * 3, "remembered"


@pytest.mark.parametrize("overrides", [("solver=heun",), ("solver=pndm",), ("solver=dpm++2m",)], ids=str)
def test_the_table_of_steps_fits_80_columns(overrides: tuple[str, ...]) -> None:
    for name in packaged_chains():
        plans = planned(name, *overrides)
        lines = printed(step_table(plans)).splitlines()
        assert all(head in lines[1] for head in ("step", "timestep", "sigma", "next", "guidance", "history", "evaluations"))
        assert "…" not in "".join(lines)
        console = Console(width=80)
        assert console.measure(step_table(plans)).minimum <= 80
        for step in planned_steps(plans)[:3]:
            assert any(line.split()[:4] == [str(step.index), str(step.step), f"{step.timestep:.4g}", f"{step.sigma:.4g}"]
                       for line in lines)  # fmt: skip


def test_findings_are_listed_with_their_stage() -> None:
    text = printed(finding_list([Finding("note", "rest", "[b]another[/b]"), Finding("warning", "base", "one thing. " * 12)]))
    assert text.startswith("warning base: one thing.")
    assert "\n        one thing." in text, "wrapped under the sentence"
    assert "note    rest: [b]another[/b]" in text


# --- as a picture


@pytest.mark.parametrize("ending", [".png", ".svg", ".pdf", ".PNG"])
def test_a_picture_of_each_kind_is_the_same_each_time(ending: str, tmp_path: Path) -> None:
    plans = planned("base-to-refiner", "steps=10")
    one, two = (draw_plan(plans, tmp_path / f"{name}{ending}").read_bytes() for name in ("one", "two"))
    assert one == two
    if ending.lower() == ".png":
        assert Image.open(tmp_path / f"one{ending}").size[0] == 1600
    if ending == ".svg":
        handed, words = f"handed on at sigma {plans[0].end:.3g}", "sdxl-refiner · euler, leading · 2 of 10 steps"
        text = (tmp_path / "one.svg").read_text(encoding="utf-8")
        assert all(part in text for part in (">base<", ">refiner<", handed, words))


def test_the_picture_shows_every_evaluation_and_the_levels_left_out() -> None:
    plans = planned("base-to-refiner", "solver=heun", "steps=10", "refiner.steps=8")
    base, rest = plans
    assert base.run is not None
    assert rest.run is not None
    lines: list[Any] = list(figure_of(plans).axes[0].lines)
    dots = [(x, y) for line in lines if line.get_marker() == "o" for x, y in line.get_xydata()]
    levels = [level for step in planned_steps(plans) for level in step.evaluated]
    assert sorted(dots) == list(enumerate(levels))
    hollow = {x for line in lines if line.get_markerfacecolor() == "white" for x, _ in line.get_xydata()}
    assert hollow == {*range(1, 16, 2), 17}
    left = sorted(y for line in lines if line.get_marker() == "_" for _, y in line.get_xydata())
    whole = [s for s in rest.run.whole.sigmas if s > base.end]
    assert left == sorted([*whole, *(s for s in base.run.whole.sigmas if 0 < s < base.end)])
    shades = {line.get_color() for line in lines if line.get_marker() == "o"}
    assert shades == set(colours(plans).values())


@pytest.mark.parametrize("name", [*packaged_chains(), "narrow"])
def test_the_labels_of_a_picture_do_not_overlap(name: str) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    overrides = ("base.steps=90", "refiner.steps=30") if name == "narrow" else ()
    plans = planned("base-to-refiner" if name == "narrow" else name, *overrides)
    figure = figure_of(plans)
    canvas: Any = FigureCanvasAgg(figure)
    renderer = canvas.get_renderer()
    names = {item.stage.name for item in plans if item.run}
    boxes = [
        text.get_window_extent(renderer)
        for text in figure.axes[0].texts
        if text.get_text() in names or "steps" in text.get_text()
    ]
    assert len(boxes) == 2 * len(names)
    width, height = figure.canvas.get_width_height()
    for i, box in enumerate(boxes):
        assert box.x0 >= 0
        assert box.x1 <= width
        assert box.y1 <= height
        assert not any(box.shrunk(0.98, 0.8).overlaps(other.shrunk(0.98, 0.8)) for other in boxes[:i])


def test_pictures_that_cannot_be_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plans = planned("text-to-image")
    with pytest.raises(BadInput, match=r"plan\.jpeg is no name for a picture of a plan: use one that ends in \.png, \.svg"):
        draw_plan(plans, tmp_path / "plan.jpeg")
    resized = [StagePlan(Resize(name="big"), "pixels", (8, 8))]
    with pytest.raises(BadInput, match="nothing to draw: no stage of this chain denoises"):
        draw_plan(resized, tmp_path / "plan.png")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(BadInput, match=r'need matplotlib, which is not here: pip install "unrolled\[plot\]"'):
        draw_plan(plans, tmp_path / "plan.png")
    assert not list(tmp_path.iterdir())


# --- on the command line


def unrolled(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["unrolled", "plan", *arguments])
    try:
        command.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_the_documents_show_what_is_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The plan and the script of docs/chains.md."""
    text = (Path(command.__file__).parent / "docs" / "chains.md").read_text(encoding="utf-8")
    page = text[text.index("## The plan") : text.index("## The chains that come along")]
    shown = [line[4:].rstrip() for line in page.split("```python")[0].splitlines() if line.startswith("    ")]
    monkeypatch.setattr("unrolled.commands.plan.out", Console(width=80))
    settings = ["refiner.steps=30", "refiner.guidance_rescale=0.7", "refiner.guidance_scale=1.0"]
    assert unrolled(monkeypatch, "base-to-refiner", "--device", "cpu", *(p for s in settings for p in ("--set", s))) == 0
    printed = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert [line for line in printed if line] == [line for line in shown if line]
    monkeypatch.chdir(tmp_path)
    exec(page.split("```python\n")[1].split("```")[0], {})
    assert (tmp_path / "plan.png").is_file()


def test_a_terminal_that_knows_ascii_alone() -> None:
    script, said = Path(sys.executable).parent / "unrolled", os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([script, "plan", "text-to-image"], env=said, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "sigma at each of 25 evaluations" in done.stdout


def test_plan_at_a_glance(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    picture = tmp_path / "plan.png"
    switches = ["--batch", "2", "--device", "cpu", "--strict"]
    assert unrolled(monkeypatch, "base-to-refiner", *switches) == 0
    plain = capsys.readouterr().out
    assert plain.startswith("2 stages on cpu, seeds 0, 1\n")
    assert "sigma at each of 40 evaluations" in plain
    assert "timestep" not in plain
    assert unrolled(monkeypatch, "base-to-refiner", "--table", "--all", "--picture", str(picture)) == 0
    more = capsys.readouterr().out
    assert "timestep" in more
    assert "⋮" not in more
    assert more.splitlines()[-1] == str(picture)
    assert Image.open(picture).format == "PNG"


@pytest.mark.parametrize(
    ("overrides", "switches", "code", "said"),
    [
        (
            ["guidance_rescale=0.5", "guidance_scale=1.0"],
            [],
            0,
            "warning text-to-image: guidance_rescale = 0.5 has no effect",
        ),
        (["guidance_rescale=0.5", "guidance_scale=1.0"], ["--strict"], 1, "warning text-to-image: guidance_rescale"),
        (["guidance_scale=1.0"], ["--strict"], 0, "note text-to-image: guidance is off"),
        (["solver=ddpm", "scheduler.variance_type=learned_range"], [], 2, "error text-to-image: variance_type = "),
    ],
)
def test_what_is_found_decides_the_exit_code(
    overrides: list[str],
    switches: list[str],
    code: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = [part for override in overrides for part in ("--set", override)]
    assert unrolled(monkeypatch, "text-to-image", *settings, *switches) == code
    assert said in " ".join(capsys.readouterr().out.split())
