"""One guided step of every UNet at full size: ours in each mode against diffusers eager, with xformers, and compiled.

Random weights, bfloat16, guidance as a batch of two, one Euler step. Every side has a network of its own with the same
weights; all of a structure run interleaved in one process, cuDNN choosing by trial for all. It is a step in the middle of a
run: ours has the prompt's keys and values already, which whole runs (pipelines.py) pay for. Beside each time: its distance
from float32, the fraction of the floor, the peak of memory, the first call's cost, and launches.

    python benchmarks/unet_step.py                                 # all structures; writes results/unet_step.json
    python benchmarks/unet_step.py --structures sdxl-base --compile  # and torch.compile, which takes minutes
    python benchmarks/unet_step.py --scaling                       # batch and resolution; results/scaling.json
    python benchmarks/unet_step.py --check                         # tiny networks on the CPU: is the harness right?
"""

from __future__ import annotations

import argparse
import gc
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from structures import STRUCTURES, Compiled, conditioning, denoiser, network
from timing import (
    Step,
    clocks,
    device_or_refuse,
    environment,
    first_call,
    floor_ms,
    held_memory,
    interleaved,
    launches,
    peak_memory,
    quantiles,
)
from torch import Tensor
from unrolled.core.guidance import classifier_free
from unrolled.core.schedule import Schedule
from unrolled.kernels import measured_table
from unrolled.kernels.backends import fault
from unrolled.kernels.fast import captured, optimise, prepared
from unrolled.schedulers import Euler

RESULTS = Path(__file__).parent / "results"
SCHEDULE = Schedule((3.0, 1.0, 0.0), (400.0, 200.0))
SCALE = 5.0
COMPILED = {"mode": "max-autotune", "fullgraph": False}
OURS_COMPILED = {"mode": "max-autotune-no-cudagraphs"}
TOLERANCE = 0.1
"""How far from float32 an output may be in bfloat16 before its time is not worth a line; float32's own is 1e-4."""


class Job:
    """One structure at one size: what every side computes."""

    def __init__(self, name: str, device: torch.device, batch: int = 1, side: int | None = None, tiny: bool = False) -> None:
        self.name, self.device, self.batch, self.tiny = name, device, batch, tiny
        self.structure = STRUCTURES[name]
        self.side = 16 if tiny else side or self.structure.latents
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        draw = torch.Generator(device).manual_seed(3)
        self.x = 3 * torch.randn(batch, 4, self.side, self.side, generator=draw, device=device)

    def unet(self, dtype: torch.dtype | None = None) -> Any:
        """A network of one's own."""
        return network(self.structure.component, self.device, dtype or self.dtype, self.name if self.tiny else None)

    def conditions(self, unet: Any) -> list[Any]:
        """With and without the prompt."""
        return [conditioning(self.name, unet, self.side, seed, torch.float32) for seed in (1, 2)]

    def step(self, guided: Any, solver: Any) -> Step:
        """One step from the same x."""

        def one() -> tuple[Tensor, Tensor]:
            """The guided prediction and the next x."""
            held: list[Tensor] = []

            def denoise(x: Tensor, sigma: float) -> Any:
                held.append((prediction := guided(x, sigma, 400.0)).out)
                return prediction

            with torch.no_grad():
                x_next, _ = solver(denoise, self.x, 3.0, 1.0, (), None)
            return held[0], x_next

        return one

    def exact(self) -> Tensor:
        """The prediction in float32, without TF32."""
        unet = self.unet(torch.float32)
        cond, uncond = self.conditions(unet)
        guided = classifier_free(denoiser(self.name, unet), cond, uncond, SCALE)
        out: Tensor = self.step(guided, Euler())()[0]
        return out.clone()


def diffusers_side(job: Job, change: Callable[[Any], Any] = lambda unet: unet) -> Step:
    """diffusers' network under our loop, which takes less beside the network than its own pipelines."""
    unet = job.unet()
    network = change(unet)
    cond, uncond = job.conditions(unet)
    inner = denoiser(job.name, unet)
    if network is not unet:
        object.__setattr__(inner, "unet", Compiled(network, unet))
    return job.step(classifier_free(inner, cond, uncond, SCALE), Euler())


def our_side(job: Job, mode: Any, attention: Any, norms: Any, compiler: dict[str, Any] | None = None) -> Step:
    unet = job.unet()
    optimise(unet, attention=attention, norms=norms)
    inner, (cond, uncond) = denoiser(job.name, unet), job.conditions(unet)
    if mode == "eager":
        return job.step(classifier_free(prepared(inner, SCHEDULE), cond, uncond, SCALE), Euler())
    made = captured(inner, cond, uncond, SCALE, SCHEDULE, Euler(), mode=mode, compiler=compiler)
    return job.step(made.denoiser, made.solver)


def sides(job: Job, compile_too: bool) -> dict[str, Callable[[], Step]]:
    """Every side that this machine can run, by name; each makes its network when it is called."""
    found: dict[str, Callable[[], Step]] = {
        "diffusers eager": lambda: diffusers_side(job),
        "diffusers NHWC": lambda: diffusers_side(job, lambda unet: unet.to(memory_format=torch.channels_last)),
    }
    if fault("xformers", job.device) is None:
        found["diffusers + xformers"] = lambda: diffusers_side(job, with_xformers)
    modes = [("eager", "sdpa"), ("graph", "sdpa")]
    if job.device.type == "cuda" and fault("triton", job.device) is None:
        modes += [("eager", "triton"), ("graph", "triton")]
    if (card := measured_table.card(job.device)) and measured_table.table(card).rows:
        modes.append(("graph", "auto"))  # what a user has, who asks for nothing
    for mode, kind in modes:
        norms = "torch" if kind == "sdpa" else kind
        found[f"ours {mode}, {kind}"] = lambda m=mode, k=kind, n=norms: our_side(job, m, k, n)  # type: ignore[misc]
    if compile_too:
        cpu = job.device.type == "cpu"
        options: dict[str, Any] = {"backend": "eager"} if cpu else COMPILED
        found["diffusers compiled"] = lambda: diffusers_side(
            job, lambda unet: torch.compile(unet.to(memory_format=torch.channels_last), **options)
        )
        ours: dict[str, Any] = {"backend": "eager"} if cpu else OURS_COMPILED
        found["ours compiled + graph, sdpa"] = lambda: our_side(job, "compile+graph", "sdpa", "torch", ours)
    return found


def with_xformers(unet: Any) -> Any:
    """The same network, its attention by xformers."""
    unet.enable_xformers_memory_efficient_attention()
    return unet


def measure(job: Job, chosen: dict[str, Callable[[], Step]], seconds: float) -> dict[str, Any]:
    """Every side of one job; one that cannot run is a line that says why."""
    exact = job.exact()
    rows: dict[str, dict[str, Any]] = {}
    ready: dict[str, Step] = {}
    for name, make in chosen.items():
        try:
            before = held_memory(job.device)
            step = make()
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                cost, (out, _) = first_call(step, job.device)
            error = float((out - exact).norm() / exact.norm())
            rows[name] = {
                "first_call_s": cost,
                "error_against_fp32": error,
                "notes": [str(note.message) for note in said],
                "launches": launches(step, job.device),
            }
            if (peak := peak_memory(step, job.device, before)) is not None:
                rows[name]["peak_gib"] = peak
            if error > (TOLERANCE if job.dtype == torch.bfloat16 else 1e-4):
                rows[name]["refused"] = f"{error:.1e} away from float32"
            else:
                ready[name] = step
        except Exception as problem:  # whatever it is, it is this side's line; Triton's are no RuntimeErrors
            rows[name] = {"refused": (str(problem) or type(problem).__name__).splitlines()[0]}
            _free(job.device)
    # Where the work lies in the network, it grows with batch and area; the attention, a tenth of it, faster.
    share = 2 * job.batch * (job.side / job.structure.latents) ** 2
    floor = floor_ms(share * job.structure.tflop, job.structure.gigabytes)
    for name, times in interleaved(ready, job.device, seconds, repeats=3 if job.tiny else 5).items():
        rows[name]["ms"] = quantiles(times)
        rows[name]["of_floor"] = floor / rows[name]["ms"]["q0.5"]
    return {
        "structure": job.name, "batch": job.batch, "latents": job.side, "pixels": job.side * job.structure.pixels,
        "dtype": str(job.dtype).removeprefix("torch."), "floor_ms": floor, "clocks_after": clocks(), "sides": rows,
    }  # fmt: skip


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def show(result: dict[str, Any]) -> None:
    print(f"\n{result['structure']}, batch {result['batch']}, {result['pixels']} px, floor {result['floor_ms']:.2f} ms")
    for name, row in result["sides"].items():
        if "ms" not in row:
            print(f"  {name:<30} {row.get('refused', 'not measured')}")
            continue
        ms, host = row["ms"], (row["launches"] or {}).get("from_host", "-")
        print(
            f"  {name:<30} {ms['q0.5']:9.2f} ms ({ms['q0.2']:.2f} to {ms['q0.8']:.2f})  {100 * row['of_floor']:3.0f} % of "
            f"floor  error {row['error_against_fp32']:.1e}  first {row['first_call_s']:.1f} s  launches {host}",
            flush=True,
        )


def scaling_jobs(device: torch.device, tiny: bool) -> list[Job]:
    """Batches of one size, and sizes of one batch."""
    batches = [Job(name, device, batch, tiny=tiny) for name in ("sd-1.5", "sdxl-base") for batch in (1, 2, 4, 8, 16)]
    sizes = [Job("sdxl-base", device, 1, pixels // 8, tiny) for pixels in (512, 768, 1536, 2048)]
    return batches[:2] if tiny else batches + sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--structures", nargs="+", choices=STRUCTURES, default=list(STRUCTURES))
    parser.add_argument("--seconds", type=float, default=2.0, help="of measuring for each structure")
    parser.add_argument("--limit", type=float, default=1e9, help="start no structure after so many seconds")
    parser.add_argument("--compile", nargs="*", choices=STRUCTURES, default=None, help="compile too; all, or those named")
    parser.add_argument("--scaling", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    device = device_or_refuse(args.check)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    began = time.perf_counter()
    jobs = scaling_jobs(device, args.check) if args.scaling else [Job(n, device, tiny=args.check) for n in args.structures]
    output = args.output or RESULTS / ("scaling.json" if args.scaling else "unet_step.json")
    result: dict[str, Any] = {"what": "one guided step", "environment": environment(device), "jobs": [], "left_out": []}
    for job in jobs:
        if time.perf_counter() - began > args.limit:
            result["left_out"].append(f"{job.name}, batch {job.batch}, latents {job.side}")
            continue
        compile_too = args.compile is not None and (not args.compile or job.name in args.compile)
        chosen = sides(job, compile_too)
        if args.scaling:
            chosen = {n: make for n, make in chosen.items() if n in ("diffusers eager", list(chosen)[-1])}
        result["jobs"].append(measured := measure(job, chosen, 0.0 if args.check else args.seconds))
        show(measured)
        del chosen
        torch._dynamo.reset()
        _free(device)
        if not args.check:  # after every structure, so that a time limit leaves what there is
            output.parent.mkdir(exist_ok=True)
            output.write_text(json.dumps(result, indent=1) + "\n")
    if args.check:
        wrong = [(j["structure"], n, r) for j in result["jobs"] for n, r in j["sides"].items() if "refused" in r]
        raise SystemExit(f"The harness is wrong: {wrong}" if wrong else 0)


if __name__ == "__main__":
    main()
