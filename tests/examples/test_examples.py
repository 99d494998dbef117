"""What every example promises: its form, a change of a screen at most on public seams, the committed picture, a row."""

from __future__ import annotations

import ast
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import unrolled
from PIL import Image

FOLDER = Path(unrolled.__file__).parent / "examples"
EXAMPLES = sorted(FOLDER.glob("*.py"))
MOST = 25

each = pytest.mark.parametrize("example", EXAMPLES, ids=[example.stem for example in EXAMPLES])


def lines_of_the_change(source: str) -> int:
    """The lines of all functions but ``main``, without docstrings, comments and blank lines."""
    lines, counted = source.splitlines(), set[int]()
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name != "main":
            counted |= set(range(node.lineno, (node.end_lineno or 0) + 1))
            for inner in ast.walk(node):
                if isinstance(inner, ast.Expr) and isinstance(inner.value, ast.Constant):
                    counted -= set(range(inner.lineno, (inner.end_lineno or 0) + 1))
    return sum(bool(re.match(r"\s*[^\s#]", lines[number - 1])) for number in counted)


def private(source: str) -> list[str]:
    """What a script takes from the library that is not public: names with an underscore, and names that nobody exports."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == "unrolled":
            found += [name.name for name in node.names if name.name not in unrolled.__all__]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("unrolled."):
            path = [*(node.module or "").split("."), *(name.name for name in node.names)]
            found += [name for name in path if name.startswith("_")]
        elif isinstance(node, ast.Attribute) and re.match(r"_(?!_)", node.attr):
            found.append(node.attr)
    return found


def test_the_tests_see_what_they_look_for() -> None:
    source = '"""A."""\nfrom unrolled import load, told\nfrom unrolled.core._x import y\ndef f(a):\n    """B.\n\n    C"""\n'
    source += "    # why\n    a._b = a.__dict__\n\n    return 1\n\ndef main():\n    pass\n"
    assert lines_of_the_change(source) == 3
    assert private(source) == ["told", "_x", "_b"]


def test_there_are_more_than_twelve() -> None:
    assert len(EXAMPLES) > 12


@each
def test_it_says_whose_it_is_and_what_is_to_be_seen(example: Path) -> None:
    text = ast.get_docstring(ast.parse(example.read_text())) or ""
    assert re.search(r"arXiv:\d{4}\.\d{5}", text)
    assert "The seam" in text
    assert "The picture: " in text
    assert f"[`{example.stem}.py`]({example.name})" in (FOLDER / "README.md").read_text()


@each
def test_it_is_a_small_change_on_public_seams(example: Path) -> None:
    assert lines_of_the_change(example.read_text()) <= MOST
    assert private(example.read_text()) == []


@each
def test_its_picture_is_small_and_shown(example: Path) -> None:
    picture = FOLDER / "pictures" / f"{example.stem}.webp"
    assert picture.stat().st_size <= 40_000
    assert f"](pictures/{picture.name})" in (FOLDER / "README.md").read_text()


@pytest.mark.slow
@each
def test_it_paints_the_committed_picture(example: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)  # the scripts leave the device open
    monkeypatch.setattr("sys.argv", [str(example), str(tmp_path)])
    runpy.run_path(str(example), run_name="__main__")
    (painted,) = (np.asarray(Image.open(path).convert("RGB"), dtype=float) for path in tmp_path.iterdir())
    committed = np.asarray(Image.open(FOLDER / "pictures" / f"{example.stem}.webp").convert("RGB"), dtype=float)
    assert painted.shape == committed.shape
    assert np.abs(painted - committed).mean() < 1.0  # of 255: another processor rounds otherwise
