"""Our kernels run on the CUDA device if there is one, else in Triton's interpreter; their outputs start as NaN."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

INTERPRETED = not torch.cuda.is_available()  # as the tests' first conftest has settled

# Of |out - exact| / |exact|: the output's own rounding, and what sums in float32 add to it.
RELATIVE = {torch.float16: 6e-4, torch.float32: 3e-6, torch.bfloat16: 5e-3}


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    if INTERPRETED:
        monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every output that is allocated starts as NaN, so that what a kernel does not write is seen."""
    empty, empty_like = torch.empty, torch.empty_like

    def poison(out: Tensor) -> Tensor:
        return out.fill_(float("nan")) if out.is_floating_point() else out

    monkeypatch.setattr(torch, "empty", lambda *args, **options: poison(empty(*args, **options)))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **options: poison(empty_like(*args, **options)))


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cpu" if INTERPRETED else "cuda")


Draw = Callable[..., Tensor]
Agree = Callable[..., None]


@pytest.fixture
def draw(device: torch.device) -> Draw:
    """``draw(*shape, dtype=...)``: unit normal numbers, the same in every run."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    return draw


@pytest.fixture
def agree() -> Agree:
    """``agree(out, exact)``: no NaN, and as near to the float64 result as the dtype allows, as a whole and at its worst."""

    def agree(out: Tensor, exact: Tensor, times: float = 1.0) -> None:
        assert out.shape == exact.shape
        assert exact.dtype in (torch.float64, torch.float32), "the oracle is wide"
        allowed = times * RELATIVE[out.dtype]
        out, exact = out.detach().double(), exact.detach().double()
        assert out.isfinite().all(), "not every element was written, or NaN came out"
        error, size = (out - exact).norm().item(), exact.norm().item()
        assert error <= allowed * size + 1e-30, f"relative error {error / size:.2g}, allowed {allowed:.2g}"
        if out.numel():
            worst, root = (out - exact).abs().max().item(), size / out.numel() ** 0.5
            assert worst <= 20 * allowed * max(root, exact.abs().max().item() / 10), f"one element is off by {worst:.2g}"

    return agree
