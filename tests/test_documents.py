"""What the documents show works as it stands."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import unrolled
from PIL import Image
from pydantic import BaseModel
from safetensors.torch import save_file
from unrolled.chains.adapters import LoraOptions
from unrolled.chains.chain import Denoising, ImageToImage, Inpaint, PriorOptions, SizeConditioning, TextToImage, Upscale
from unrolled.core.errors import Note
from unrolled.kernels.fast import optimise
from unrolled.kernels.networks import set_attention

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


def test_a_fork_in_a_loop_of_ones_own() -> None:
    names: dict[str, Any] = {}
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "runs.md").read_text(), re.S)
    exec(block, names)
    assert [point.step for point in names["points"]] == list(range(1, 21))
    assert names["step"].index == 19, "it goes on in the count of the whole run"
    castle, house = (np.asarray(picture, float) for picture in names["pictures"])
    assert np.abs(castle - house).mean() > 5


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


def test_the_python_of_kernels_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "kernels.md").read_text()
    fast, tiles = re.findall(r"```python\n(.*?)```", text, re.S)
    names: dict[str, Any] = {}
    exec(fast.replace("steps=30", "steps=4"), names)
    pictures = [np.asarray(Image.open(tmp_path / f"{name}.png"), dtype=int) for name in ("castle", "castle-captured")]
    assert abs(pictures[0] - pictures[1]).max() <= 1
    pytest.importorskip("triton")
    done = subprocess.run([sys.executable, "-c", tiles], capture_output=True, text=True, check=False)
    sizes, errors = zip(*(line.split() for line in done.stdout.splitlines()), strict=True)
    assert sizes == ("16", "32", "64"), done.stderr
    assert all(0 < float(error) < 1e-5 for error in errors)


def test_the_note_of_kernels_is_the_one_that_is_seen() -> None:
    sd = unrolled.load("sd-1.5", device="cpu")
    cond, latents = unrolled.encode_text(sd, "a castle"), unrolled.noise(sd, sd.schedule(4), seeds=[0])
    with optimise(sd.unet), torch.no_grad():
        set_attention(sd.unet, "reference")
        with pytest.warns(Note) as said:
            sd.denoiser(latents.x, 3.0, 500.0, cond)
    text = (ROOT / "docs" / "kernels.md").read_text()
    (quote,) = re.findall(r"^(?:> .*\n)+", text, re.M)
    assert quote.replace("\n", " ").replace("> ", "").strip() in {str(note.message) for note in said}


def test_the_weighted_prompt_is_encoded() -> None:
    text = (ROOT / "docs" / "adapters.md").read_text()
    (block,) = (block for block in re.findall(r"```python\n(.*?)```", text, re.S) if "weights=True" in block)
    names: dict[str, Any] = {"sd": unrolled.load("sd-1.5", device="cpu"), "encode_text": unrolled.encode_text}
    exec(block, names)
    plain = unrolled.encode_text(names["sd"], "a castle at night, people").context
    assert plain is not None
    assert not torch.equal(names["cond"].context, plain)


def test_the_costs_of_steps_are_those_measured() -> None:
    measured = json.loads((ROOT / "benchmarks" / "results" / "step_cost.json").read_text())["solvers"]
    text = (ROOT / "docs" / "solvers.md").read_text()
    for name, row in measured.items():
        ours, theirs, ratio = (row[key] for key in ("us_per_evaluation", "us_per_evaluation_diffusers", "ratio"))
        assert f"| {name} | {ours:.0f} | {theirs:.0f} | {ratio:.2f} |" in text


def test_the_readmes_speed_is_that_measured() -> None:
    sides = json.loads((ROOT / "benchmarks" / "results" / "cpu_unet.json").read_text())["sides"]
    seconds = {name: side["processor_s"] for name, side in sides.items()}
    plain, best = seconds["diffusers fp32"], min(s for name, s in seconds.items() if name.startswith("diffusers"))
    assert best == seconds["diffusers bf16 NHWC"]
    wanted = (
        f"{plain / seconds['ours bf16']:.1f} times as fast as diffusers' float32 and {best / seconds['ours bf16']:.1f} times"
    )
    assert wanted in " ".join((ROOT / "README.md").read_text().split())


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
    folders = (".", "miniatures", "examples", "notebooks")
    pages = (*(ROOT / "docs").glob("*.md"), *(ROOT / folder / "README.md" for folder in folders))
    for page in pages:
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if "://" not in link:
                assert (page.parent / link).exists(), f"{page.name} links to {link}"
