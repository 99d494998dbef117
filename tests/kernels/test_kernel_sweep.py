"""Ten thousand small random calls, half of fused attention and half of the others: what nobody thought of."""

from collections.abc import Callable
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor
from unrolled.kernels.attention import attention_with_lse, reference
from unrolled.kernels.geglu import geglu
from unrolled.kernels.group_norm_silu import group_norm_silu
from unrolled.kernels.guided_step import guided_step
from unrolled.kernels.layer_norm import add_layer_norm, layer_norm

pytest.importorskip("triton")

DRAWS, PARTS = 10_000, 10


def layout(x: Tensor, random: Random) -> Tensor:
    """The same numbers with other strides."""
    order = random.sample(range(4), 4)
    x = x.permute(order).contiguous().permute([order.index(i) for i in range(4)])
    if random.random() < 0.3:
        wide = x.new_full((x.shape[0], 2 * x.shape[1], x.shape[2], x.shape[3] + 3), float("nan"))
        wide[:, ::2, :, 1 : 1 + x.shape[3]] = x
        return wide[:, ::2, :, 1 : 1 + x.shape[3]]
    return x


def check(seed: int, device: torch.device) -> None:
    """Attention by even seeds, the others by odd ones."""
    (check_others if seed % 2 else check_attention)(seed, device)


def check_attention(seed: int, device: torch.device) -> None:
    random, generator = Random(seed), torch.Generator().manual_seed(seed)
    batch, heads, queries, keys = random.randint(1, 2), random.randint(1, 2), random.randint(1, 40), random.randint(1, 40)
    size, dtype = random.randint(16, 48), random.choice([torch.float16, torch.float32])
    shapes = [(batch, n, heads, size) for n in (queries, keys, keys)]
    q, k, v = (layout(torch.randn(s, generator=generator).to(device, dtype), random) for s in shapes)
    bias = None
    if random.random() < 0.6:
        shape = [random.choice((1, n)) for n in (batch, heads, queries, keys)]
        bias = torch.randn(shape, generator=generator).to(device, random.choice([torch.float32, dtype]))
        bias = bias.masked_fill(torch.rand(shape, generator=generator).to(device) < random.choice([0, 0.3, 0.9]), -torch.inf)
    scale = random.choice([size**-0.5, 0.5, 0.0])
    out, lse = attention_with_lse(q, k, v, bias=bias, scale=scale, backend="triton")
    exact, exact_lse = reference(q.double(), k.double(), v.double(), bias, scale)
    wrong = (out - exact).abs() > (2e-3 if dtype == torch.float16 else 2e-5) * (1 + exact.abs())
    assert not wrong.any(), f"draw {seed}: {int(wrong.sum())} of {wrong.numel()} are wrong"
    assert out.isfinite().all(), f"draw {seed}: not finite"
    torch.testing.assert_close(lse, exact_lse, rtol=1e-5, atol=1e-5, msg=lambda text: f"draw {seed}: {text}")


def check_others(seed: int, device: torch.device) -> None:
    random, generator = Random(seed), torch.Generator().manual_seed(seed)
    dtype, groups = random.choice([torch.float16, torch.float32]), random.randint(1, 4)
    shape = random.randint(1, 2), groups * random.randint(1, 6), random.randint(2, 5), 2 * random.randint(1, 12)

    def some(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    x, more, cond, uncond = (layout(some(*shape), random) for _ in range(4))
    told = {name: some(*shape[:2]) for name in ("scale", "shift")} if random.random() < 0.5 else {}
    told |= {name: some(shape[1]) for name in ("weight", "bias") if random.random() < 0.5}
    step: dict[str, Any] = {"guidance_scale": random.choice((0.0, 1.5, 7.5)), "sigma": 2.0, "row": (0.5, (0.7, -0.2), 0.0)}
    calls: dict[str, Callable[..., Tensor]] = {
        "group norm": lambda x, *_, told, **how: group_norm_silu(x, groups, silu=seed % 4 == 1, **told, **how),
        "layer norm": lambda x, *_, told, **how: layer_norm(x, eps=1e-3, **how),
        "sum and norm": lambda x, more, *_, told, **how: add_layer_norm(x, more, eps=1e-3, **how)[1],
        "geglu": lambda x, *_, told, **how: geglu(x, **how),
        "step": lambda x, past, *outs, told, **how: guided_step(x, outs[0], outs[1], history=[past], **step, **how)[0],
    }
    name = random.choice(list(calls))
    if name == "sum and norm":  # whose sum is rounded before the norm is taken of it: eighths are not
        x, more = (8 * x).round() / 8, (8 * more).round() / 8
    out = calls[name](x, more, cond, uncond, told=told, backend="triton")
    wide = {part: numbers.double() for part, numbers in told.items()}
    exact = calls[name](*(part.double() for part in (x, more, cond, uncond)), told=wide, backend="reference")
    wrong = ~((out - exact).abs() <= (2e-3 if dtype == torch.float16 else 5e-5) * (1 + exact.abs()))
    assert not wrong.any(), f"draw {seed}, {name}: {int(wrong.sum())} of {wrong.numel()} are wrong"


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_ten_thousand_draws(part: int, device: torch.device) -> None:
    for seed in range(part * DRAWS // PARTS, (part + 1) * DRAWS // PARTS):
        check(seed, device)


def test_fifty_draws(device: torch.device) -> None:
    for seed in range(DRAWS, DRAWS + 50):
        check(seed, device)
