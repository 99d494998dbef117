"""What the documents show works as it stands."""

import json
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import unrolled
from pydantic import BaseModel
from safetensors.torch import save_file
from unrolled.chains.adapters import LoraOptions
from unrolled.chains.chain import Denoising, ImageToImage, Inpaint, PriorOptions, SizeConditioning, TextToImage, Upscale

ROOT = Path(unrolled.__file__).parent
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)


def test_the_readmes_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first, resume, solver, split = BLOCKS
    names: dict[str, object] = {}
    exec(first.replace("steps=30", "steps=4"), names)
    assert (tmp_path / "castle.png").is_file()
    exec(resume, names)
    assert (tmp_path / "castle-later.png").is_file()
    exec(solver, names)
    exec(split.replace("steps=40", "steps=4"), {})
    assert (tmp_path / "dewdrop.png").is_file()
    model, cond = names["sd"], names["cond"]
    assert isinstance(model, unrolled.Model)
    schedule = model.schedule(4, "euler")
    denoiser = unrolled.conditioned(model.denoiser, cond)  # type: ignore[arg-type]
    start = unrolled.noise(model, schedule)
    own, ours = (unrolled.denoise(denoiser, start, schedule, s) for s in (names["euler"], unrolled.Euler()))  # type: ignore[arg-type]
    assert (own.x - ours.x).abs().max() < 1e-5


def test_the_solver_of_ones_own_runs_and_is_of_second_order(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {}
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "solvers.md").read_text(), re.S)
    exec(block, names)
    own, euler = zip(*(line.split()[1:] for line in capsys.readouterr().out.splitlines()), strict=True)
    assert [round(float(more) / float(fewer)) for more, fewer in pairwise(own)] == [4, 4]
    assert [round(float(more) / float(fewer)) for more, fewer in pairwise(euler)] == [2, 2]
    run = [names["mixture"], names["start"], names["schedule"]]
    ends = [unrolled.denoise(*run, solver).x for solver in (names["two_points"], unrolled.DPMpp2M())]  # type: ignore[arg-type, call-arg]
    assert (ends[0] - ends[1]).abs().max() < 1e-12


def test_the_adapters_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_lora: Callable[..., Any]) -> None:
    monkeypatch.chdir(tmp_path)
    sd = unrolled.load("sd-1.5", device="cpu")
    for name in ("style", "detail"):
        write_lora(tmp_path / f"{name}.safetensors", sd, "kohya", parts=("unet", "text_encoder"), layers="attn")
    save_file({"<its-own>": torch.zeros(2, sd.text_encoder.config.hidden_size)}, tmp_path / "toy.safetensors")
    text = (ROOT / "docs" / "adapters.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    lora, word = (block for block in blocks if "lora(" in block or "textual_inversion(" in block)
    exec(lora.replace("steps=20", "steps=2"), {})
    assert (tmp_path / "castle.png").is_file()
    exec(word, {})


def test_the_costs_of_steps_are_those_measured() -> None:
    measured = json.loads((ROOT / "benchmarks" / "results" / "step_cost.json").read_text())["solvers"]
    text = (ROOT / "docs" / "solvers.md").read_text()
    for name, row in measured.items():
        ours, theirs, ratio = (row[key] for key in ("us_per_evaluation", "us_per_evaluation_diffusers", "ratio"))
        assert f"| {name} | {ours:.0f} | {theirs:.0f} | {ratio:.2f} |" in text


def test_nothing_is_left_to_be_filled_in() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        assert not re.search(r"^[A-Z_]{6,}$", page.read_text(), re.M), page.name


def test_the_readmes_commands_are_there() -> None:
    text = (ROOT / "README.md").read_text()
    assert "\n    pip install -e . && unrolled run chains/text-to-image.toml" in text
    assert '\n    pip install -e ".[test]" && pytest\n' in text


@pytest.mark.parametrize("kind", [Denoising, TextToImage, ImageToImage, Inpaint, Upscale])
def test_every_key_of_a_stage_is_documented(kind: type[Denoising]) -> None:
    text = (ROOT / "docs" / "chains.md").read_text()
    assert [name for name in kind.model_fields if f"`{name}`" not in text] == []


@pytest.mark.parametrize("kind", [LoraOptions, PriorOptions, SizeConditioning])
def test_every_key_of_a_table_is_documented(kind: type[BaseModel]) -> None:
    text = (ROOT / "docs" / "chains.md").read_text()
    assert [name for name in kind.model_fields if f"{name} = " not in text] == []


def test_links_lead_somewhere() -> None:
    pages = (*(ROOT / "docs").glob("*.md"), *(ROOT / folder / "README.md" for folder in (".", "miniatures", "examples")))
    for page in pages:
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if "://" not in link:
                assert (page.parent / link).exists(), f"{page.name} links to {link}"
