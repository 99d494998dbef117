"""What every command that works on a chain may be told, and what it makes of it.

Annotations are no strings here (no ``from __future__``): typer reads them.
"""

import functools
import inspect
import secrets
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    from ..chains.chain import Chain
    from ..core.loading import Shelf

out, err = Console(), Console(stderr=True)


def say(sentence: str, what: str = "unrolled") -> None:
    """One sentence on standard error."""
    err.print(f"{what}: {sentence}", highlight=False, soft_wrap=True, markup=False)


def show(line: object) -> None:
    """One line on standard output, as it is: a file's path, say."""
    out.print(str(line), highlight=False, soft_wrap=True, markup=False)


def of_chain(
    chain: Annotated[str, typer.Argument(metavar="CHAIN", help="A chain file, or the name of one that comes along.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="STAGE.KEY=VALUE", help="Override a key of a stage.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="What to paint.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the first image; -1 draws one. Image i has seed + i.")] = None,
    steps: Annotated[int | None, typer.Option(help="Number of denoising steps.")] = None,
    batch: Annotated[int | None, typer.Option(help="Number of images.")] = None,
    cfg_scale: Annotated[float | None, typer.Option(help="Guidance scale.")] = None,
    strength: Annotated[float | None, typer.Option(help="How much to change a picture, above 0 to 1.")] = None,
    models: Annotated[
        str, typer.Option(help="miniature (offline), hub, or a folder that holds model folders.")
    ] = "miniature",
    variant: Annotated[str | None, typer.Option(help="Which of the weights in a folder, e.g. fp16.")] = None,
    revision: Annotated[str | None, typer.Option(help="Which state of a hub repository: a branch, tag or commit.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, …; by default CUDA if there is one.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16.")] = None,
    offload: Annotated[
        str, typer.Option(help="Where models live: auto, resident, model (one at a time) or layer.")
    ] = "auto",
    vram: Annotated[str | None, typer.Option(help="Device memory to keep within, e.g. 8G; by default what is free.")] = None,
    attention: Annotated[str | None, typer.Option(help="sdpa, xformers or reference; by default diffusers' choice.")] = None,
    fast: Annotated[
        bool, typer.Option("--fast", help="Fuse and rearrange the networks: the same pictures to rounding.")
    ] = False,
) -> "tuple[Chain, Shelf]":
    """The chain, and the shelf that its models come from."""
    import torch

    from ..chains.read import read_chain
    from ..core.errors import BadInput
    from ..core.loading import Shelf, require_known_device

    job = read_chain(
        chain,
        overrides or (),
        prompt=prompt,
        seed=secrets.randbelow(2**32) if seed == -1 else seed,
        steps=steps,
        batch=batch,
        guidance_scale=cfg_scale,
        strength=strength,
    )
    known = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if dtype is not None and dtype not in known:
        raise BadInput(f"There is no dtype {dtype!r}: use {', '.join(known)}.")
    if device is not None:
        require_known_device(device)
    where: Any = {"offload": offload, "vram": vram, "attention": attention, "fast": fast}
    return job, Shelf(models, device, known[dtype] if dtype else None, variant, revision, **where)


def on_chain(command: Callable[..., None]) -> Callable[..., None]:
    """A command of a chain and a shelf as one of the options of :func:`of_chain`, and its own after them."""
    shared = inspect.signature(of_chain).parameters
    _, _, *own = inspect.signature(command).parameters.values()

    @functools.wraps(command)
    def with_options(**given: Any) -> None:
        job, shelf = of_chain(**{name: given.pop(name) for name in shared})
        command(job, shelf, **given)

    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (*shared.values(), *own)]
    with_options.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    with_options.__annotations__ = {p.name: p.annotation for p in parameters}
    del with_options.__wrapped__  # typer would look through to the command's own options
    return with_options
