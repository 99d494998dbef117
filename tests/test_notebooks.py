"""The notebooks run from the first cell to the last, each in a kernel of its own, and print what is stored in them."""

import base64
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
import unrolled
from nbclient import NotebookClient

FOLDER = Path(unrolled.__file__).parent / "notebooks"
NAMES = ["1-stages", "2-loop", "3-samplers", "4-handoff", "5-attention"]
QUICK = "3-samplers"  # needs no network; the others load one in a new process, some twenty seconds each
DECIMAL = re.compile(r"(\d+\.\d+)")


def read(name: str) -> Any:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)  # type: ignore[no-untyped-call]


def outputs(notebook: Any) -> list[Any]:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def text(output: Any) -> str:
    """What is to be read of an output; of a picture that it is one."""
    if output.output_type == "stream":
        return f"{output.name}: {output.text}"
    return f"{sorted(output.data)}: {output.data['text/plain']}"


def same(new: str, stored: str) -> bool:
    """Equal, but for rounding of decimals: 2 %, or one in the last digit."""
    parts = list(zip(DECIMAL.split(new), DECIMAL.split(stored), strict=False))
    return DECIMAL.sub("#", new) == DECIMAL.sub("#", stored) and all(
        abs(float(a) - float(b)) <= max(0.02 * float(b), 1.01 * 10.0 ** -len(b.split(".")[1])) for a, b in parts[1::2]
    )


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name == QUICK else pytest.mark.slow) for name in NAMES])
def test_a_notebook_runs_and_prints_what_is_stored(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "5-attention":
        pytest.importorskip("triton", reason="the notebook runs a Triton kernel in its interpreter")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # as the stored outputs were made
    monkeypatch.setenv("PYTHONWARNINGS", "ignore:IProgress not found")  # tqdm misses ipywidgets, which Jupyter brings
    notebook, stored = read(name), read(name)
    where = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, kernel_name="python3", timeout=300, coalesce_streams=True, resources=where).execute()
    for now, before in zip(notebook.cells, stored.cells, strict=True):
        if now.cell_type == "code":
            told, expected = [text(o) for o in now.outputs], [text(o) for o in before.outputs]
            assert len(told) == len(expected), now.source
            assert all(map(same, told, expected)), f"{now.source}\n--- prints\n{told}\n--- stored\n{expected}"


def test_what_is_printed_may_differ_by_rounding_and_nothing_else() -> None:
    assert same("error 0.0231 at 20", "error 0.0230 at 20")
    assert same("order 0.000", "order 0.001")
    assert not same("error 0.026", "error 0.023")
    assert not same("33 rows", "34 rows")
    assert not same("True", "False")
    assert not same("0.5", "0.5 0.5")


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_stored_as_it_ran_once_from_top_to_bottom(name: str) -> None:
    notebook = read(name)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    assert [o.output_type for o in outputs(notebook) if o.output_type == "error"] == []
    assert [o.text for o in outputs(notebook) if o.get("name") == "stderr"] == []


@pytest.mark.parametrize("name", NAMES)
def test_what_is_stored_is_small_and_of_no_machine(name: str) -> None:
    assert (FOLDER / f"{name}.ipynb").stat().st_size < 400_000
    pictures = [o.data["image/png"] for o in outputs(read(name)) if "image/png" in o.get("data", {})]
    assert pictures
    assert all(len(base64.b64decode(picture)) <= 60_000 for picture in pictures)
    told = "\n".join(text(o) for o in outputs(read(name)))
    paths = re.findall(r"(?:/(?:home|root|tmp|usr|var|opt|mnt|work|Users)\b|[A-Z]:\\|site-packages|\bcuda)[^\s]*", told)
    assert paths == []


def test_the_table_of_contents_names_all_in_order() -> None:
    contents = (FOLDER / "README.md").read_text()
    assert re.findall(r"\((\d-\w+)\.ipynb\)", contents) == NAMES == sorted(p.stem for p in FOLDER.glob("*.ipynb"))


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str) -> None:
    words = "\n".join(cell.source for cell in read(name).cells if cell.cell_type == "markdown")
    for link in re.findall(r"\]\(([^)#]+)\)", words):
        assert "://" in link or (FOLDER / link).exists(), link
