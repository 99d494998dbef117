"""Ten thousand small random calls of fused attention: shapes, dtypes, strides and biases nobody thought of."""

from random import Random

import pytest
import torch
from torch import Tensor
from unrolled.kernels.attention import attention_with_lse, reference

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


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_ten_thousand_draws(part: int, device: torch.device) -> None:
    for seed in range(part * DRAWS // PARTS, (part + 1) * DRAWS // PARTS):
        check(seed, device)


def test_fifty_draws(device: torch.device) -> None:
    for seed in range(DRAWS, DRAWS + 50):
        check(seed, device)
