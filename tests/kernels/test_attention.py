"""The backends of attention by name: which can run where, and what the errors say."""

import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from unrolled.core.errors import BadInput
from unrolled.core.loading import Shelf
from unrolled.kernels import backends, tuning
from unrolled.kernels.attention import attention, attention_with_lse
from unrolled.kernels.attention_maps import attention_maps

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
Machine = Callable[..., None]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Pretend a machine: what is installed, what card there is, whether Triton's interpreter is on."""

    def pretend(*installed: str, capability: tuple[int, int] = (9, 0), interpreter: bool = False) -> None:
        monkeypatch.setattr(backends, "find_spec", lambda name: object() if name in installed else None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setenv("TRITON_INTERPRET", str(int(interpreter)))

    return pretend


# --- what can run where

NO_CPU = "it has no kernel for cpu: TRITON_INTERPRET=1 runs ours there, slowly"


@pytest.mark.parametrize(
    ("name", "installed", "device", "fault"),
    [
        ("sdpa", "", CPU, None),
        ("reference", "", CPU, None),
        ("triton", "", CPU, "triton is not installed"),
        ("triton", "", CUDA, "triton is not installed"),
        ("triton", "triton", CPU, NO_CPU),
        ("triton", "triton", CUDA, None),
        ("xformers", "triton", CUDA, "xformers is not installed"),
        ("xformers", "xformers", CPU, "it has no kernel for cpu"),
        ("xformers", "xformers", CUDA, None),
    ],
)
def test_why_a_backend_cannot_run(
    machine: Machine, name: str, installed: str, device: torch.device, fault: str | None
) -> None:
    machine(installed)
    assert backends.fault(name, device) == fault
    if fault is None:
        backends.require(name, device)
        return
    with pytest.raises(BadInput) as raised:
        backends.require(name, device)
    assert str(raised.value) == f"Attention {name!r} cannot run on {device} ({fault}): use auto, or see unrolled doctor."


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"head_size": 15}, "our kernels take heads of 16 to 512 numbers, not 15"),
        ({"head_size": 513}, "our kernels take heads of 16 to 512 numbers, not 513"),
        ({"head_size": 16, "dtype": torch.float16}, None),
        ({"head_size": 512, "dtype": torch.bfloat16}, None),
        ({"dtype": torch.float64}, "our kernels take float16, bfloat16 and float32, not float64"),
    ],
)
def test_what_our_kernels_take(machine: Machine, options: dict[str, Any], fault: str | None) -> None:
    machine("triton")
    assert backends.fault("triton", CUDA, **options) == fault


def test_an_old_card(machine: Machine) -> None:
    machine("triton", "xformers", capability=(7, 5))
    why = "our kernels need compute capability 8.0 or more, and this card has 7.5"
    assert backends.fault("triton", CUDA) == why
    assert backends.fault("xformers", CUDA) is None, "which has kernels of its own for it"
    with pytest.raises(BadInput, match=r"Attention 'triton' cannot run on cuda \(our kernels need .* has 7\.5\): use auto"):
        backends.require("triton", CUDA)


def test_the_interpreter_runs_ours_anywhere_but_in_bfloat16(machine: Machine) -> None:
    machine("triton", capability=(7, 5), interpreter=True)
    assert backends.fault("triton", CPU) is backends.fault("triton", CUDA) is None
    assert backends.fault("triton", CPU, 40, torch.bfloat16) == "Triton's interpreter is wrong in bfloat16"
    assert backends.fault("triton", CPU, 513) == "our kernels take heads of 16 to 512 numbers, not 513"


def test_the_doctor_says_what_can_run(machine: Machine) -> None:
    machine()
    assert backends.doctor() == {
        "triton": "cannot run: triton is not installed",
        "xformers": "cannot run: xformers is not installed",
        "sdpa": "can run: torch's scaled_dot_product_attention, which chooses the inner kernel, for heads of 64 in bfloat16 "
        "flash_attention; the default",
        "chunked": "can run: plain torch, some heads and queries at a time: for CPUs in half precision",
        "reference": "can run: plain torch, which keeps the whole matrix of scores",
    }
    machine("triton", "xformers")
    assert backends.doctor()["triton"] == f"cannot run: {NO_CPU}"
    machine("triton", interpreter=True)
    assert backends.doctor()["triton"] == "can run: our own kernels"


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
from unrolled.core.errors import BadInput
from unrolled.kernels.attention import attention
from unrolled.kernels.attention_maps import attention_maps
from unrolled.kernels.geglu import geglu
from unrolled.kernels.group_norm_silu import group_norm_silu
from unrolled.kernels.guided_step import guided_step
from unrolled.kernels.layer_norm import add_layer_norm, layer_norm
from unrolled.kernels.timestep_embedding import timestep_embedding

q, x = torch.randn(1, 4, 2, 16), torch.randn(1, 4, 8)
calls = [
    lambda **how: attention(q, q, q, **how),
    lambda **how: attention_maps(q, q, torch.tensor([0]), **how),
    lambda **how: geglu(x, **how),
    lambda **how: group_norm_silu(x, 2, **how),
    lambda **how: guided_step(x, x, sigma=1.0, row=(1.0, (1.0,), 0.0), **how),
    lambda **how: layer_norm(x, **how),
    lambda **how: add_layer_norm(x, x, **how),
    lambda **how: timestep_embedding(torch.tensor([1.0]), 8, **how),
]
for call in calls:
    call()
    call(backend="reference")
    try:
        call(backend="triton")
    except BadInput as error:
        assert "cannot run on cpu (triton is not installed): use auto, or see unrolled doctor." in str(error), error
    else:
        raise AssertionError("it ran")
print("all", len(calls))
"""


def test_without_triton_everything_but_our_kernels_runs() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "all 8", done.stderr[-2000:]


@pytest.mark.parametrize("room", [101_376, 166_912, 232_448])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("size", [16, 40, 64, 80, 128, 160, 512])
def test_tiles_fit_smaller_cards_too(size: int, dtype: torch.dtype, room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "room", lambda device: room)
    for queries, keys in ((4096, 4096), (4096, 77), (64, 64)):
        blocks = tuning.attention_blocks(some(2, queries, 8, size, dtype=dtype, device="meta"), keys)
        assert (blocks.queries + 2 * blocks.stages * blocks.keys) * size * dtype.itemsize <= room
        assert min(blocks.queries, blocks.keys) >= 16, "the least a product takes"


@pytest.mark.parametrize("room", [101_376, 166_912, 232_448])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("size", [16, 40, 64, 80, 128, 160, 512])
def test_backward_passes_fit_smaller_cards_too(
    size: int, dtype: torch.dtype, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "room", lambda device: room)
    kept, passed, _, stages = tuning.backward_passes(some(2, 64, 8, size, dtype=dtype, device="meta"))
    padded = max(16, 1 << (size - 1).bit_length())
    assert (2 * (kept + stages * passed) * padded + kept * passed) * dtype.itemsize <= room
    assert passed >= 16, "the least a product sums over"


# --- what the errors say


def some(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def test_a_backend_that_there_is_not() -> None:
    message = "There is no attention 'flash': use auto, triton, xformers, sdpa, chunked, reference."
    q = some(1, 2, 1, 16)
    for call in (
        lambda: Shelf(device="cpu", attention="flash"),
        lambda: attention(q, q, q, backend="flash"),  # type: ignore[arg-type]
        lambda: attention_with_lse(q, q, q, backend="flash"),  # type: ignore[arg-type]
        lambda: attention_maps(q, q, torch.tensor([0]), backend="flash"),  # type: ignore[arg-type]
    ):
        with pytest.raises(BadInput) as raised:
            call()
        assert str(raised.value) == message


@pytest.mark.parametrize(
    ("q", "k", "v"),
    [
        ((2, 5, 16), (2, 5, 16), (2, 5, 16)),
        ((1, 5, 2, 16), (1, 7, 2, 16), (1, 8, 2, 16)),
        ((1, 5, 2, 16), (2, 7, 2, 16), (2, 7, 2, 16)),
        ((1, 5, 2, 16), (1, 7, 1, 16), (1, 7, 1, 16)),
        ((1, 5, 2, 16), (1, 7, 2, 20), (1, 7, 2, 20)),
    ],
)
@pytest.mark.parametrize("backend", ["auto", "triton", "reference"])
def test_shapes_that_do_not_go_together(backend: Any, q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...]) -> None:
    with pytest.raises(BadInput) as raised:
        attention(some(*q), some(*k), some(*v), backend=backend)
    assert str(raised.value) == (
        "Attention takes queries (batch, queries, heads, head size) and keys and values (batch, keys, heads, head size), "
        f"but was given {q}, {k} and {v}."
    )


@pytest.mark.parametrize("shape", [(9,), (5, 9), (2, 5, 9), (1, 2, 5, 8), (1, 3, 5, 9), (3, 2, 5, 9), (1, 1, 1, 1, 1)])
def test_a_bias_that_does_not_broadcast(shape: tuple[int, ...]) -> None:
    q, k = some(1, 5, 2, 16), some(1, 9, 2, 16)
    with pytest.raises(BadInput) as raised:
        attention(q, k, k, bias=some(*shape))
    assert str(raised.value) == f"A bias of attention broadcasts to (1, 2, 5, 9) here, but was given as {shape}."


def test_dtypes_that_differ() -> None:
    q, k = some(1, 5, 2, 16), some(1, 5, 2, 16, dtype=torch.float16)
    with pytest.raises(BadInput) as raised:
        attention(q, k, k)
    assert str(raised.value) == (
        "Queries, keys and values are of one dtype, but were given as torch.float32, torch.float16 and torch.float16."
    )


def test_what_ours_cannot_take_is_said_where_it_is_called() -> None:
    pytest.importorskip("triton")
    q = some(1, 2, 1, 8)
    with pytest.raises(BadInput, match=r"'triton' cannot run on cpu \(our kernels take heads of 16 to 512 numbers, not 8\)"):
        attention(q, q, q, backend="triton")
    q = some(1, 2, 1, 16, dtype=torch.float64)
    with pytest.raises(BadInput, match=r"cannot run on cpu \(our kernels take float16, bfloat16 and float32, not float64\)"):
        attention_with_lse(q, q, q, backend="triton")


@pytest.mark.parametrize("backend", ["sdpa", "xformers"])
def test_backends_without_a_log_sum_exp(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "fault", lambda *_: None)
    q = some(1, 2, 1, 16)
    with pytest.raises(BadInput, match=f"Attention '{backend}' does not give the log-sum-exp: use triton or reference"):
        attention_with_lse(q, q, q, backend=backend)
    with pytest.raises(BadInput, match=f"Attention '{backend}' gives no maps: use triton or reference"):
        attention_maps(q, q, torch.tensor([0]), backend=backend)


def test_kernels_are_launched_on_the_card_of_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    on: list[Tensor] = []

    def device_of(x: Tensor) -> Any:
        on.append(x)
        return nullcontext()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    q, other = some(1, 2, 1, 16), some(1)
    assert backends.on_its_card(lambda x, y: (x, y))(q, other) == (q, other)
    assert [x is q for x in on] == [True]
    folder = Path(backends.__file__).parent
    kernels = [path.stem for path in folder.glob("*.py") if "\ndef launch(" in path.read_text()]
    assert len(kernels) == 8
    for name in kernels:
        assert f"@{backends.on_its_card.__name__}\ndef launch(" in (folder / f"{name}.py").read_text(), name


def test_no_gradient_of_a_bias(device: torch.device) -> None:
    pytest.importorskip("triton")
    q, bias = torch.randn(1, 2, 1, 16, device=device), torch.zeros(1, 1, 2, 2, device=device, requires_grad=True)
    with pytest.raises(BadInput, match="Our attention has no gradient of the bias: use the backend sdpa or reference"):
        attention(q.requires_grad_(), q, q, bias=bias, backend="triton")
    attention(q, q, q, bias=bias, backend="reference").square().sum().backward()  # type: ignore[no-untyped-call]
    assert bias.grad is not None
    assert bias.grad.any()


@pytest.mark.parametrize("tokens", [[3], [-1], [0, 5], [[0]], 1])
@pytest.mark.parametrize("lse", [True, False])
def test_tokens_that_are_no_keys(tokens: Any, lse: bool) -> None:
    q, k = some(1, 4, 1, 16), some(1, 3, 1, 16)
    with pytest.raises(BadInput) as raised:
        attention_maps(q, k, torch.tensor(tokens), lse=some(1, 1, 4) if lse else None)
    assert str(raised.value) == f"Tokens are numbers of keys, 0 to 2 here, but {tokens} were asked for."


def test_a_log_sum_exp_of_something_else() -> None:
    q, k = some(1, 4, 1, 16), some(1, 3, 1, 16)
    with pytest.raises(BadInput, match=r"The log-sum-exp of these is \(1, 1, 4\), but was given as \(1, 4, 1\)"):
        attention_maps(q, k, torch.tensor([0]), lse=some(1, 4, 1))
