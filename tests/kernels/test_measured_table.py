"""What was measured on a card, as its file says: looked up, followed by "auto", and left alone where it is damaged."""

from __future__ import annotations

import json
import tomllib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import unrolled
from torch import Tensor
from unrolled.core.errors import Note
from unrolled.kernels import attention as attention_module
from unrolled.kernels import backends, measured_table, tuning
from unrolled.kernels import geglu as geglu_module
from unrolled.kernels.attention import attention
from unrolled.kernels.geglu import geglu
from unrolled.kernels.measured_table import Blocks, Key, Rows, Strips, Tile

CPU, HALF = torch.device("cpu"), torch.float16
CARD = "Card 9 (SXM)"
Write = Callable[..., Path]


def row(operation: str, same: list[int], near: list[Any], cut: Any, **microseconds: float) -> dict[str, Any]:
    times = microseconds or {"triton": 5.0, "torch": 9.0, "sdpa": 9.0}
    return {"operation": operation, "dtype": "float16", "same": same, "near": near, "cut": cut, "microseconds": times}


ROWS = [
    row("attention", [16], [4, 64, 64], {"queries": 32, "keys": 64, "warps": 2, "stages": 1}),
    row("attention", [16], [4, 512, 512], {"queries": 64, "keys": 16, "warps": 8, "stages": 1}, triton=9.0, sdpa=5.0),
    row("group_norm_silu", [1], [1, 64, 64], {"places": 16, "channels": 8, "stretch": 48, "warps": 2}),
    row("layer_norm", [], [8, 320], {"rows": 4, "warps": 2}),
    row("geglu", [], [8, 64], {"rows": 2, "columns": 64, "warps": 1}),
]


def forget() -> None:
    for kept in (measured_table.table, measured_table._nearest, backends.fastest, backends._say):
        kept.cache_clear()


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Writes the file of the card that this CPU then is."""
    monkeypatch.setattr(measured_table, "FOLDER", tmp_path)
    monkeypatch.setattr(measured_table, "card", lambda device: CARD)
    monkeypatch.setattr(backends, "card", lambda device: CARD)

    def write(rows: Any = ROWS, **changed: Any) -> Path:
        versions = {name: measured_table.installed(name) for name in ("torch", "triton")}
        made = {"format": 1, "card": CARD, "date": "2026-11-22", "versions": versions, "rows": rows} | changed
        path = measured_table.file(CARD)
        path.write_text(json.dumps(made))
        forget()
        return path

    forget()
    yield write
    forget()


def q(queries: int = 64, heads: int = 4, size: int = 16, dtype: torch.dtype = HALF) -> Tensor:
    return torch.randn(1, queries, heads, size, generator=torch.Generator().manual_seed(0)).to(dtype)


def test_our_kernels_are_cut_as_was_measured(write: Write) -> None:
    guesses = [tuning.attention_blocks(q(), 64), tuning.geglu_tile(torch.zeros(8, 64, dtype=HALF))]
    write()
    x = torch.zeros(1, 64, 8, 8, dtype=HALF).to(memory_format=torch.channels_last)
    rows = torch.zeros(2, 4, 320, dtype=HALF)
    assert tuning.attention_blocks(q(), 64) == Blocks(32, 64, 2, 1) != guesses[0]
    assert tuning.group_norm_strips(x) == Strips(16, 8, 48, 2)
    assert tuning.row_blocks("layer_norm", rows) == Rows(4, 2)
    assert tuning.geglu_tile(torch.zeros(8, 64, dtype=HALF)) == Tile(2, 64, 1) != guesses[1]
    assert tuning.row_blocks("add_layer_norm", rows) != Rows(4, 2), "another operation"
    assert tuning.group_norm_strips(x.contiguous()) != Strips(16, 8, 48, 2), "another memory format"
    assert tuning.attention_blocks(q(), 64, biased=True).queries != 32, "a bias was not measured"


@pytest.mark.parametrize(
    ("near", "queries"),
    [((4, 64, 64), 32), ((4, 120, 100), 16), ((4, 250, 260), None), ((4, 256, 256), 64), ((8, 1024, 1024), 64),
     ((9, 512, 512), None), ((4, 64, 201), None), ((4, 600, 256), 64), ((0, 64, 64), None)],
)  # fmt: skip
def test_the_nearest_within_an_octave_is_taken(write: Write, near: tuple[int, ...], queries: int | None) -> None:
    write([*ROWS, row("attention", [16], [4, 100, 100], {"queries": 16, "keys": 64, "warps": 2, "stages": 1})])
    found = measured_table.find(Key("attention", HALF, (16,), near), CPU)
    cut = None if found is None else found.cut
    assert (cut.queries if isinstance(cut, Blocks) else None) == queries


@pytest.mark.parametrize(
    "key",
    [("attention", torch.float32, (16,)), ("attention", HALF, (17,)), ("geglu", HALF, ()), ("attention", HALF, ())],
    ids=str,
)
def test_another_dtype_or_head_size_was_not_measured(write: Write, key: Any) -> None:
    write()
    operation, dtype, same = key
    assert measured_table.find(Key(operation, dtype, same, (4, 64, 64)), CPU) is None


def test_a_measured_tile_fits_the_room_that_there_is(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    write([row("attention", [16], [4, 64, 64], {"queries": 128, "keys": 128, "warps": 8, "stages": 4})])
    monkeypatch.setattr(tuning, "room", lambda device: 16_384)
    blocks = tuning.attention_blocks(q(), 64)
    assert (blocks.queries + 2 * blocks.stages * blocks.keys) * 32 <= 16_384


# --- auto


def chosen(monkeypatch: pytest.MonkeyPatch, call: Callable[[], Tensor]) -> list[str]:
    """Which operators of ours a call runs."""
    ran: list[str] = []
    for module, name in ((attention_module, "attention"), (geglu_module, "geglu")):

        def fused(*given: Any, name: str = name, real: Any = module.fused) -> Any:
            ran.append(name)
            return real(*given)

        monkeypatch.setattr(module, "fused", fused)
    call()
    return ran


def test_auto_follows_the_table_and_says_so_once(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    write()
    few, many, gates = q(), q(512), torch.zeros(8, 64, dtype=HALF)

    def calls() -> Tensor:
        attention(few, few, few)
        attention(many, many, many)
        return geglu(gates)

    with pytest.warns(Note) as said:
        assert chosen(monkeypatch, calls) == ["attention", "geglu"]
    torch_version, triton_version = (measured_table.installed(name) for name in ("torch", "triton"))
    assert [str(note.message) for note in said] == [
        f"On {CARD} auto follows what was measured there (2026-11-22, torch {torch_version}, triton {triton_version}), in "
        "shapes: attention by triton at 1, attention by sdpa at 1, group_norm_silu by triton at 1, layer_norm by triton at "
        "1, geglu by triton at 1."
    ]
    assert backends.doctor()["auto"] == str(said[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calls()


def test_auto_is_torchs_where_nothing_is_like_what_was_measured(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    write()
    x, bias = q(), torch.zeros(1, 1, 1, 64)
    watched, single = q().requires_grad_(), q(dtype=torch.float32)
    for call in (
        lambda: attention(x, x, x, bias=bias),
        lambda: attention(watched, x, x),
        lambda: attention(single, single, single),
        lambda: attention(x, x, x, backend="sdpa"),
        lambda: geglu(torch.zeros(8, 64, dtype=HALF), backend="torch"),
        lambda: geglu(torch.zeros(8, 64, dtype=HALF, requires_grad=True)),
    ):
        assert chosen(monkeypatch, call) == []


def test_auto_in_a_compiled_function_is_torchs(write: Write) -> None:
    write()
    x = q()
    compiled = torch.compile(lambda x: attention(x, x, x), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), attention(x, x, x, backend="sdpa"))


def test_auto_passes_over_what_cannot_run_here(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    write([row("attention", [16], [4, 64, 64], None, xformers=1.0, triton=2.0, sdpa=3.0)])
    key = tuning.attention_key(q(), 64)
    can = {"sdpa"}
    monkeypatch.setattr(backends, "fault", lambda name, *_: None if name in can else "no")
    with pytest.warns(Note):
        assert backends.fastest(key, CPU, "chunked") == "sdpa"
    backends.fastest.cache_clear()
    can.add("xformers")
    assert backends.fastest(key, CPU, "chunked") == "xformers"
    backends.fastest.cache_clear()
    can.clear()
    assert backends.fastest(key, CPU, "chunked") == "chunked"
    assert tuning.attention_blocks(q(), 64) == Blocks(128, 128, 8, 1), "no cut of ours was right"


def test_without_a_table_nothing_is_said(write: Write) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.fastest(tuning.attention_key(q(), 64), CPU, "sdpa") == "sdpa"
    assert backends.doctor()["auto"] == f"sdpa: nothing was measured on {CARD}, which benchmarks/tune.py would do"


# --- files that cannot be used

BAD_CUT = {"queries": 48, "keys": 64, "warps": 4, "stages": 1}
GOOD_CUT = BAD_CUT | {"queries": 64}


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"format": 2}, "it has format 2, not 1"),
        ({"card": "Card 8"}, "it is of 'Card 8'"),
        ({"versions": {"torch": "1.13.0", "triton": None}}, "it was measured with torch 1.13.0, and this is "),
        ({"versions": {}}, "it lacks 'torch'"),
        ({"versions": []}, "list indices must be"),
        ({"rows": 7}, "'int' object is not iterable"),
        ({"rows": [{}]}, "it lacks 'operation'"),
        ({"rows": [row("attention", [16], [4, 64, 64], BAD_CUT)]}, "it says "),
        ({"rows": [row("attention", [16], [4, 64, 64], GOOD_CUT | {"queries": 8})]}, "it says "),
        ({"rows": [row("attention", [16], [4, 64, 64], GOOD_CUT | {"warps": 3})]}, "it says "),
        ({"rows": [row("attention", [16], [4, 64, 64], {"queries": 64})]}, "missing 3 required"),
        ({"rows": [row("attention", [16], [4, 64, 0], GOOD_CUT)]}, "it says "),
        ({"rows": [row("attention", [16], [4, 64, "64"], GOOD_CUT)]}, "it says "),
        ({"rows": [row("attention", [16], [4, 64, 64], GOOD_CUT, sdpa=float("nan"))]}, "it says "),
        ({"rows": [row("attention", [16], [4, 64, 64], GOOD_CUT) | {"dtype": "matmul"}]}, "it says "),
        ({"rows": [row("attention", [16], [4, 64, 64], GOOD_CUT) | {"microseconds": {}}]}, "it says "),
        ({"rows": [row("warp", [16], [4, 64, 64], GOOD_CUT)]}, "it lacks 'warp'"),
    ],
    ids=str,
)
def test_a_damaged_or_outdated_file_is_a_note(write: Write, changed: dict[str, Any], why: str) -> None:
    path = write(**changed)
    with pytest.warns(Note) as said:
        assert measured_table.table(CARD).rows == ()
    assert str(said[0].message).startswith(f"What was measured on {CARD} is not used ({path.name}: ")
    assert why in str(said[0].message)
    assert str(said[0].message).endswith("and auto is torch's own: run benchmarks/tune.py on the card to measure it again.")
    assert tuning.attention_blocks(q(), 64) == Blocks(128, 128, 8, 1)


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff\xfe{", b'{"format"', b"[" * 100_000], ids=lambda c: str(c[:9]))
def test_what_is_no_table_at_all_is_a_note(write: Write, content: bytes) -> None:
    write().write_bytes(content)
    with pytest.warns(Note, match="is not used"):
        assert measured_table.table(CARD).rows == ()


def test_rows_are_read_as_they_are_written(write: Write) -> None:
    path = write()
    rows = measured_table.read(path, CARD).rows
    write([measured_table.written(measured) for measured in rows])
    assert measured_table.read(path, CARD).rows == rows
    assert len(rows) == len(ROWS)


def test_tables_are_shipped() -> None:
    root = Path(unrolled.__file__).parent
    with (root / "pyproject.toml").open("rb") as file:
        patterns = tomllib.load(file)["tool"]["setuptools"]["package-data"]["unrolled.kernels"]
    made = measured_table.file("NVIDIA H200").relative_to(root / "kernels")
    assert str(made) == "measured/nvidia-h200.json"
    assert any(made.match(pattern) for pattern in patterns)


@pytest.mark.parametrize("path", sorted(measured_table.FOLDER.glob("*.json")), ids=lambda path: path.name)
def test_the_tables_there_are_can_be_read(path: Path) -> None:
    found = json.loads(path.read_text(encoding="utf-8"))
    assert [measured_table._row(row) for row in found["rows"]]
    assert path == measured_table.file(found["card"])
