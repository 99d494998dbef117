"""The command line: run, plan, models, doctor."""

from __future__ import annotations

import io
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from .core.errors import BadChain, OutOfMemory, UnrolledError

if TYPE_CHECKING:
    from .chains.chain import Chain, Stage
    from .core.loading import Shelf
    from .core.loop import Step

INTERRUPTED = 130

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
out, err = Console(), Console(stderr=True)

ChainFile = Annotated[str, typer.Argument(metavar="CHAIN", help="A chain file, or the name of one that comes along.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", metavar="STAGE.KEY=VALUE", help="Override a key of a stage.")]
Prompt = Annotated[str | None, typer.Option(help="What to paint.")]
Seed = Annotated[int | None, typer.Option(help="Seed of the first image; -1 draws one. Image i has seed + i.")]
Steps = Annotated[int | None, typer.Option(help="Number of denoising steps.")]
Batch = Annotated[int | None, typer.Option(help="Number of images.")]
Scale = Annotated[float | None, typer.Option(help="Guidance scale.")]
Strength = Annotated[float | None, typer.Option(help="How much to change a picture, above 0 to 1.")]
Models = Annotated[str, typer.Option(help="miniature (offline), hub, or a folder that holds model folders.")]
Variant = Annotated[str | None, typer.Option(help="Which of the weights in a folder, e.g. fp16.")]
Revision = Annotated[str | None, typer.Option(help="Which state of a hub repository: a branch, tag or commit.")]
Dtype = Annotated[str | None, typer.Option(help="float32, float16 or bfloat16.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, …; by default CUDA if there is one.")]
Vram = Annotated[str | None, typer.Option(help="Device memory to keep within, e.g. 8G; by default what is free.")]
Offload = Annotated[str, typer.Option(help="Where models live: auto, resident, model (one at a time) or layer.")]
Fast = Annotated[bool, typer.Option("--fast", help="Fuse and rearrange the networks: the same pictures to rounding.")]
Attention = Annotated[str | None, typer.Option(help="sdpa, xformers or reference; by default diffusers' choice.")]


@app.command()
def run(
    chain: ChainFile,
    overrides: Overrides = None,
    prompt: Prompt = None,
    seed: Seed = None,
    steps: Steps = None,
    batch: Batch = None,
    cfg_scale: Scale = None,
    strength: Strength = None,
    output: Annotated[Path, typer.Option(help="Folder to write into; nothing in it is overwritten.")] = Path("outputs"),
    models: Models = "miniature",
    variant: Variant = None,
    revision: Revision = None,
    device: Device = None,
    dtype: Dtype = None,
    offload: Offload = "auto",
    vram: Vram = None,
    attention: Attention = None,
    fast: Fast = False,
    progress: Annotated[bool, typer.Option(help="Show progress bars (never when not on a terminal).")] = True,
) -> None:
    """Run a chain and write its pictures."""
    from .chains.run import run as run_chain

    job = _chain(
        chain, overrides, prompt=prompt, seed=seed, steps=steps, batch=batch, guidance_scale=cfg_scale, strength=strength
    )
    shelf = _shelf(models, variant, revision, device, dtype, offload=offload, vram=vram, attention=attention, fast=fast)
    try:
        with _bars(on=progress and err.is_terminal) as watch:
            result = run_chain(job, shelf, output, watch, free=True)
    except KeyboardInterrupt:  # typer would leave without a word
        _say(f"Interrupted; what was made so far is in {output} (interrupted_*.safetensors, unfinished_*).")
        raise typer.Exit(INTERRUPTED) from None
    for note in dict.fromkeys(result.notes):
        _say(note, "note")
    for file in result.files:
        out.print(str(file), highlight=False, soft_wrap=True, markup=False)


@app.command()
def plan(
    chain: ChainFile,
    overrides: Overrides = None,
    prompt: Prompt = None,
    seed: Seed = None,
    steps: Steps = None,
    batch: Batch = None,
    cfg_scale: Scale = None,
    strength: Strength = None,
    models: Models = "miniature",
    variant: Variant = None,
    revision: Revision = None,
    device: Device = None,
    dtype: Dtype = None,
    offload: Offload = "auto",
    vram: Vram = None,
    table: Annotated[bool, typer.Option("--table", help="Show every step; the middle of long stages is left out.")] = False,
    every: Annotated[bool, typer.Option("--all", help="With --table, leave nothing out.")] = False,
    picture: Annotated[Path | None, typer.Option(help="Draw the schedule into a .png, .svg or .pdf file.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 if anything but notes is found.")] = False,
) -> None:
    """Show what a chain will run, draw its schedule and find its mistakes, without loading a model.

    Exit codes beside those of every command: 1 with --strict and a warning, 2 if a finding is an error.
    """
    from .chains.checks import findings
    from .chains.drawing import draw_plan
    from .chains.plan import plan as plan_chain
    from .chains.terminal import curve, finding_list, stage_table, step_table

    job = _chain(
        chain, overrides, prompt=prompt, seed=seed, steps=steps, batch=batch, guidance_scale=cfg_scale, strength=strength
    )
    shelf = _shelf(models, variant, revision, device, dtype, offload=offload, vram=vram)
    plans = plan_chain(job, shelf)
    found = findings(job, plans)
    count = f"{len(plans)} stage{'s' if len(plans) > 1 else ''}"
    seeds = f"seed{'s' if job.batch > 1 else ''} {', '.join(map(str, job.seeds()))}"
    out.print(f"{count} on {shelf.device}, {seeds}", highlight=False, soft_wrap=True)
    out.print(stage_table(plans), curve(plans, out.width))
    if table:
        out.print(step_table(plans, every))
    if found:
        out.print(finding_list(found))
    if picture is not None:
        out.print(str(draw_plan(plans, picture)), highlight=False, soft_wrap=True, markup=False)
    severities = {finding.severity for finding in found}
    if "error" in severities:
        raise typer.Exit(BadChain.exit_code)
    if strict and "warning" in severities:
        raise typer.Exit(1)


@app.command()
def models() -> None:
    """List the models that have short names."""
    from .core.catalog import CATALOG

    for name, entry in CATALOG.items():
        out.print(f"[bold]{name}[/bold]  {entry.about}\n    {entry.hub}", highlight=False, soft_wrap=True)


@app.command()
def doctor() -> None:
    """Show versions, the device, and which attention backends can run here."""
    import torch

    from .chains.record import versions
    from .kernels.backends import doctor as backends

    table = Table("what", "found", show_header=False)
    for package, found in versions().items():
        table.add_row(package, found)
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else "none; the CPU is used"
    table.add_row("CUDA device", cuda)
    table.add_row("CPU threads", str(torch.get_num_threads()))
    for name, state in backends().items():
        table.add_row(f"attention: {name}", state)
    out.print(table)


def main() -> None:
    """Entry point: every fault of the input is one sentence on standard error and an exit code, no traceback.

    Exit codes: 0 done; 2 bad input or chain; 3 model; 4 latents of another space; 5 NaN or infinity;
    6 out of memory; 7 cannot write; 130 interrupted.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # rather no arrow than no plan, where the terminal knows ASCII alone
    try:
        app()
    except UnrolledError as error:
        _say(str(error))
        sys.exit(error.exit_code)
    except Exception as error:
        if not isinstance(error, MemoryError) and type(error).__name__ != "OutOfMemoryError":  # torch's, not imported here
            raise
        _say("Out of memory: make the batch or the picture smaller.")
        sys.exit(OutOfMemory.exit_code)


def _chain(source: str, overrides: list[str] | None, **shared: Any) -> Chain:
    from .chains.read import read_chain

    if shared["seed"] == -1:
        shared["seed"] = secrets.randbelow(2**32)
    return read_chain(source, overrides or (), **shared)


def _shelf(
    models: str, variant: str | None, revision: str | None, device: str | None, dtype: str | None, **memory: Any
) -> Shelf:
    import torch

    from .core.errors import BadInput
    from .core.loading import Shelf, require_known_device

    known = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if dtype is not None and dtype not in known:
        raise BadInput(f"There is no dtype {dtype!r}: use {', '.join(known)}.")
    if device is not None:
        require_known_device(device)
    return Shelf(models, device, known[dtype] if dtype else None, variant, revision, **memory)


@contextmanager
def _bars(on: bool) -> Iterator[Any]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, disable=not on) as progress:
        tasks: dict[str, TaskID] = {}

        def watch(stage: Stage, step: Step) -> None:
            if stage.name not in tasks:
                tasks[stage.name] = progress.add_task(stage.name, total=step.total, completed=step.index)
            progress.update(tasks[stage.name], completed=step.index + 1)

        yield watch


def _say(sentence: str, what: str = "unrolled") -> None:
    err.print(f"{what}: {sentence}", highlight=False, soft_wrap=True, markup=False)


if __name__ == "__main__":
    main()
