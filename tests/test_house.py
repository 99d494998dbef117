"""The walls of the house: who may import whom, and that what is installed is what lies here."""

import ast
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
import unrolled
from PIL import Image

ROOT = Path(unrolled.__file__).parent
NOT_THE_PACKAGE = {"tests", "benchmarks", "docs", "examples", "notebooks", "build", "dist", "wheels"}

VALUES = {
    "conditioning", "control", "denoiser", "errors", "files", "guidance", "latents", "mixture", "noise", "prediction",
    "schedule", "solver",
}  # fmt: skip
LOADING = {
    "catalog", "checkpoint", "companions", "hub", "image_adapter", "loading", "lora", "memory", "model", "single_file",
    "source", "textual_inversion", "weights",
}  # fmt: skip

GROUND = {"values", "kernels"}
MAY_IMPORT = {
    "values": {"values"},
    "kernels": GROUND,
    "schedulers": {"values", "schedulers"},
    "loop": {"values", "loop"},
    "loading": {*GROUND, "schedulers", "loading"},
    "stages": {*GROUND, "schedulers", "loop", "loading", "stages"},
    "chains": {*GROUND, "schedulers", "loop", "loading", "stages", "chains"},
    "miniatures": {*GROUND, "schedulers", "loop", "loading", "stages", "chains", "miniatures"},
    "top": {*GROUND, "schedulers", "loop", "loading", "stages", "chains"},
    "commands": {*GROUND, "schedulers", "loop", "loading", "stages", "chains", "commands"},
    "main": {*GROUND, "schedulers", "loop", "loading", "stages", "chains", "commands", "main"},
}


def modules() -> list[Path]:
    """The package's files, relative to its root."""
    files = [path.relative_to(ROOT) for path in ROOT.rglob("*.py")]
    return sorted(f for f in files if f.parts[0] not in NOT_THE_PACKAGE and not f.parts[0].startswith("."))


def layer(parts: tuple[str, ...]) -> str:
    """Where a module stands; a new one in core has to be put into a layer above."""
    if parts in ((), ("__init__",), ("__main__",)):
        return "main" if parts == ("__main__",) else "top"
    if parts == ("core",):
        return "values"
    if parts[0] != "core":
        return parts[0]
    if parts[1] == "loop":
        return "loop"
    if parts[1] in LOADING:
        return "loading"
    assert parts[1] in {*VALUES, "__init__"}, f"core/{parts[1]}.py is in none of the layers of this test"
    return "values"


def imports(file: Path, source: str) -> Iterator[tuple[str, ...]]:
    """What a file imports from the package, as paths from its root: at the top, in functions and for types."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").split(".")[0] == "unrolled"):
            base = file.parts[: len(file.parts) - node.level] if node.level else ()
            names = (node.module or "").split(".") if node.module else []
            base = (*base, *(names if node.level else names[1:]))
            for name in node.names:
                is_module = (ROOT / Path(*base, f"{name.name}.py")).is_file() or (ROOT / Path(*base, name.name)).is_dir()
                yield (*base, name.name) if is_module else base
        elif isinstance(node, ast.Import):
            yield from (tuple(n.name.split(".")[1:]) for n in node.names if n.name.split(".")[0] == "unrolled")


@pytest.mark.parametrize("file", modules(), ids=str)
def test_imports_flow_one_way(file: Path) -> None:
    own = layer(file.with_suffix("").parts)
    for target in imports(file, (ROOT / file).read_text(encoding="utf-8")):
        assert target[:1] != ("tests",), f"{file} imports the tests"
        assert layer(target) in MAY_IMPORT[own], f"{file} ({own}) may not import {'.'.join(target)} ({layer(target)})"


def test_the_test_of_imports_sees_them() -> None:
    source = "from ..chains.run import run\nfrom ..core import loop\ndef f():\n    from . import decode, x\n"
    source += "import unrolled.core.noise\nfrom .. import __main__"
    found = sorted(imports(Path("stages/new.py"), source))
    assert [".".join(target) for target in found] == [
        "__main__", "chains.run", "core.loop", "core.noise", "stages", "stages.decode",
    ]  # fmt: skip
    assert [layer(target) for target in found] == ["main", "chains", "loop", "values", "stages", "stages"]


@pytest.mark.parametrize("file", modules(), ids=str)
def test_the_package_imports_itself_relatively(file: Path) -> None:
    for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
        names = [n.name for n in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        assert not any(name.split(".")[0] == "unrolled" for name in names), f"{file} imports {names}"


def test_the_packages_listed_are_the_folders_there_are() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        listed = tomllib.load(file)["tool"]["setuptools"]["packages"]
    folders = {f.parent for f in modules() if f.name == "__init__.py"}
    assert sorted(listed) == sorted(".".join(("unrolled", *folder.parts)) for folder in folders)
    assert {f.parent for f in modules()} == folders, "a folder with modules has no __init__.py"


def test_types_are_shipped() -> None:
    assert (ROOT / "py.typed").is_file()


# --- the wheel


def run(*command: str | Path, cwd: Path) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PYTEST", "COVERAGE"))}
    environment["COLUMNS"] = "200"
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that no leftovers of other builds get in and none are left."""
    folder = tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns(".*", "*.egg-info", "build", "dist", "__pycache__", "tests", "outputs")
    checkout = shutil.copytree(ROOT, folder / "checkout", ignore=ignored)
    # Without the network if the build requirements are here, else in an environment of its own.
    isolation = ["--no-isolation"] if int(version("setuptools").split(".")[0]) >= 80 else []
    run(sys.executable, "-m", "build", "--wheel", *isolation, "--outdir", folder, checkout, cwd=folder)
    return next(folder.glob("unrolled-*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel in a fresh environment that sees this one's dependencies, but not its editable install."""
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, with_pip=False, symlinks=True)
    python = home / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=home)
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=home).strip())
    # A path from a .pth file comes last, and .pth files in it are not read.
    here = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site / "dependencies.pth").write_text("".join(f"{path}\n" for path in here))
    return home / "bin"


@pytest.mark.slow
def test_the_wheel_holds_every_module_and_all_data(wheel: Path) -> None:
    held = set(zipfile.ZipFile(wheel).namelist())
    data = [ROOT / "py.typed", *(ROOT / "chains").glob("*.toml"), *(ROOT / "chains").glob("inputs/*")]
    data += (ROOT / "chains" / "film").glob("page.*")
    data += [f for f in (ROOT / "miniatures").glob("*/**/*") if f.suffix in (".json", ".safetensors", ".txt")]
    wanted = {*modules(), *(f.relative_to(ROOT) for f in data)}
    assert {f"unrolled/{path.as_posix()}" for path in wanted} <= held
    assert not [name for name in held if name.startswith(("core/", "kernels/", "tests/", "unrolled/tests/"))]


@pytest.mark.slow
def test_the_installed_command_runs_from_any_folder(installed: Path, tmp_path: Path) -> None:
    where = Path(run(installed / "python", "-c", "import unrolled; print(unrolled.__file__)", cwd=tmp_path).strip())
    assert installed.parent in where.parents
    models = run(installed / "unrolled", "models", cwd=tmp_path)
    assert "sd-1.5" in models
    assert "stable-diffusion-v1-5/stable-diffusion-v1-5" in models
    run(
        installed / "unrolled",
        "run",
        "text-to-image",
        "--steps",
        "2",
        "--output",
        "results",
        "--device",
        "cpu",
        cwd=tmp_path,
    )
    pictures = list((tmp_path / "results").rglob("*.png"))
    assert len(pictures) == 1
    assert Image.open(pictures[0]).size == (64, 64)
