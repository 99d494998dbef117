"""Peak memory of two models one after the other, of full size with random weights, beside diffusers.

sd-1.5: text to image, then image to image with a fine-tune (another UNet, the same text encoder and VAE).
sdxl: the base's half of a run, then the refiner's. Both hand latents on, in one process per side: the peak of its
resident memory (VmHWM) on a CPU, of what torch allocated on a GPU. The pictures must agree in float32.

    python benchmarks/memory.py sd-1.5                        # builds 8 GB of checkpoints in a temporary folder
    python benchmarks/memory.py sdxl --dtype bfloat16         # 14 GB
    python benchmarks/memory.py sdxl --device cuda --dtype float16 --size 1024 --offload resident model layer
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from unrolled.chains.record import versions
from unrolled.core.guidance import classifier_free
from unrolled.core.latents import Latents
from unrolled.core.loading import Model, Shelf
from unrolled.core.loop import denoise
from unrolled.core.noise import DiffusersNoise
from unrolled.miniatures.full_size import write_full_size
from unrolled.stages.decode import decode_tensor
from unrolled.stages.noise import add_noise, noise, unit_noise
from unrolled.stages.size import with_size
from unrolled.stages.text import encode_text

RESULTS = Path(__file__).parent / "results"
PROMPT, STEPS, GUIDANCE, SEED, CUT = "a castle", 2, 5.0, 0, 0.5

PAIRS = {"sd-1.5": ("sd-1.5", "fine-tune"), "sdxl": ("sdxl-base", "sdxl-refiner")}

Pixels = torch.Tensor


# --- the sides


def ours(pair: tuple[Path, Path], args: argparse.Namespace, *, free: bool) -> Pixels:
    shelf = Shelf(device=args.device, dtype=getattr(torch, args.dtype), offload=args.offload[0])
    source, size = DiffusersNoise.seeded(SEED), args.size
    first = shelf.load(str(pair[0]))
    schedule = first.schedule(STEPS)
    cut = int(STEPS * CUT)
    xl = first.system == "sdxl"
    latents = noise(first, schedule, size, size, seeds=[SEED], source=source)
    latents = _denoised(first, latents, schedule[:cut] if xl else schedule, size)
    del first
    if free:
        shelf.keep(str(pair[1]))
    second = shelf.load(str(pair[1]))
    rest = second.schedule(STEPS)[cut:]
    if not xl:
        latents = add_noise(latents, rest, unit_noise(latents, DiffusersNoise.seeded(SEED)))
    return decode_tensor(second, _denoised(second, latents, rest, size))


def _denoised(model: Model, latents: Latents, schedule: Any, size: int) -> Latents:
    cond, uncond = encode_text(model, PROMPT), encode_text(model, None)
    if model.system == "sdxl":
        cond = with_size(model, cond, size, size)
        bad: dict[str, Any] = {"aesthetic_score": 2.5} if model.scored else {}
        uncond = with_size(model, uncond, size, size, **bad)
    return denoise(classifier_free(model.denoiser, cond, uncond, GUIDANCE), latents, schedule, model.solver(STEPS))


def theirs(pair: tuple[Path, Path], args: argparse.Namespace, *, free: bool) -> Pixels:
    """As in diffusers' documentation: a variable for SD's pipelines used anew, SDXL's parts handed on to the refiner."""
    import diffusers

    options = {"torch_dtype": getattr(torch, args.dtype), "use_safetensors": True}
    call = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "output_type": "latent"}
    xl = "sdxl" in pair[0].name

    def ready(pipeline: Any) -> Any:
        pipeline.set_progress_bar_config(disable=True)
        if args.offload[0] == "resident":
            return pipeline.to(args.device)
        {"model": pipeline.enable_model_cpu_offload, "layer": pipeline.enable_sequential_cpu_offload}[args.offload[0]](
            device=args.device
        )
        return pipeline

    def seeded() -> torch.Generator:
        return torch.Generator().manual_seed(SEED)

    kinds = ("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline") if xl else (
        "StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline",
    )  # fmt: skip
    pipeline = ready(getattr(diffusers, kinds[0]).from_pretrained(pair[0], **options))
    first = {"denoising_end": CUT} if xl else {}
    latents = pipeline(PROMPT, height=args.size, width=args.size, generator=seeded(), **call, **first).images
    shared = {name: getattr(pipeline, name) for name in ("text_encoder_2", "vae")} if xl else {}
    base = pipeline  # SDXL's examples keep it; SD's let go of it once the next one is there
    if free:
        del pipeline, base
        gc.collect()
    pipeline = ready(getattr(diffusers, kinds[1]).from_pretrained(pair[1], **options, **shared))
    if not xl:
        base = None
    second = {"denoising_start": CUT} if xl else {"strength": CUT}
    call["output_type"] = "pt"
    picture: torch.Tensor = pipeline(PROMPT, image=latents, generator=seeded(), **call, **second).images
    return picture * 2 - 1


def nothing(pair: tuple[Path, Path], args: argparse.Namespace) -> Pixels:
    """The interpreter and the libraries, no weights."""
    from diffusers import StableDiffusionXLPipeline

    assert StableDiffusionXLPipeline
    return torch.zeros(())


SIDES: dict[str, Callable[..., Pixels]] = {
    "libraries alone": nothing,
    "ours": lambda pair, args: ours(pair, args, free=True),
    "ours, nothing freed": lambda pair, args: ours(pair, args, free=False),
    "diffusers": lambda pair, args: theirs(pair, args, free=False),
    "diffusers, freed by hand": lambda pair, args: theirs(pair, args, free=True),
}


# --- measuring


def measure(side: str, folder: Path, args: argparse.Namespace, offload: str) -> dict[str, float]:
    """Peak and time of one side in a process of its own, which leaves its picture beside the models."""
    command = [
        sys.executable,
        "-P",
        __file__,
        args.systems[0],
        "--side",
        side,
        "--folder",
        str(folder),
        "--offload",
        offload,
    ]
    command += ["--device", args.device, "--dtype", args.dtype, "--size", str(args.size)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{side}: {done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def run_side(args: argparse.Namespace) -> None:
    """One side, in this process."""
    first, second = PAIRS[args.systems[0]]
    began = time.perf_counter()
    pixels = SIDES[args.side]((args.folder / first, args.folder / second), args)
    seconds = time.perf_counter() - began
    np.save(args.folder / f"{args.side}.npy", pixels.float().cpu().numpy())
    print(json.dumps({"peak_mb": own_peak(args.device), "seconds": seconds}))


def own_peak(device: str) -> float:
    """Of this process since it was started; ``ru_maxrss`` would count its parent's from before the exec."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**20
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def compare(system: str, args: argparse.Namespace) -> dict[str, Any]:
    """All sides of one system."""
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        first, second = PAIRS[system]
        base = write_full_size(folder / first, first, 0, getattr(torch, args.dtype))
        write_full_size(folder / second, first if system == "sd-1.5" else second, 1, getattr(torch, args.dtype), shared=base)
        args.systems = [system]
        for offload in args.offload:
            for side in SIDES:
                rows[f"{side}, {offload}"] = row = measure(side, folder, args, offload)
                if side != "libraries alone":
                    row["mean_pixel_difference"] = difference(folder, side)
                print(f"{system}: {side}, {offload}: {row}", file=sys.stderr, flush=True)
                if args.dtype == "float32" and row.get("mean_pixel_difference", 0.0) > 1 / 255:
                    raise SystemExit(f"{side}: its picture is another, so its memory means nothing.")
    return {"size": args.size, "dtype": args.dtype, "device": args.device, "sides": rows}


def difference(folder: Path, side: str) -> float:
    """Of a side's picture from ours, 0 to 1."""
    ours_, other = (np.load(folder / f"{name}.npy").clip(-1, 1) for name in ("ours", side))
    return float(np.abs(ours_ - other).mean() / 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("systems", nargs="+", choices=list(PAIRS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--size", type=int, default=256, help="side of the pictures in pixels")
    parser.add_argument("--offload", nargs="+", default=["resident"], choices=["resident", "model", "layer"])
    parser.add_argument("--side", choices=list(SIDES), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        run_side(args)
        return
    file = RESULTS / "memory.json"
    result = json.loads(file.read_text()) if file.is_file() else {}
    for system in list(args.systems):
        found = compare(system, args)
        found |= {
            "date": date.today().isoformat(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads",
            "gpu": torch.cuda.get_device_name() if args.device.startswith("cuda") else None,
            "job": f"{' then '.join(PAIRS[system])}, random weights, {STEPS} steps, guidance {GUIDANCE}, one picture",
            "statistic": "one run a side, each in a process of its own",
            "load_average": os.getloadavg()[0],
            "versions": versions(),
        }
        result[f"{system}, {args.device}, {args.dtype}"] = found
        RESULTS.mkdir(exist_ok=True)
        file.write_text(json.dumps(result, indent=1) + "\n")
        show(system, found["sides"])


def show(system: str, rows: dict[str, dict[str, float]]) -> None:
    table = Table("side", "peak MB", "seconds", "mean difference of 255", title=system)
    for side, row in rows.items():
        gap = row.get("mean_pixel_difference")
        table.add_row(side, f"{row['peak_mb']:.0f}", f"{row['seconds']:.0f}", "" if gap is None else f"{255 * gap:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
