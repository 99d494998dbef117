"""The benchmark of the operations and the search for their best cuts check themselves without a device."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "200", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-W", "ignore", str(BENCHMARKS / script), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_check_compares_every_operation(tmp_path: Path) -> None:
    done = run("operations.py", "--check", "--output", str(tmp_path / "operations.json"))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    for name in (
        "attention",
        "group_norm_silu",
        "layer_norm",
        "add_layer_norm",
        "geglu",
        "guided_step",
        "timestep_embedding",
    ):
        assert f"│ {name} " in done.stdout
    assert not list(tmp_path.iterdir()), "no times, no result file"


@pytest.mark.slow
def test_check_tunes_every_operation_and_reads_what_it_wrote(tmp_path: Path) -> None:
    done = run("tune.py", "--check", "--output", str(tmp_path / "tune.json"), "--folder", str(tmp_path))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    for name in ("attention", "group_norm_silu", "layer_norm", "add_layer_norm", "geglu"):
        assert f"{name}, tiny" in done.stdout
    assert not list(tmp_path.iterdir()), "no device, no table"
