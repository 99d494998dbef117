"""Runs a chain: a thin reader over the stage functions, that loses nothing already made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..core.errors import BadInput, OutOfMemory
from ..core.files import held, require_writable
from ..core.loading import Shelf
from .cache import Cache
from .chain import Chain, FromPicture
from .outputs import Result, joined, write
from .plan import plan
from .record import Machine
from .runner import Observe, Runner, Sources, Watch
from .saved import STEM, Saved, find_saved


def run(
    chain: Chain,
    shelf: Shelf,
    folder: Path | None = None,
    watch: Watch | None = None,
    *,
    free: bool = False,
    sources: Sources | None = None,
    observe: Observe | None = None,
    save_every: int = 0,
    cache: Cache | None = None,
) -> Result:
    """Run every stage and write what the chain asks for into ``folder`` (nothing is written without one).

    When a stage fails or is interrupted, the pictures of the stages before it are written, and the run itself, so that
    :func:`resume` takes it up again. A batch that does not fit into memory is tried again in halves.

    Args:
        watch: called after every step.
        free: let go of every model that no later stage needs, and before the first stage of all others on the shelf.
        sources: gives every stage, and every prior, its source of noise in place of the seeds; for comparisons.
        observe: looks into every denoising stage.
        save_every: save the run after every so many steps of a stage, so that it can be resumed even if it is killed.
        cache: steps that another run has made are taken from there, and watched by nobody; what is made is kept there.

    Raises:
        UnrolledError: what went wrong, with the stage's name.
    """
    if save_every < 0:
        raise BadInput(f"A run is saved every so many steps, 0 for never, not every {save_every}.")
    if save_every and folder is None:
        raise BadInput("A run is saved in the folder that it writes into: give one, or leave save_every out.")
    how: Any = {"free": free, "sources": sources, "observe": observe, "save_every": save_every, "cache": cache}
    return _run(chain, shelf, folder, watch, **how)


def resume(
    where: Path,
    shelf: Shelf | None = None,
    watch: Watch | None = None,
    *,
    free: bool = False,
    observe: Observe | None = None,
    save_every: int = 0,
) -> Result:
    """Go on with a run that was saved, to the same pictures as if it had never stopped.

    Args:
        where: the file, or the folder it is in; there the pictures are written too. It is gone once they are.
        shelf: other models or another device than it was begun with; then the pictures are not the same.

    Further arguments as of :func:`run`.

    Raises:
        BadInput: there is no saved run, it is damaged, or still under way; BadModel: the weights are no longer those it was
            begun with.
    """
    path = find_saved(where)
    saved = Saved.load(path)
    if (at := held(path)) is None:
        raise BadInput(f"The run in {path} is still under way: wait for it, or stop it first.")
    others = [file.name for file in path.parent.glob(f"{STEM}_*.safetensors") if file != path]
    if others:
        saved.result.notes.append(f"This was {path.name}; {', '.join(sorted(others))} can be gone on with too.")
    with at:
        saved.sweep(path)
        how: Any = {"free": free, "observe": observe, "save_every": save_every, "since": saved, "path": path}
        return _run(saved.chain, shelf or saved.machine.shelf(), path.parent, watch, **how)


def go_on(
    saved: Saved,
    shelf: Shelf,
    folder: Path | None = None,
    watch: Watch | None = None,
    *,
    free: bool = False,
    observe: Observe | None = None,
) -> Result:
    """Run the rest of a chain from where it stands; arguments as of :func:`run`."""
    return _run(saved.chain, shelf, folder, watch, free=free, observe=observe, since=saved)


def _run(
    chain: Chain,
    shelf: Shelf,
    folder: Path | None,
    watch: Watch | None,
    *,
    free: bool,
    sources: Sources | None = None,
    observe: Observe | None = None,
    save_every: int = 0,
    cache: Cache | None = None,
    since: Saved | None = None,
    path: Path | None = None,
) -> Result:
    if free:
        shelf.keep()
    plans = plan(chain, shelf)
    if shelf.models == "hub":  # all that is needed is fetched before anything runs
        plans = plan(chain, shelf, weights=True)
    if folder is not None:
        require_writable(folder)
    chain = chain.model_copy(update={"stages": tuple(item.stage for item in plans)})
    runner = Runner(chain, plans, shelf, watch, free, sources, observe, save_every, folder, path, since, cache)
    try:
        if save_every:
            runner.save()
        result = runner.run()
        if folder is not None:
            before = [folder / name for name in since.claimed] if since else []
            write(chain, result, Machine.of(shelf), folder, announce=runner.announce, before=before)
        runner.done()
        return result
    except BaseException as error:
        whole = any(isinstance(stage, FromPicture) and stage.latents for stage in chain.stages)
        if not isinstance(error, OutOfMemory) or chain.batch == 1 or whole or since is not None:
            runner.rescue()
            raise
    runner.done()
    del runner
    half = chain.batch // 2
    rest = chain.model_copy(update={"seed": chain.seed + half, "batch": chain.batch - half})
    how: Any = {"free": free, "sources": sources, "observe": observe, "save_every": save_every, "cache": cache}
    first, second = (_run(part, shelf, folder, watch, **how) for part in (chain.model_copy(update={"batch": half}), rest))
    return joined(first, second, f"The batch did not fit into memory and was run in parts of {half}.")
