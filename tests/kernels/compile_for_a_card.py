"""Compiles our kernels for a card that is not there: ``python compile_for_a_card.py 90 40 64``, its compute
capability and head sizes. See test_kernels_compile.py.

Triton compiles without a device. What is launched on tensors without data is compiled instead, with the same block
sizes, and what it needs is printed as JSON: the card's limits are on shared memory and registers.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from unrolled.kernels import (
    attention_backward,
    attention_forward,
    attention_maps_kernel,
    geglu_kernel,
    group_norm_kernel,
    guided_step_kernel,
    layer_norm_kernel,
    timestep_embedding_kernel,
    tuning,
)

POINTERS = {
    torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int64: "*i64",
}  # fmt: skip
LABEL = [""]
ROOM = {"80": 166_912, "89": 101_376, "90": tuning.HOPPER}  # bytes of shared memory of one program


def compiled(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
    """What a launch would compile, specialised as it would be: ones are constants, multiples of 16 are said to be."""
    told: dict[str, Any] = {name: options.pop(name) for name in ("num_warps", "num_stages") if name in options}
    values: dict[str, Any] = {**dict(zip(self.arg_names, args, strict=False)), **options}
    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    hints: dict[tuple[int], Any] = {}
    for i, (name, parameter) in enumerate(zip(self.arg_names, self.params, strict=True)):
        value = values[name]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[(i,)] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name], hints[(i,)] = POINTERS[value.dtype], [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0:
                hints[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=self, signature=signature, constexprs=constants, attrs=hints)
    kernel = triton.compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32), options=told)
    needs: dict[str, Any] = {"kernel": self.__name__, "case": LABEL[0], "shared": kernel.metadata.shared, **told}
    needs |= resources(kernel.asm["cubin"])
    print(json.dumps({**needs, "wgmma": "wgmma" in kernel.asm["ptx"]}), flush=True)


def resources(cubin: bytes) -> dict[str, int]:
    """Registers and spilled bytes of a thread, as the tool that comes with Triton reads them."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        return {}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = re.findall(r"REG:(\d+) STACK:(\d+)", said)[0]
    return {"registers": int(registers), "spilled": int(stack)}


def blank(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def attention(size: int, dtype: torch.dtype, with_bias: bool) -> None:
    LABEL[0] = f"{size} {dtype} {'bias' if with_bias else ''}".strip()
    q, k = blank(2, 1024, 20, size, dtype=dtype), blank(2, 77 if with_bias else 1024, 20, size, dtype=dtype)
    bias = blank(2, 1, 1, k.shape[1], dtype=dtype) if with_bias else None
    out, lse = attention_forward.launch(q, k, k, bias, 0.1)
    attention_backward.launch(out, q, k, k, bias, out, lse, 0.1)
    attention_maps_kernel.launch(q, k, blank(8, dtype=torch.int64), lse, bias if bias is None else bias[..., :8], 0.1)


def others(dtype: torch.dtype) -> None:
    LABEL[0] = f"others {dtype}"
    w = blank(320, dtype=dtype)
    for x in (blank(2, 320, 128, 128, dtype=dtype), blank(2, 128, 128, 320, dtype=dtype).permute(0, 3, 1, 2)):
        group_norm_kernel.launch(x, 32, w, w, blank(2, 320, dtype=dtype), blank(2, 320, dtype=dtype), 1e-5, True)
    rows = blank(2, 1024, 1280, dtype=dtype)
    layer_norm_kernel.launch(rows, None, rows[0, 0], rows[0, 0], 1e-5)
    layer_norm_kernel.launch(rows, rows, rows[0, 0], rows[0, 0], 1e-5)
    geglu_kernel.launch(blank(2, 1024, 10240, dtype=dtype))
    x = blank(1, 4, 128, 128, dtype=torch.float32)
    out = blank(2, 128, 128, 4, dtype=dtype).permute(0, 3, 1, 2)
    guided_step_kernel.launch(x, out[1:], out[:1], [x, x], x, blank(12, dtype=torch.float32))
    timestep_embedding_kernel.launch(blank(30, dtype=torch.float32), 320, True, 0.0, 1e4)


def ones(dtype: torch.dtype) -> None:
    """Lengths and strides of 1, which Triton makes constants, and odd ones, which it can say nothing of."""
    LABEL[0] = f"ones {dtype}"
    for x in (blank(1, 4, 1, 1, dtype=dtype), blank(1, 4, 9, dtype=dtype)):
        group_norm_kernel.launch(x, 1, None, None, None, None, 1e-5, False)
    layer_norm_kernel.launch(blank(1, 1, dtype=dtype), blank(1, 1, dtype=dtype), None, None, 1e-5)
    geglu_kernel.launch(blank(1, 2, dtype=dtype))
    x = blank(1, 1, 1, 1, dtype=dtype)
    guided_step_kernel.launch(x, x, None, [], None, blank(12, dtype=torch.float32))
    timestep_embedding_kernel.launch(blank(1, dtype=torch.float32), 2, False, 0.0, 1e4)
    for queries, keys, size in ((1, 1, 16), (33, 77, 17)):
        q, k = blank(1, queries, 1, size, dtype=dtype), blank(1, keys, 1, size, dtype=dtype)
        bias = blank(1, 1, queries, keys, dtype=dtype)
        out, lse = attention_forward.launch(q, k, k, bias, 0.1)
        attention_backward.launch(out, q, k, k, bias, out, lse, 0.1)
        attention_maps_kernel.launch(q, k, blank(1, dtype=torch.int64), lse, bias[..., :1], 0.1)


if __name__ == "__main__":
    assert os.environ.get("TRITON_INTERPRET") != "1", "the interpreter compiles nothing"
    JITFunction.run = compiled
    tuning.room = lambda device: ROOM[sys.argv[1]]
    sizes = [int(size) for size in sys.argv[2:]]
    ones(torch.float16)
    for dtype in (torch.bfloat16, torch.float32):
        others(dtype)
        for size in sizes:
            attention(size, dtype, with_bias=False)
    for size in sizes:
        attention(size, torch.float16, with_bias=True)
