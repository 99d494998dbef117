"""Our kernels compile for cards that are not here, with room to run: what Triton's interpreter lets pass, this does not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

# Bytes of shared memory that one block may have.
ROOM = {90: 232_448, 89: 101_376}


@pytest.mark.slow
@pytest.mark.parametrize("capability", ROOM)
def test_kernels_fit_the_card(capability: int, tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    sizes = ("40", "64", "80", "160", "512") if capability == 90 else ("64", "160", "512")
    command = [
        sys.executable,
        "-W",
        "ignore",
        str(Path(__file__).with_name("compile_for_a_card.py")),
        str(capability),
        *sizes,
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr[-3000:]
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert {kernel["kernel"] for kernel in kernels} == {
        "_forward", "_of_keys", "_of_queries", "_maps", "_statistics", "_fold", "_apply", "_norm", "_geglu", "_step",
        "_embed",
    }  # fmt: skip
    for kernel in kernels:
        assert kernel["shared"] <= ROOM[capability], kernel
        if kernel["kernel"] == "_forward" and ("bfloat16" in kernel["case"] or "bias" in kernel["case"]):
            assert kernel.get("spilled", 0) <= 256, kernel
            assert kernel["wgmma"] == (capability == 90), "Hopper's matrix instructions, as only it has them"
