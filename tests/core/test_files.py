import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from unrolled.core.errors import CannotWrite
from unrolled.core.files import claim, write_atomically


def test_writes_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "folder" / "a.bin"
    assert write_atomically(path, b"old") == path
    write_atomically(str(path), b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(path.parent) == ["a.bin"]


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_the_mode_follows_the_umask(tmp_path: Path, mask: int, mode: int) -> None:
    before = os.umask(mask)
    try:
        assert write_atomically(tmp_path / "a", b"").stat().st_mode & 0o777 == mode
        assert os.umask(mask) == mask
    finally:
        os.umask(before)


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failing_write_leaves_the_old_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    path = write_atomically(tmp_path / "a.png", b"old")

    def fail(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(CannotWrite) as caught:
        write_atomically(path, b"new")
    monkeypatch.undo()
    assert str(caught.value) == (
        f"Could not write {path} (No space left on device): choose another folder with --output, or free some space."
    )
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.png"]


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, MemoryError])
def test_an_interrupted_write_leaves_no_temporary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interruption: type[BaseException]
) -> None:
    def interrupt(number: int) -> None:
        raise interruption

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(interruption):
        write_atomically(tmp_path / "a.png", b"new")
    assert os.listdir(tmp_path) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 KB, where one may be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount command here")
    if done.returncode:
        pytest.skip("no file system may be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(small_disk: Path) -> None:
    path = write_atomically(small_disk / "a.png", b"old")
    with pytest.raises(CannotWrite, match=r"a\.png \(No space left on device\): choose another folder"):
        write_atomically(path, bytes(100_000))
    assert path.read_bytes() == b"old"
    assert os.listdir(small_disk) == ["a.png"]


def test_a_file_where_a_folder_is_needed(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(CannotWrite, match=r"Could not write .*file/a\.png \((Not a directory|File exists)\)"):
        write_atomically(tmp_path / "file" / "a.png", b"")


@pytest.mark.parametrize(
    ("there", "first"),
    [
        ([], "run_000"),
        (["run_000.png"], "run_001"),
        (["run_000.png", "run_004.json"], "run_005"),
        (["run_002-detail.png"], "run_003"),
        (["run_999.png"], "run_1000"),
        (["run_abc.png", "running_007.png"], "run_000"),
        (["run_001_002.png"], "run_000"),
    ],
)
def test_numbers_never_overwrite(tmp_path: Path, there: list[str], first: str) -> None:
    for name in there:
        (tmp_path / name).touch()
    names = [claim(tmp_path, "run", ".json") for _ in range(3)]
    assert names[0] == tmp_path / first
    assert len({*names, *(tmp_path / name for name in there)}) == 3 + len(there)


def test_numbers_in_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    assert claim(tmp_path / "new", "run", ".json").name == "run_000"


@pytest.mark.parametrize("stem", ["a[b]", "a*", "a?"])
def test_a_stem_is_no_pattern(tmp_path: Path, stem: str) -> None:
    (tmp_path / f"{stem}_003.png").touch()
    assert claim(tmp_path, stem, ".json").name == f"{stem}_004"


def test_a_number_is_claimed_before_another_process_takes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.touch

    def raced(path: Path, mode: int = 0o666, exist_ok: bool = True) -> None:
        if path.name == "run_000.json" and not path.exists():
            real(path)
        real(path, mode, exist_ok)

    monkeypatch.setattr(Path, "touch", raced)
    assert claim(tmp_path, "run", ".json").name == "run_001"
