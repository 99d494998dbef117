"""How the GPU benchmarks measure: interleaved, with quantiles, memory, launches, and what card and libraries it was."""

from __future__ import annotations

import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

import torch
from unrolled.kernels.backends import doctor
from unrolled.kernels.measured_table import installed

QUANTILES = (0.2, 0.5, 0.8)
CEILING_TFLOPS = 790.0
"""bf16 matrix products on random data, measured on an H200 of the kind these floors are for."""
CEILING_TBS = 4.3
"""Device-to-device copy on such a card, bytes read and written."""
LIBRARIES = ("torch", "triton", "diffusers", "transformers", "xformers", "unrolled")

Step = Callable[[], Any]


def device_or_refuse(check: bool) -> torch.device:
    """CUDA; the CPU if this only checks the harness; else one sentence and exit code 1."""
    if check:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise SystemExit("This benchmark measures a CUDA card and there is none here: use --check to try it on the CPU.")
    return torch.device("cuda")


def environment(device: torch.device) -> dict[str, Any]:
    """Card, driver, libraries, backends of attention and clocks as they are now; none of it is changed."""
    found: dict[str, Any] = {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "versions": {name: installed(name) for name in LIBRARIES},
        "cuda": torch.version.cuda,
        "backends": doctor(),
        "load_average": os.getloadavg(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "card": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
            "tf32": torch.backends.cuda.matmul.allow_tf32,
        }
    return found | {"clocks": clocks()}


def clocks() -> dict[str, str]:
    """What nvidia-smi says of driver, clocks, power and temperature; empty without it."""
    if not shutil.which("nvidia-smi"):
        return {}
    names = "driver_version,clocks.sm,clocks.mem,power.draw,temperature.gpu,pstate"
    command = ["nvidia-smi", f"--query-gpu={names}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    values = done.stdout.splitlines()[0].split(", ") if done.returncode == 0 and done.stdout else []
    return dict(zip(names.split(","), values, strict=False))


def first_call(step: Step, device: torch.device) -> tuple[float, Any]:
    """Seconds of a call with everything that comes only once, and what it gave."""
    _wait(device)
    began = time.perf_counter()
    out = step()
    _wait(device)
    return time.perf_counter() - began, out


def milliseconds(step: Step, device: torch.device, repeats: int) -> list[float]:
    """Of each call, by device events; of the clock on a CPU.

    The calls are enqueued one after the other, as a run does it, so that what the host takes shows only where the device
    waits for it. A network's weights are many times the L2, so that nothing is flushed between calls.
    """
    if device.type != "cuda":
        times = []
        for _ in range(repeats):
            began = time.perf_counter()
            step()
            times.append(1e3 * (time.perf_counter() - began))
        return times
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]  # type: ignore[no-untyped-call]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in pairwise(events)]


def single_calls(sides: dict[str, Step], device: torch.device, seconds: float, rounds: int = 40) -> dict[str, list[float]]:
    """Milliseconds of calls that are shorter than their launch, A B B A for so many rounds or seconds, but three rounds.

    Before each the L2 is flushed, by what takes longer than the host does to enqueue what follows.
    """
    if device.type != "cuda":
        return interleaved(sides, device, 0.0, repeats=1, pause=0.0)
    for step in [*sides.values()] * 3:
        step()
    flush = torch.ones(1 << 28, device=device)  # 1 GB, many times the cache
    spans: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in sides}
    ends, done = time.perf_counter() + seconds, 0
    while done < 3 or (time.perf_counter() < ends and done < rounds):
        for name in [*sides, *reversed(sides)]:
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            flush.zero_()
            began.record()
            sides[name]()
            ended.record()
            spans[name].append((began, ended))
        torch.cuda.synchronize()
        done += 1
    return {name: [began.elapsed_time(ended) for began, ended in pairs] for name, pairs in spans.items()}


def interleaved(
    sides: dict[str, Step], device: torch.device, seconds: float, repeats: int = 5, pause: float = 0.05
) -> dict[str, list[float]]:
    """Milliseconds of every side, A B B A until the time is up, at least one such round."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    ends = time.perf_counter() + seconds
    while True:
        for name in [*sides, *reversed(sides)]:
            time.sleep(pause)
            times[name] += milliseconds(sides[name], device, repeats)
        if time.perf_counter() >= ends:
            return times


def quantiles(times: list[float]) -> dict[str, float]:
    """0.2, 0.5 and 0.8, and how many there were."""
    if len(times) < 2:
        return {f"q{q:g}": times[0] for q in QUANTILES} | {"count": len(times)}
    cuts = statistics.quantiles(times, n=10, method="inclusive")
    return {f"q{q:g}": cuts[round(10 * q) - 1] for q in QUANTILES} | {"count": len(times)}


def held_memory(device: torch.device) -> float:
    """Gibibytes of the card that torch has and cannot give back."""
    if device.type != "cuda":
        return 0.0
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return float(torch.cuda.memory_reserved() / 2**30)


def peak_memory(step: Step, device: torch.device, before: float) -> float | None:
    """Gibibytes of the card that torch has at the worst moment of a call, less those held before the side was made.

    Reserved and not allocated: what a graph keeps for its intermediate results does not count as allocated in a replay.
    """
    if device.type != "cuda":
        return None
    held_memory(device)
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return float(torch.cuda.max_memory_reserved() / 2**30) - before


def launches(step: Step, device: torch.device) -> dict[str, int] | None:
    """How many kernels and copies the device ran for one call, and how often the host told it to."""
    if device.type != "cuda":
        return None
    on_device, on_host = _events(step)
    told = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch", "cudaMemcpyAsync")
    return {"on_device": len(on_device), "from_host": sum(name.startswith(told) for name in on_host)}


def kernels_run(step: Step, device: torch.device) -> list[str]:
    """The names of the kernels that the device ran for one call: what a library chose, as it happened."""
    return [] if device.type != "cuda" else [name[:120] for name in dict.fromkeys(_events(step)[0])]


def _events(step: Step) -> tuple[list[str], list[str]]:
    """What the profiler saw on the device and on the host, in one call after another."""
    from torch.profiler import ProfilerActivity, profile

    step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        step()
        torch.cuda.synchronize()
    found: tuple[list[str], list[str]] = [], []
    for event in seen.events():
        found[event.device_type != torch.autograd.DeviceType.CUDA].append(event.name)  # type: ignore[attr-defined]
    return found


def floor_ms(tflop: float, gigabytes: float) -> float:
    """The larger of the times that the arithmetic and the weights take at the measured ceilings."""
    return max(1e3 * tflop / CEILING_TFLOPS, gigabytes / CEILING_TBS)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
