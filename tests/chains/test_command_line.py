"""The command line as its users meet it: one sentence for bad input, documented exit codes, no traceback."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from unrolled import __main__ as command


def unrolled(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["unrolled", *map(str, arguments)])
    try:
        command.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_run_with_every_option(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--prompt", "red apple", "--seed", "3", "--steps", "2", "--batch", "2", "--cfg-scale", "4", "--device", "cpu"]
    code = unrolled(
        monkeypatch,
        "run",
        "text-to-image",
        *options,
        "--dtype",
        "float32",
        "--output",
        str(tmp_path),
        "--set",
        "solver=ddim",
    )
    assert code == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "output_000.png"), str(tmp_path / "output_001.png")]
    stage = json.loads((tmp_path / "output_001.json").read_text())["chain"]["stages"][0]
    assert (stage["prompt"], stage["steps"], stage["solver"], stage["guidance_scale"]) == ("red apple", 2, "ddim", 4)
    assert "Seed: 4" in Image.open(tmp_path / "output_001.png").info["parameters"]


def test_seed_minus_one_draws_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for _ in range(2):
        assert unrolled(monkeypatch, "run", "text-to-image", "--seed", "-1", "--steps", "1", "--output", str(tmp_path)) == 0
    seeds = [json.loads(p.read_text())["chain"]["seed"] for p in sorted(tmp_path.glob("*.json"))]
    assert seeds[0] != seeds[1]


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["run", "nowhere"], 2, "There is no chain file nowhere"),
        (["run", "text-to-image", "--set", "nobody.x=1"], 2, "names no stage of this chain"),
        (["run", "text-to-image", "--set", "model=nothing"], 3, "There is no model 'nothing'"),
        (["run", "text-to-image", "--models", "/nowhere"], 3, "/nowhere holds no model folder sd-1.5"),
        (["run", "text-to-image", "--dtype", "int4"], 2, "There is no dtype 'int4': use float32, float16, bfloat16"),
        (["run", "text-to-image", "--device", "abacus"], 2, "Device 'abacus' cannot be used here"),
        (["plan", "text-to-image", "--steps", "5000"], 2, "Steps go from 1 to 1000"),
        (["run", "text-to-image", "--steps", "1", "--output", "/proc/nowhere"], 7, "choose another folder with --output"),
    ],
)
def test_bad_input_is_one_sentence(
    arguments: list[str], code: int, sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert unrolled(monkeypatch, *arguments) == code
    printed = capsys.readouterr().err
    assert sentence in printed
    assert "Traceback" not in printed
    assert len(printed.strip().splitlines()) == 1


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt, 130), (MemoryError, 6)])
def test_interrupts(
    error: type[BaseException],
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    def stop(*_: object) -> None:
        raise error

    monkeypatch.setattr("unrolled.chains.run.Runner.run", stop)
    assert unrolled(monkeypatch, "run", "text-to-image", "--output", str(tmp_path)) == code
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    assert "Interrupted before there was anything to keep" in printed or "Out of memory" in printed


def test_plan_models_doctor(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert unrolled(monkeypatch, "plan", "image-to-image") == 0
    assert "first" in capsys.readouterr().out
    assert unrolled(monkeypatch, "models") == 0
    assert "sd-1.5-inpainting" in capsys.readouterr().out
    assert unrolled(monkeypatch, "doctor") == 0
    printed = capsys.readouterr().out
    assert "torch" in printed
    assert "attention: triton" in printed


def test_the_console_script_from_another_folder(tmp_path: Path) -> None:
    script = Path(sys.executable).parent / "unrolled"
    done = subprocess.run([script, "plan", "text-to-image"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "text-to-image" in done.stdout


def test_the_same_chain_from_the_hubs_cache(tiny_folder: Path, tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--stable-diffusion-v1-5--stable-diffusion-v1-5"
    shutil.copytree(tiny_folder, repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    script = Path(sys.executable).parent / "unrolled"
    done = subprocess.run(
        [script, "run", "text-to-image", "--models", "hub", "--steps", "2", "--output", tmp_path / "out"],
        env=os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert Image.open(tmp_path / "out" / "output_000.png").size == (64, 64)
