"""What benchmarks/operations.py times: every operation at the sizes of the real networks, by every backend there is.

Shapes, and how often they come in one call of the network, are those of the published configurations at their own size;
"B=2" is one guided picture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from unrolled.kernels.attention import attention, reference
from unrolled.kernels.backends import inner
from unrolled.kernels.geglu import geglu
from unrolled.kernels.group_norm_silu import group_norm_silu
from unrolled.kernels.guided_step import guided_step
from unrolled.kernels.layer_norm import add_layer_norm, layer_norm
from unrolled.kernels.measured_table import Cut, Key
from unrolled.kernels.timestep_embedding import timestep_embedding
from unrolled.kernels.tuning import attention_blocks, attention_key, geglu_tile, group_norm_strips, key_of, row_blocks

# system, batch, heads, queries, keys, head size, how often
ATTENTION = [
    ("SDXL base", 2, 10, 4096, 4096, 64, 10), ("SDXL base", 2, 20, 1024, 1024, 64, 60),
    ("SDXL base", 2, 10, 4096, 77, 64, 10), ("SDXL base", 2, 20, 1024, 77, 64, 60),
    ("SDXL refiner", 2, 12, 4096, 4096, 64, 20), ("SDXL refiner", 2, 24, 1024, 1024, 64, 20),
    ("SDXL refiner", 2, 24, 256, 256, 64, 4), ("SDXL refiner", 2, 12, 4096, 77, 64, 20),
    ("SD 1.5", 2, 8, 4096, 4096, 40, 5), ("SD 1.5", 2, 8, 1024, 1024, 80, 5), ("SD 1.5", 2, 8, 256, 256, 160, 5),
    ("SD 1.5", 2, 8, 64, 64, 160, 1), ("SD 1.5", 2, 8, 4096, 77, 40, 5), ("SD 1.5", 2, 8, 1024, 77, 80, 5),
    ("Kandinsky decoder", 2, 12, 2304, 2336, 64, 7), ("Kandinsky decoder", 2, 18, 576, 608, 64, 7),
    ("Kandinsky decoder", 2, 24, 144, 176, 64, 8), ("x2 upscaler", 2, 6, 4096, 77, 64, 8),
    ("x2 upscaler", 2, 12, 256, 256, 64, 8), ("x4 upscaler", 2, 8, 256, 256, 128, 6),
    ("x4 upscaler", 2, 8, 4096, 77, 64, 10), ("VAE", 1, 1, 16384, 16384, 512, 1),
]  # fmt: skip
# system, batch, channels, side, channels last
GROUP_NORM = [
    ("SDXL", 2, 320, 128, True), ("SDXL", 2, 960, 128, True), ("SDXL", 2, 640, 64, True), ("SDXL", 2, 1280, 32, True),
    ("SD 1.5", 2, 320, 64, True), ("SD 1.5", 2, 640, 32, True), ("SD 1.5", 2, 2560, 8, True),
    ("Kandinsky decoder", 2, 384, 96, True), ("VAE", 1, 128, 1024, True), ("VAE", 1, 512, 128, True),
    ("SDXL", 2, 320, 128, False), ("VAE", 1, 128, 1024, False),
]  # fmt: skip
ROWS = [("SDXL", 8192, 640), ("SDXL", 2048, 1280), ("SD 1.5", 8192, 320), ("SD 1.5", 512, 1280)]
LATENTS = [(1, 64), (1, 128), (8, 128)]

INNER = {
    "sdpa: cudnn": SDPBackend.CUDNN_ATTENTION, "sdpa: flash": SDPBackend.FLASH_ATTENTION,
    "sdpa: efficient": SDPBackend.EFFICIENT_ATTENTION, "sdpa: math": SDPBackend.MATH,
}  # fmt: skip
LARGEST_MATRIX = 4 << 30
"""Bytes of scores in float32 beyond which those that keep the matrix are left out."""
FEW = 256
"""Queries of the first picture that are compared: enough to tell."""

Run = Callable[[], Any]
Draw = Callable[..., Tensor]


@dataclass
class Tuned:
    """Of an operation whose cuts are measured: what they are looked up by, the one it takes unasked, it cut so."""

    key: Key
    guess: Cut
    launch: Callable[[Any], Any]


@dataclass
class Case:
    """One operation on one set of inputs: its sides, its exact result, and the least it has to do and to move."""

    operation: str
    name: str
    sides: dict[str, Run]
    exact: Run
    flops: float
    moved: float
    of: Callable[[Any], Tensor] = lambda out: out
    """The part of a result that is compared."""
    note: dict[str, Any] = field(default_factory=dict)
    tuned: Tuned | None = None


def cases(draw: Draw) -> Iterator[Callable[[], Case]]:
    """One after the other, each with its inputs when it is called."""
    yield from (partial(_attention, draw, *shape) for shape in ATTENTION)
    yield from (partial(_group_norm, draw, *shape) for shape in GROUP_NORM)
    for shape in ROWS:
        yield from (partial(make, draw, *shape) for make in (_layer_norm, _add_layer_norm, _geglu))
    yield from (partial(_guided_step, draw, *shape) for shape in LATENTS)
    yield partial(_timesteps, draw, 30)


def tiny_cases(draw: Draw) -> Iterator[Callable[[], Case]]:
    """The same operations at sizes that Triton's interpreter can do."""
    yield from (partial(_attention, draw, "tiny", 1, 2, 33, 50, size, 1) for size in (40, 64, 160))
    yield from (partial(_group_norm, draw, "tiny", 1, 64, 9, last) for last in (True, False))
    yield from (partial(make, draw, "tiny", 7, 320) for make in (_layer_norm, _add_layer_norm, _geglu))
    yield partial(_guided_step, draw, 1, 9)
    yield partial(_timesteps, draw, 3)


def _three(run: Callable[[Any], Any]) -> dict[str, Run]:
    return {name: partial(run, name) for name in ("triton", "torch", "reference")}


def _attention(draw: Draw, system: str, batch: int, heads: int, queries: int, keys: int, size: int, count: int) -> Case:
    q, (k, v) = draw(batch, queries, heads, size), draw(batch, keys, 2, heads, size).unbind(2)

    def run(backend: Any) -> Tensor:
        return attention(q, k, v, backend=backend)

    def within(inner: SDPBackend) -> Tensor:
        with sdpa_kernel(inner):
            return run("sdpa")

    sides: dict[str, Run] = {name: partial(run, name) for name in ("triton", "sdpa")}
    sides |= {name: partial(within, inner) for name, inner in INNER.items()}
    sides |= {name: partial(run, name) for name in ("xformers", "reference") if name == "reference" or find_spec(name)}
    if 4 * batch * heads * queries * keys > LARGEST_MATRIX:
        del sides["reference"], sides["sdpa: math"]
    doubles = q[:1, :FEW].double(), k[:1].double(), v[:1].double()
    return Case(
        "attention",
        f"{system}: B={batch}, {heads} heads of {size}, {queries}×{keys}",
        sides,
        lambda: reference(*doubles, None, size**-0.5)[0],
        4.0 * batch * heads * queries * keys * size,
        2.0 * (q.numel() + k.numel()) * q.element_size(),
        lambda out: out[:1, :FEW],
        {"times_per_call": count, "sdpa_chooses": inner(q, k, v)},
        Tuned(
            attention_key(q, keys),
            attention_blocks(q, keys),
            lambda cut: _kernel("attention_forward")(q, k, v, None, size**-0.5, cut)[0],
        ),
    )


def _kernel(module: str) -> Any:
    """The launch of one of our kernels, whose modules import Triton."""
    return import_module(f"unrolled.kernels.{module}").launch


def _group_norm(draw: Draw, system: str, batch: int, channels: int, side: int, last: bool) -> Case:
    x = draw(batch, channels, side, side) + 1
    x = x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    weight, bias = draw(channels), draw(channels)
    return Case(
        "group_norm_silu",
        f"{system}: {batch}×{channels}×{side}², channels {'last' if last else 'first'}",
        _three(lambda backend: group_norm_silu(x, 32, weight, bias, backend=backend)),
        lambda: group_norm_silu(x.double(), 32, weight.double(), bias.double(), backend="reference"),
        0.0,
        2.0 * x.numel() * x.element_size(),
        tuned=Tuned(
            key_of("group_norm_silu", x),
            group_norm_strips(x),
            lambda cut: _kernel("group_norm_kernel")(x, 32, weight, bias, None, None, 1e-5, True, cut),
        ),
    )


def _layer_norm(draw: Draw, system: str, rows: int, size: int) -> Case:
    x, weight, bias = draw(rows, size), draw(size), draw(size)
    return Case(
        "layer_norm",
        f"{system}: {rows}×{size}",
        _three(lambda backend: layer_norm(x, weight, bias, backend=backend)),
        lambda: layer_norm(x.double(), weight.double(), bias.double(), backend="reference"),
        0.0,
        2.0 * x.numel() * x.element_size(),
        tuned=Tuned(
            key_of("layer_norm", x),
            row_blocks("layer_norm", x),
            lambda cut: _kernel("layer_norm_kernel")(x, None, weight, bias, 1e-5, cut)[1],
        ),
    )


def _add_layer_norm(draw: Draw, system: str, rows: int, size: int) -> Case:
    x, more, weight, bias = draw(rows, size), draw(rows, size), draw(size), draw(size)
    return Case(
        "add_layer_norm",
        f"{system}: {rows}×{size}",
        _three(lambda backend: add_layer_norm(x, more, weight, bias, backend=backend)[1]),
        lambda: layer_norm((x + more).double(), weight.double(), bias.double(), backend="reference"),
        0.0,
        4.0 * x.numel() * x.element_size(),
        tuned=Tuned(
            key_of("add_layer_norm", x),
            row_blocks("add_layer_norm", x),
            lambda cut: _kernel("layer_norm_kernel")(x, more, weight, bias, 1e-5, cut)[1],
        ),
    )


def _geglu(draw: Draw, system: str, rows: int, size: int) -> Case:
    x = draw(rows, 8 * size)
    return Case(
        "geglu",
        f"{system}: {rows}×{8 * size}",
        _three(lambda backend: geglu(x, backend=backend)),
        lambda: geglu(x.double(), backend="reference"),
        0.0,
        1.5 * x.numel() * x.element_size(),
        tuned=Tuned(
            key_of("geglu", x),
            geglu_tile(x),
            lambda cut: _kernel("geglu_kernel")(x, cut),
        ),
    )


def _guided_step(draw: Draw, batch: int, side: int) -> Case:
    x, past = draw(batch, 4, side, side).float(), draw(batch, 4, side, side).float()
    uncond, cond = draw(2 * batch, 4, side, side).chunk(2)
    given: dict[str, Any] = {"guidance_scale": 7.5, "sigma": 3.0, "row": (0.5, (0.7, -0.2), 0.0)}
    doubles = x.double(), cond.double(), uncond.double()
    return Case(
        "guided_step",
        f"{batch}×4×{side}², two points, float32 latents",
        _three(lambda backend: guided_step(x, cond, uncond, history=[past], backend=backend, **given)[0]),
        lambda: guided_step(*doubles, history=[past.double()], backend="reference", **given)[0],
        0.0,
        16.0 * x.numel() + 2.0 * cond.numel() * cond.element_size(),
    )


def _timesteps(draw: Draw, count: int) -> Case:
    timesteps = torch.linspace(999, 1, count, device=draw(1).device)
    return Case(
        "timestep_embedding",
        f"{count}×320",
        _three(lambda backend: timestep_embedding(timesteps, 320, backend=backend)),
        lambda: timestep_embedding(timesteps, 320, backend="reference"),
        0.0,
        4.0 * count * 321,
    )
