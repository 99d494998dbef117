"""The benchmark of our kernels: it checks itself without a device, and times nothing without one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "kernels.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "200", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-W", "ignore", str(SCRIPT), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_without_a_device_it_says_so_in_one_sentence(tmp_path: Path) -> None:
    done = run("--output", str(tmp_path / "kernels.json"))
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].endswith("there is none here: use --check to try it on the CPU.")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_check_compares_every_operation(tmp_path: Path) -> None:
    done = run("--check", "--output", str(tmp_path / "kernels.json"))
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
