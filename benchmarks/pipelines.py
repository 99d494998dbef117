"""Whole runs at full size, from noise to pixels: ours against diffusers' own pipelines.

Random weights, bfloat16, 30 Euler (Kandinsky: DDIM) steps with guidance, embeddings of the prompt given on both sides. SD
1.5, SDXL base and Kandinsky run in diffusers' pipelines; the refiner and the upscalers, which need pictures, in our loop
around diffusers' networks. Latency of one picture, peak memory, first run, and how far the latents are from diffusers'.

    python benchmarks/pipelines.py                    # writes results/pipelines.json
    python benchmarks/pipelines.py --compile          # and torch.compile, which takes minutes a structure
    python benchmarks/pipelines.py --steps 10 20 50   # time and memory against the steps, of two sides only
    python benchmarks/pipelines.py --check            # tiny networks on the CPU: is the harness right?
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from structures import STRUCTURES, VAES, conditioning, denoiser, network
from timing import (
    clocks,
    device_or_refuse,
    environment,
    first_call,
    floor_ms,
    held_memory,
    interleaved,
    peak_memory,
    quantiles,
)
from torch import Tensor
from unet_step import COMPILED, OURS_COMPILED, with_xformers
from unrolled.core.guidance import classifier_free
from unrolled.core.latents import Latents, LatentSpace
from unrolled.core.loop import denoise
from unrolled.kernels.backends import fault
from unrolled.kernels.fast import captured, captured_call, optimise, prepared
from unrolled.schedulers.config import read_scheduler

RESULTS = Path(__file__).parent / "results"
SCALE = 5.0
SPACE = LatentSpace("AutoencoderKL", 4, 8, 1.0, "benchmark")
VAE_TFLOP = {"sd-1.5": 2.51, "sdxl-base": 10.47}
"""2 x multiply-adds of a decode at the structure's own size, in 1e12, by torch's FLOP counter."""
SCHEDULER = {
    "_class_name": "EulerDiscreteScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "steps_offset": 1, "timestep_spacing": "leading",
}  # fmt: skip

ERRORS = ("error_against_fp32", "latents_from_diffusers", "pixels_from_pipeline")

FAR = 0.5
"""How far from diffusers' a run's latents may be before its time is not worth a line; of anything else they are 1.4 away."""

Run = Callable[[], tuple[Tensor, Tensor | None]]


class Job:
    """One structure's run."""

    def __init__(self, name: str, device: torch.device, steps: int, tiny: bool) -> None:
        self.name, self.device, self.steps, self.tiny = name, device, steps, tiny
        self.structure = STRUCTURES[name]
        self.side = 16 if tiny else self.structure.latents
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        kind = {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}[self.structure.kind]
        self.config = SCHEDULER | {"prediction_type": kind}
        if name == "kandinsky-2.2":  # whose pipelines do not scale the input, as Euler's needs (docs/departures.md)
            self.config |= {"_class_name": "DDIMScheduler", "set_alpha_to_one": False, "clip_sample": False}
        read = read_scheduler(self.config)
        self.schedule, self.solver = read.schedule(steps), read.solver(steps)
        noise = torch.randn(1, 4, self.side, self.side, generator=torch.Generator().manual_seed(5))
        self.noise = noise.to(device)

    def networks(self, dtype: torch.dtype | None = None) -> tuple[Any, Any]:
        """UNet and VAE, if it has one of its own."""
        made = network(self.structure.component, self.device, dtype or self.dtype, self.name if self.tiny else None)
        vae = None
        if self.name in VAES:
            vae = network(VAES[self.name], self.device, dtype or self.dtype)
        return made, vae

    def conditions(self, unet: Any) -> list[Any]:
        """With and without the prompt."""
        made = [conditioning(self.name, unet, self.side, seed, torch.float32) for seed in (1, 2)]
        if self.name == "sdxl-base":  # the sizes that diffusers' pipeline takes by default
            pixels = float(self.side * self.structure.pixels)
            ids = torch.tensor([[pixels, pixels, 0, 0, pixels, pixels]], device=self.device)
            made = [replace(cond, time_ids=ids) for cond in made]
        return made

    def start(self) -> Latents:
        """Pure noise."""
        std = self.schedule.start_std or self.schedule.sigmas[0]
        return Latents(self.noise.float() * std, SPACE, sigma=self.schedule.sigmas[0], seeds=(0,))

    def pixels(self, vae: Any, x: Tensor) -> Tensor | None:
        """From 0 to 1."""
        if vae is None:
            return None
        movq = type(vae).__name__ == "VQModel"
        options = {"force_not_quantize": True} if movq else {}
        z = (x if movq else x / vae.config.scaling_factor).to(vae.dtype)
        return (vae.decode(z, return_dict=False, **options)[0] / 2 + 0.5).clamp(0, 1)  # type: ignore[no-any-return]


def in_our_loop(job: Job, dtype: torch.dtype | None = None) -> Run:
    """diffusers' networks, our loop."""
    unet, vae = job.networks(dtype)
    cond, uncond = job.conditions(unet)
    guided = classifier_free(denoiser(job.name, unet), cond, uncond, SCALE)

    def run() -> tuple[Tensor, Tensor | None]:
        x = denoise(guided, job.start(), job.schedule, job.solver).x
        with torch.no_grad():
            return x, job.pixels(vae, x)

    return run


def ours(job: Job, mode: Any, attention: Any, norms: Any, compiler: dict[str, Any] | None = None) -> Run:
    unet, vae = job.networks()
    optimise(unet, attention=attention, norms=norms)
    if vae is not None:
        optimise(vae, attention=attention, norms=norms)
        captured_call(vae, mode=mode, compiler=compiler)
    inner, (cond, uncond) = denoiser(job.name, unet), job.conditions(unet)

    def run() -> tuple[Tensor, Tensor | None]:
        if mode == "eager":
            guided, solver = classifier_free(prepared(inner, job.schedule), cond, uncond, SCALE), job.solver
        else:
            made = captured(inner, cond, uncond, SCALE, job.schedule, job.solver, mode=mode, compiler=compiler)
            guided, solver = made.denoiser, made.solver
        x = denoise(guided, job.start(), job.schedule, solver).x
        with torch.no_grad():
            return x, job.pixels(vae, x)

    return run


def in_their_pipeline(job: Job, change: Callable[[Any], Any] = lambda unet: unet) -> Run | None:
    """diffusers' own pipeline with its UNet changed so, if it runs on embeddings alone."""
    import diffusers

    if job.name not in ("sd-1.5", "sdxl-base", "kandinsky-2.2"):
        return None
    unet, vae = job.networks()
    cond, uncond = (c.to(job.device, job.dtype) for c in job.conditions(unet))
    scheduler = getattr(diffusers, str(job.config["_class_name"])).from_config(job.config)
    shared = {"num_inference_steps": job.steps, "guidance_scale": SCALE, "output_type": "pt", "return_dict": False}
    size = job.side * job.structure.pixels
    shared |= {"height": size, "width": size, "latents": job.noise.to(job.dtype)}
    if job.name == "kandinsky-2.2":
        pipe = diffusers.KandinskyV22Pipeline(unet=unet, scheduler=scheduler, movq=vae)
        given = {"image_embeds": cond.image_embeds, "negative_image_embeds": uncond.image_embeds}
    elif job.name == "sd-1.5":
        parts = {"unet": unet, "vae": vae, "scheduler": scheduler}
        none = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
        pipe = diffusers.StableDiffusionPipeline(**parts, **none, requires_safety_checker=False)
        given = {"prompt_embeds": cond.context, "negative_prompt_embeds": uncond.context}
    else:
        none = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
        pipe = diffusers.StableDiffusionXLPipeline(
            unet=unet, vae=vae, scheduler=scheduler, **none, force_zeros_for_empty_prompt=False, add_watermarker=False
        )
        vae.config.force_upcast = False  # both sides decode in bfloat16
        given = {"prompt_embeds": cond.context, "negative_prompt_embeds": uncond.context}
        given |= {"pooled_prompt_embeds": cond.pooled, "negative_pooled_prompt_embeds": uncond.pooled}
    pipe.unet = change(unet)
    pipe.set_progress_bar_config(disable=True)

    def run() -> tuple[Tensor, Tensor | None]:
        images = pipe(**given, **shared)[0]
        if job.name == "kandinsky-2.2":  # which leaves tensors in -1 to 1
            images = (images / 2 + 0.5).clamp(0, 1)
        return images, images

    return run


def sides(job: Job, compile_too: bool) -> dict[str, Callable[[], Run | None]]:
    """Every side that this machine can run, by name; each makes its networks when it is called."""
    found: dict[str, Callable[[], Run | None]] = {"diffusers pipeline": lambda: in_their_pipeline(job)}
    if fault("xformers", job.device) is None:
        found["diffusers pipeline + xformers"] = lambda: in_their_pipeline(job, with_xformers)
    found |= {
        "diffusers networks in our loop": lambda: in_our_loop(job),
        "ours eager, sdpa": lambda: ours(job, "eager", "sdpa", "torch"),
        "ours graph, sdpa": lambda: ours(job, "graph", "sdpa", "torch"),
    }
    cuda = job.device.type == "cuda"
    if compile_too:
        theirs, own = (COMPILED, OURS_COMPILED) if cuda else ({"backend": "eager"}, {"backend": "eager"})
        found["diffusers pipeline compiled"] = lambda: in_their_pipeline(
            job, lambda unet: torch.compile(unet.to(memory_format=torch.channels_last), **theirs)
        )
        found["ours compiled + graph, sdpa"] = lambda: ours(job, "compile+graph", "sdpa", "torch", own)
    if cuda and fault("triton", job.device) is None:
        found["ours graph, triton"] = lambda: ours(job, "graph", "triton", "triton")
    return found


def measure(job: Job, chosen: dict[str, Callable[[], Run | None]], seconds: float) -> dict[str, Any]:
    exact = None if job.device.type == "cuda" and job.steps > 10 else in_our_loop(job, torch.float32)()[0]
    rows: dict[str, dict[str, Any]] = {}
    ready: dict[str, Run] = {}
    plain, picture = None, None
    for name, make in chosen.items():
        try:
            before = held_memory(job.device)
            run = make()
            if run is None:
                continue
            cost, (x, pixels) = first_call(run, job.device)
            rows[name] = {"first_run_s": cost, "finite": bool(torch.isfinite(x if pixels is None else pixels).all())}
            if name == "diffusers pipeline":
                picture = x.float().clone()
            elif picture is not None and pixels is not None:
                rows[name]["pixels_from_pipeline"] = float((pixels.float() - picture).abs().mean())
            if name == "diffusers networks in our loop":
                plain = x.clone()
            elif plain is not None and "pipeline" not in name:
                rows[name]["latents_from_diffusers"] = float((x - plain).norm() / plain.norm())
            if exact is not None and "pipeline" not in name:
                rows[name]["error_against_fp32"] = float((x - exact).norm() / exact.norm())
            if (peak := peak_memory(run, job.device, before)) is not None:
                rows[name]["peak_gib"] = peak
            if not rows[name]["finite"]:
                rows[name]["refused"] = "what comes out is not finite"
            elif (away := rows[name].get("latents_from_diffusers", 0.0)) > FAR:
                rows[name]["refused"] = f"{away:.1e} away from diffusers"
            else:
                ready[name] = run
        except Exception as problem:  # whatever it is, it is this side's line; Triton's are no RuntimeErrors
            rows[name] = {"refused": (str(problem) or type(problem).__name__).splitlines()[0]}
    floor = job.steps * floor_ms(2 * job.structure.tflop, job.structure.gigabytes) + floor_ms(
        VAE_TFLOP.get(job.name, 0), 0.1
    )
    for name, times in interleaved(ready, job.device, seconds, repeats=1).items():
        rows[name]["ms"] = quantiles(times)
        rows[name]["of_floor"] = floor / rows[name]["ms"]["q0.5"]
    return {
        "structure": job.name, "pixels": job.side * job.structure.pixels, "steps": job.steps, "floor_ms": floor,
        "decodes": job.name in VAES, "vae_in_floor": job.name in VAE_TFLOP, "clocks_after": clocks(), "sides": rows,
    }  # fmt: skip


def show(result: dict[str, Any]) -> None:
    print(f"\n{result['structure']}, {result['steps']} steps, {result['pixels']} px, floor {result['floor_ms']:.0f} ms")
    for name, row in result["sides"].items():
        if "ms" not in row:
            print(f"  {name:<32} {row.get('refused', 'not measured')}")
            continue
        print(
            f"  {name:<32} {row['ms']['q0.5']:9.1f} ms  {100 * row['of_floor']:3.0f} % of floor  first "
            f"{row['first_run_s']:.1f} s  " + "  ".join(f"{e} {row[e]:.1e}" for e in ERRORS if e in row),
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--structures", nargs="+", choices=STRUCTURES, default=list(STRUCTURES))
    parser.add_argument("--steps", type=int, nargs="+", default=[30])
    parser.add_argument("--seconds", type=float, default=3.0, help="of measuring for each structure")
    parser.add_argument("--limit", type=float, default=1e9, help="start no structure after so many seconds")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--output", type=Path, default=RESULTS / "pipelines.json")
    args = parser.parse_args()
    device = device_or_refuse(args.check)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    began = time.perf_counter()
    result: dict[str, Any] = {"what": "whole runs", "environment": environment(device), "jobs": [], "left_out": []}
    for name, steps in product(args.structures, [3] if args.check else args.steps):
        if time.perf_counter() - began > args.limit:
            result["left_out"].append(f"{name}, {steps} steps")
            continue
        job = Job(name, device, steps, args.check)
        chosen = sides(job, args.compile)
        if len(args.steps) > 1:
            chosen = {n: make for n, make in chosen.items() if n in ("diffusers pipeline", list(chosen)[-1])}
        result["jobs"].append(measure(job, chosen, 0.0 if args.check else args.seconds))
        show(result["jobs"][-1])
        torch._dynamo.reset()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if not args.check:
            args.output.parent.mkdir(exist_ok=True)
            args.output.write_text(json.dumps(result, indent=1) + "\n")
    if args.check:
        off = {
            (j["structure"], n): r
            for j in result["jobs"]
            for n, r in j["sides"].items()
            if "refused" in r or not r["finite"] or max(r.get(error, 0) for error in ERRORS) > 1e-3
        }
        raise SystemExit(f"The harness is wrong: {off}" if off else 0)


if __name__ == "__main__":
    main()
