"""Every script in docs/chains paints what the packaged chain of its name paints, bit for bit."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest
import unrolled
from PIL import Image
from unrolled.chains.read import read_chain
from unrolled.chains.run import run
from unrolled.core.loading import Shelf

SCRIPTS = sorted((Path(unrolled.__file__).parent / "docs" / "chains").glob("*.py"))


def test_there_are_scripts() -> None:
    assert len(SCRIPTS) == 8


@pytest.mark.parametrize("script", SCRIPTS, ids=[script.stem for script in SCRIPTS])
def test_a_script_equals_its_chain(script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)  # the scripts leave the device open
    name = script.stem.replace("_", "-")
    runpy.run_path(str(script), run_name="__main__")
    written = Image.open(tmp_path / f"{name}.png")
    picture = run(read_chain(name), Shelf(device="cpu")).pictures[0]
    assert written.size == picture.size
    assert np.array_equal(np.asarray(written), np.asarray(picture))
