"""The GPU benchmarks without a GPU: they refuse in one sentence, their harness is right, their report is made of files."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import unrolled

BENCHMARKS = Path(unrolled.__file__).parent / "benchmarks"


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(unrolled.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    script, *rest = command
    line = [sys.executable, str(BENCHMARKS / script), *map(str, rest)]
    return subprocess.run(line, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card, and they would measure it")
@pytest.mark.parametrize("script", ["unet_step.py", "pipelines.py", "operations.py", "tune.py"])
def test_without_a_card_they_refuse_in_one_sentence(script: str) -> None:
    done = run(script)
    assert done.returncode == 1
    assert done.stderr.strip() == (
        "This benchmark measures a CUDA card and there is none here: use --check to try it on the CPU."
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "script", [["unet_step.py", "--compile"], ["unet_step.py", "--scaling"], ["pipelines.py", "--compile"]], ids=str
)
def test_the_harness(script: list[str]) -> None:
    done = run(*script, "--check")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ours graph, sdpa" in done.stdout


def test_every_result_says_which_attention_ran() -> None:
    script = "import torch; from timing import environment; print(environment(torch.device('cpu'))['backends']['sdpa'])"
    done = subprocess.run([sys.executable, "-c", script], cwd=BENCHMARKS, capture_output=True, text=True, check=False)
    assert re.search(r"in bfloat16 \w+; the default", done.stdout), done.stderr


WRONG = """
from types import SimpleNamespace
import json, torch, pipelines

x = torch.ones(1, 4, 2, 2)
pipelines.in_our_loop = lambda *_: lambda: (x, None)
job = SimpleNamespace(device=torch.device("cpu"), steps=3, name="x2", side=2, structure=pipelines.STRUCTURES["x2"])
runs = {"diffusers networks in our loop": x, "near": 1.01 * x, "far": 2 * x, "not finite": x / 0}
chosen = {name: (lambda out=out: lambda: (out, None)) for name, out in runs.items()}
chosen["broken"] = lambda: {}["a tile"]
rows = pipelines.measure(job, chosen, 0.0)["sides"]
print(json.dumps({name: row.get("refused", "timed" if "ms" in row else "neither") for name, row in rows.items()}))
"""


def test_a_run_that_is_wrong_is_not_timed() -> None:
    done = subprocess.run([sys.executable, "-c", WRONG], cwd=BENCHMARKS, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "diffusers networks in our loop": "timed",
        "near": "timed",
        "far": "1.0e+00 away from diffusers",
        "not finite": "what comes out is not finite",
        "broken": "'a tile'",
    }


def step_result(refused: bool = False) -> dict[str, Any]:
    side: dict[str, Any] = {"first_call_s": 1.5, "error_against_fp32": 0.004, "peak_gib": 9.5}
    side |= {"launches": {"on_device": 2000, "from_host": 1990}, "ms": {"q0.2": 9.0, "q0.5": 10.0, "q0.8": 11.0}}
    ours = side | {"ms": {"q0.2": 4.0, "q0.5": 5.0, "q0.8": 6.0}, "of_floor": 0.5}
    job = {
        "structure": "sd-1.5", "pixels": 512, "batch": 1, "dtype": "bfloat16", "floor_ms": 2.5,
        "sides": {"diffusers eager": side | {"of_floor": 0.25}, "ours graph": {"refused": "no"} if refused else ours},
    }  # fmt: skip
    where = {
        "card": "Card 9", "multiprocessors": 7, "memory_gib": 1.0, "cuda": "13.0", "when": "then",
        "versions": {"torch": "2.11", "unrolled": None}, "clocks": {"driver_version": "580", "clocks.sm": "1 MHz"},
    }  # fmt: skip
    return {"environment": where, "jobs": [job], "left_out": ["x2"]}


def test_the_report_is_made_of_result_files(tmp_path: Path) -> None:
    (tmp_path / "unet_step.json").write_text(json.dumps(step_result()))
    (tmp_path / "scaling.json").write_text(json.dumps(step_result(refused=True)))
    done = run("report.py", "--results", tmp_path, "--output", tmp_path / "out" / "page.md")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "out" / "page.md").read_text()
    assert "| ours graph | 5.00 | 4.00–6.00 | 2.00 | 50% | 4.0e-03 | 9.5 | 1.5 | 2000 | 1990 |" in page
    assert "On one Card 9 (7 multiprocessors, 1.0 GiB), driver 580, CUDA 13.0, torch 2.11; clocks at the start 1 MHz" in page
    assert "Not measured, for want of time: x2." in page
    assert "Not measured yet: `python benchmarks/pipelines.py`." in page
    pictures = re.findall(r"\]\((.*?)\)", page)
    assert pictures == ["page/unet_step.png", "page/scaling.png"]
    assert all((tmp_path / "out" / picture).stat().st_size > 1000 for picture in pictures)


def test_the_report_of_operations(tmp_path: Path) -> None:
    row: dict[str, Any] = {
        "operation": "attention",
        "case": "SDXL",
        "ms": {"q0.2": 0.1, "q0.5": 0.2, "q0.8": 0.3},
        "of_floor": 0.5,
    }
    row |= {"tflops": 400.0, "error": 0.002, "sdpa_chooses": "cudnn_attention"}
    found = step_result()["environment"] | {"dtype": "bfloat16"}
    rows = [row | {"side": "triton"}, row | {"side": "sdpa"}, {"operation": "attention", "case": "VAE", "side": "xformers"}]
    (tmp_path / "operations.json").write_text(json.dumps(found | {"rows": rows}))
    case: dict[str, Any] = {"operation": "attention", "case": "SDXL", "best": "triton (128, 64, 4, 3)", "sides": {}}
    cases = [case | {"again_ms": {"triton (128, 64, 4, 3)": 0.1, "sdpa": 0.2}}]
    cases += [case | {"case": "VAE", "best": None, "again_ms": {"sdpa": 0.3}}]
    (tmp_path / "tune.json").write_text(json.dumps(found | {"cases": cases, "left_out": ["geglu, SDXL"]}))
    done = run("report.py", "--results", tmp_path, "--output", tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text()
    assert re.findall(r"\]\((.*?)\)", page) == ["page/operations.png"]
    assert (tmp_path / "page" / "operations.png").stat().st_size > 1000, done.stderr
    assert "| SDXL: triton | 200.0 | 100.0–300.0 | 400 TFLOP/s | 50% | 2.0e-03 |" in page
    assert "| SDXL: sdpa (cudnn_attention) | 200.0 |" in page
    assert "| VAE: xformers | not measured |" in page
    assert "| attention, SDXL | (128, 64, 4, 3) | 100.0 | 200.0 |  |  |" in page
    assert "| attention, VAE |  | none was right | 300.0 |  |  |" in page
    assert "Not measured, for want of time: geglu, SDXL." in page


def test_the_report_of_steps(tmp_path: Path) -> None:
    found = step_result()
    (job,) = found["jobs"]
    for side in job["sides"].values():
        side["first_run_s"] = side.pop("first_call_s")
    found["jobs"] = [job | {"steps": steps} for steps in (50, 10)]
    (tmp_path / "steps.json").write_text(json.dumps(found))
    run("report.py", "--results", tmp_path, "--output", tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text()
    assert "| sd-1.5, 512 px, 50 steps: ours graph | 5 | 4–6 |" in page
    assert (tmp_path / "page" / "steps.png").stat().st_size > 1000


def test_a_side_that_could_not_run_is_a_line_that_says_why(tmp_path: Path) -> None:
    (tmp_path / "unet_step.json").write_text(json.dumps(step_result(refused=True)))
    page = run("report.py", "--results", tmp_path).stdout
    assert "| ours graph | no |" in page


@pytest.mark.parametrize("file", sorted((BENCHMARKS / "results").glob("cpu_unet.json")), ids=lambda f: f.name)
def test_the_results_there_are_can_be_read(file: Path) -> None:
    page = run("report.py").stdout
    found = json.loads(file.read_text())
    assert all(f"| {name} |" in page for name in found["sides"])
