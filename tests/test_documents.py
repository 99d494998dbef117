"""What the documents show works as it stands."""

import re
from itertools import pairwise
from pathlib import Path

import pytest
import unrolled
from pydantic import BaseModel
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


def test_the_solver_of_ones_own_runs_and_its_error_halves_with_its_steps(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "solvers.md").read_text(), re.S):
        exec(block, names)
    errors = [float(line.split()[1]) for line in capsys.readouterr().out.splitlines()]
    assert len(errors) == 3
    assert all(1.7 < more / fewer < 2.5 for more, fewer in pairwise(errors))


def test_the_readmes_commands_are_there() -> None:
    text = (ROOT / "README.md").read_text()
    assert "\n    pip install -e . && unrolled run chains/text-to-image.toml" in text
    assert '\n    pip install -e ".[test]" && pytest\n' in text


@pytest.mark.parametrize("kind", [Denoising, TextToImage, ImageToImage, Inpaint, Upscale])
def test_every_key_of_a_stage_is_documented(kind: type[Denoising]) -> None:
    text = (ROOT / "docs" / "chains.md").read_text()
    assert [name for name in kind.model_fields if f"`{name}`" not in text] == []


@pytest.mark.parametrize("kind", [PriorOptions, SizeConditioning])
def test_every_key_of_a_table_is_documented(kind: type[BaseModel]) -> None:
    text = (ROOT / "docs" / "chains.md").read_text()
    assert [name for name in kind.model_fields if f"{name} = " not in text] == []


def test_links_lead_somewhere() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "miniatures" / "README.md"):
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if "://" not in link:
                assert (page.parent / link).exists(), f"{page.name} links to {link}"
