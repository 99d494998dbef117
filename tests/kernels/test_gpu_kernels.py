"""Our kernels on a CUDA device, in every dtype and at the sizes of real networks. Run with `pytest -m gpu`.

Where there is a device the other tests of this folder run on it too, in half and single precision.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from unrolled.kernels.attention import attention, attention_with_lse, reference
from unrolled.kernels.attention_maps import attention_maps
from unrolled.kernels.geglu import geglu
from unrolled.kernels.group_norm_silu import group_norm_silu
from unrolled.kernels.guided_step import guided_step
from unrolled.kernels.layer_norm import add_layer_norm, layer_norm

pytest.importorskip("triton")

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

Draw = Callable[..., Tensor]
Agree = Callable[..., None]
BRAIN = torch.bfloat16
dtypes = pytest.mark.parametrize("dtype", [torch.float16, BRAIN, torch.float32], ids=["half", "brain", "single"])

# batch, heads, queries, keys, head size
REAL = {
    "SDXL, 64²": (2, 10, 4096, 4096, 64), "SDXL, 32²": (2, 20, 1024, 1024, 64), "SDXL, prompt": (2, 10, 4096, 77, 64),
    "SD 1.5, 64²": (2, 8, 4096, 4096, 40), "SD 1.5, 32²": (2, 8, 1024, 1024, 80), "SD 1.5, 16²": (2, 8, 256, 256, 160),
    "SD 1.5, prompt": (2, 8, 4096, 77, 40), "Kandinsky, 48²": (2, 12, 2304, 2336, 64),
    "Kandinsky, 12²": (2, 24, 144, 176, 64), "x4, 16²": (2, 8, 256, 256, 128), "VAE, 64²": (1, 1, 4096, 4096, 512),
}  # fmt: skip


def wide(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return reference(q.double(), k.double(), v.double(), bias, q.shape[-1] ** -0.5)


@dtypes
@pytest.mark.parametrize("name", REAL)
def test_attention_of_real_networks(name: str, dtype: torch.dtype, draw: Draw, agree: Agree) -> None:
    batch, heads, queries, keys, size = REAL[name]
    q, k, v = (draw(batch, n, heads, size, dtype=dtype)[:1] for n in (queries, keys, keys))
    out, lse = attention_with_lse(q, k, v, backend="triton")
    exact, exact_lse = wide(q, k, v)
    agree(out, exact, times=2)
    torch.testing.assert_close(lse, exact_lse, rtol=1e-5, atol=1e-5)


@dtypes
@pytest.mark.parametrize("size", [16, 40, 64, 80, 128, 160, 512])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (7, 130), (77, 77), (576, 608)])
def test_attention_with_a_bias_and_its_gradients(
    size: int, queries: int, keys: int, dtype: torch.dtype, draw: Draw, agree: Agree
) -> None:
    packed = draw(2, max(queries, keys), 3, 2, size, dtype=dtype).unbind(2)
    parts = [packed[0][:, :queries], packed[1][:, :keys], packed[2][:, :keys]]
    q, k, v = (part.detach().requires_grad_() for part in parts)
    bias = draw(2, 1, 1, keys).masked_fill(draw(2, 1, 1, keys) > 1, float("-inf"))
    bias[0, ..., 0] = 0
    leaves = [part.detach().double().requires_grad_() for part in parts]
    out, exact = attention(q, k, v, bias=bias, backend="triton"), wide(leaves[0], leaves[1], leaves[2], bias)[0]
    agree(out, exact, times=2)
    grad = draw(*out.shape, dtype=dtype)
    got = torch.autograd.grad(out, (q, k, v), grad)
    if keys > 1:
        for ours, theirs in zip(got, torch.autograd.grad(exact, leaves, grad.double()), strict=True):
            agree(ours, theirs, times=4)


@dtypes
def test_maps(dtype: torch.dtype, draw: Draw) -> None:
    q, k = draw(2, 1000, 10, 64, dtype=dtype), draw(2, 77, 10, 64, dtype=dtype)
    tokens = torch.tensor([5, 0, 76, 5], device="cuda")
    scores = torch.einsum("bmhd,bnhd->bhmn", q.double(), k.double()) / 8
    ours = attention_maps(q, k, tokens, backend="triton")
    torch.testing.assert_close(ours, scores.softmax(-1).mean(1)[..., tokens].float(), rtol=1e-4, atol=1e-6)


@dtypes
@pytest.mark.parametrize("last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize(
    "shape", [(2, 320, 128, 128), (2, 1280, 32, 32), (2, 1920, 8, 8), (1, 128, 1024, 1024), (3, 96, 13, 9)]
)
def test_group_norm(shape: tuple[int, ...], last: bool, dtype: torch.dtype, draw: Draw, agree: Agree) -> None:
    x = draw(*shape, dtype=dtype) + 2
    x = x.to(memory_format=torch.channels_last) if last else x
    weight, bias = draw(shape[1], dtype=dtype), draw(shape[1], dtype=dtype)
    out = group_norm_silu(x, 32, weight, bias, backend="triton")
    assert out.stride() == x.stride()
    agree(out, F.silu(F.group_norm(x.double(), 32, weight.double(), bias.double())))


@dtypes
@pytest.mark.parametrize("shape", [(2, 4096, 320), (2, 1024, 1280), (2, 64, 1280), (3, 77, 768), (5, 2047)])
def test_layer_norms_and_geglu(shape: tuple[int, ...], dtype: torch.dtype, draw: Draw, agree: Agree) -> None:
    x, more, weight, bias = (draw(*s, dtype=dtype) for s in (shape, shape, shape[-1:], shape[-1:]))
    agree(
        layer_norm(x, weight, bias, backend="triton"), F.layer_norm(x.double(), shape[-1:], weight.double(), bias.double())
    )
    total, out = add_layer_norm(x, more, weight, bias, backend="triton")
    assert torch.equal(total, x + more)
    agree(out, F.layer_norm(total.double(), shape[-1:], weight.double(), bias.double()))
    both = torch.cat([x, more], -1)
    agree(geglu(both, backend="triton"), x.double() * F.gelu(more.double()))


@dtypes
def test_guided_step(dtype: torch.dtype, draw: Draw, agree: Agree) -> None:
    x, past, noise = (draw(2, 4, 128, 128) for _ in range(3))
    uncond, cond = draw(4, 4, 128, 128, dtype=dtype).to(memory_format=torch.channels_last).chunk(2)
    row = (0.5, (0.7, -0.2), 0.3)
    given = {"guidance_scale": 7.5, "kind": "epsilon", "sigma": 3.0, "row": row}
    ours = guided_step(x, cond, uncond, history=[past], noise=noise, backend="triton", **given)  # type: ignore[arg-type]
    doubles = [part.double() for part in (x, cond, uncond, past, noise)]
    exact = guided_step(*doubles[:3], history=doubles[3:4], noise=doubles[4], backend="reference", **given)  # type: ignore[arg-type]
    for mine, theirs in zip(ours, exact, strict=True):
        agree(mine, theirs, times=3)


@dtypes
def test_two_runs_are_the_same_bits(dtype: torch.dtype, draw: Draw) -> None:
    q, k, v = draw(2, 1024, 3, 20, 64, dtype=dtype).unbind(2)
    x = draw(2, 320, 64, 64, dtype=dtype)

    def run() -> list[Tensor]:
        leaves = [part.detach().requires_grad_() for part in (q, k, v)]
        out = attention(leaves[0], leaves[1], leaves[2], backend="triton")
        return [out, *torch.autograd.grad(out.float().sum(), leaves), group_norm_silu(x, 32, backend="triton")]

    for one, other in zip(run(), run(), strict=True):
        assert torch.equal(one, other)


def test_kernels_in_a_captured_graph(draw: Draw) -> None:
    q, k, v = draw(2, 256, 3, 8, 64, dtype=BRAIN).unbind(2)

    def step() -> Tensor:
        return layer_norm(attention(q, k, v, backend="triton").flatten(2), backend="triton")

    wanted = step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    out.fill_(float("nan"))
    graph.replay()
    assert torch.equal(out, wanted)


def test_tensors_of_more_than_two_to_the_31_elements() -> None:
    q = torch.randn(1, 2**22 + 64, 8, 64, dtype=BRAIN, device="cuda")  # 2.1 billion numbers
    k = torch.randn(1, 77, 8, 64, dtype=BRAIN, device="cuda")
    out = attention(q, k, k, backend="triton")
    exact = wide(q[:, -100:], k, k)[0]
    assert (out[:, -100:] - exact).norm() <= 5e-3 * exact.norm()
