"""benchmarks/all_gpu.sh with a Python that only writes down what it is asked for."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import unrolled

BENCHMARKS = Path(unrolled.__file__).parent / "benchmarks"
STUB = """#!/bin/sh
[ "$1" = -c ] && exec {python} "$@"
echo "$PYTHONPATH | $*" >> {log}
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "any name" / "benchmarks"
    folder.mkdir(parents=True)
    shutil.copy(BENCHMARKS / "all_gpu.sh", folder)
    return folder.parent


def run(checkout: Path, *arguments: str) -> tuple[str, list[str]]:
    """What it says, and the commands that it ran."""
    log, stub = checkout / "log", checkout / "python"
    stub.write_text(STUB.format(python=sys.executable, log=f"'{log}'"))
    stub.chmod(0o755)
    script = checkout / "benchmarks" / "all_gpu.sh"
    environment = os.environ | {"PYTHON": str(stub)}
    done = subprocess.run(["bash", script, *arguments], env=environment, capture_output=True, text=True, check=True)
    return done.stdout, log.read_text().splitlines()


def test_all_parts_take_less_than_nine_minutes(checkout: Path) -> None:
    said, ran = run(checkout, str(checkout / "out"))
    assert sum(int(limit) for limit in re.findall(r"at most (\d+) s", said)) < 9 * 60
    scripts = [re.findall(r"benchmarks/(\w+\.py)", line)[0] for line in ran]
    assert scripts == ["operations.py", "unet_step.py", "pipelines.py", "pipelines.py", "unet_step.py"]
    assert all((BENCHMARKS / script).is_file() for script in scripts)
    assert all(f"--output {checkout / 'out'}/" in line for line in ran)


def test_tuning_is_a_run_of_its_own(checkout: Path) -> None:
    made = checkout / "kernels" / "measured" / "card.json"
    made.parent.mkdir(parents=True)
    made.write_text("{}")
    said, ran = run(checkout, "--tune", str(checkout / "out"))
    assert len(ran) == 1
    assert f"tune.py --limit 300 --output {checkout / 'out' / 'tune.json'}" in ran[0]
    assert "at most 345 s" in said
    assert (checkout / "out" / "measured" / "card.json").exists()


def test_missing_packages_come_from_the_wheels_and_no_others(checkout: Path) -> None:
    wheels = checkout / "wheels"
    wheels.mkdir()
    for name in ("typing_extensions-9.9-py3-none-any.whl", "no_such_package-1.0-py3-none-any.whl"):
        (wheels / name).touch()
    _, ran = run(checkout)
    assert "-m pip install -q --no-index --find-links" in ran[0]
    assert ran[0].endswith(f" {wheels}/no_such_package-1.0-py3-none-any.whl")
    assert "typing_extensions" not in ran[0]
    assert all(line.split(" | ")[0].endswith("/site") for line in ran[1:])


def test_with_all_packages_there_nothing_is_installed(checkout: Path) -> None:
    (checkout / "wheels").mkdir()
    (checkout / "wheels" / "typing_extensions-9.9-py3-none-any.whl").touch()
    assert not any("pip install" in line for line in run(checkout)[1])
