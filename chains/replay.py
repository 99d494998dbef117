"""Making a picture again from what is written in it, and saying what is different if it is."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from pydantic import ValidationError

from ..core.errors import BadInput
from ..core.loading import Shelf
from .chain import Chain, Denoising
from .fork import fork
from .outputs import Result
from .read import PACKAGED
from .record import Machine, dtype_of, manifest, read_manifest
from .run import run
from .runner import Watch
from .trail import Trail, distance, picture_digest, read_trail

_LEFT_ALONE = {"chain", "forked", "made_in", "notes", "seconds", "pixels", "trail"}
"""What a manifest says that is no circumstance: what was asked for, and what came of it."""


class Apart(NamedTuple):
    """Where two runs are first apart.

    Args:
        stage, step: of the first step whose latents differ.
        there, last: relative distance of the latents there, and after the last step of that stage.
    """

    stage: str
    step: int
    there: float
    last: float


@dataclass(frozen=True)
class Replayed:
    """A picture made again.

    Args:
        result: the run, ``index`` says which of its pictures it is.
        same: whether every pixel is.
        apart: where the runs are first apart; None if no step is.
        changed: what is not as it was: versions, device, weights, kernels, inputs.
        pixels: mean and largest difference of the pixels, 0 to 255; NaN where the file of the first is no copy of them.
    """

    result: Result
    index: int
    same: bool
    apart: Apart | None
    changed: tuple[str, ...]
    pixels: tuple[float, float] = (0.0, 0.0)

    @property
    def picture(self) -> Image.Image:
        """As it came out now."""
        return self.result.pictures[self.index]

    def __str__(self) -> str:
        """In words, a line each."""
        if self.same:
            return "identical"
        if self.apart is None:
            said = "every step is the same, but the picture is not: it was decoded or finished otherwise"
        else:
            stage, step, there, last = self.apart
            said = f"apart from step {step + 1} of stage {stage!r} on, by {there:.1e} there and {last:.1e} at its end"
        mean, most = self.pixels
        seen = "" if math.isnan(mean) else f"; pixels by {mean:.2g} of 255 in the mean, at most {most:.0f}"
        return "\n".join([said + seen, *(f"changed: {what}" for what in self.changed or ("nothing that is written down",))])


def replay(
    path: Path,
    shelf: Shelf | None = None,
    inputs: Path | None = None,
    watch: Watch | None = None,
    *,
    free: bool = False,
    allow_pickle: bool = False,
) -> Replayed:
    """Make a picture again from its manifest, the batch it was made in with it, and compare step by step.

    Args:
        path: a picture that a chain wrote, or the .json beside it.
        shelf: where the models come from and what they run on; by default as it was, on this machine's device.
        inputs: the folder of the pictures that went in; by default beside the picture, here, or the package's own.
        allow_pickle: read pickled weights if the picture names some: it may be a stranger's.

    Raises:
        BadInput: nothing in the file says how it was made, what went in is not there, or it names pickled weights.
    """
    before = _moved(read_manifest(path), inputs or path.parent)
    try:
        made_in, machine = before["made_in"], _machine(before)
        chain = Chain.model_validate(before["chain"] | {"seed": made_in["seed"], "batch": made_in["batch"]})
        index, trail = int(made_in["index"]), read_trail(before["trail"])
        if not 0 <= index < chain.batch:
            raise ValueError(f"picture {index} of {chain.batch}")
    except (KeyError, TypeError, ValueError, AttributeError, ValidationError) as error:
        said = str(error).splitlines()[0]
        raise BadInput(f"What {path} says of how it was made cannot be used ({said}): it is of another version.") from error
    told = [before["chain"], (before.get("forked") or {}).get("chain", {})]
    if not allow_pickle and any(stage.get("allow_pickle") for part in told for stage in part.get("stages", ())):
        raise BadInput(f"{path} names pickled weights, and it may be a stranger's: say --allow-pickle if you trust them.")
    chain = chain.model_copy(update={"folder": _folder(chain, path, inputs)})
    shelf = shelf or machine.shelf()
    if forked := before.get("forked"):
        result = _branch(path, forked, chain, shelf, watch, free)
    else:
        result = run(chain, shelf, watch=watch, free=free)
    after = manifest(chain, index, result, Machine.of(shelf))
    same = after["pixels"] == before["pixels"]
    mean, most = (0.0, 0.0) if same else _pixels_apart(path, before["pixels"], result.pictures[index])
    changed = tuple(changes(before, after))
    return Replayed(result, index, same, first_apart(trail, read_trail(after["trail"])), changed, (mean, most))


def _branch(path: Path, forked: Mapping[str, Any], chain: Chain, shelf: Shelf, watch: Watch | None, free: bool) -> Result:
    """A run that leaves another one at some step, with that one."""
    try:
        parent, stage, step = Chain.model_validate(forked["chain"]), str(forked["stage"]), int(forked["step"])
    except (KeyError, TypeError, ValueError) as error:
        raise BadInput(f"{path} is a branch of a run that it does not tell well ({str(error).splitlines()[0]}).") from error
    if forked.get("edited"):
        raise BadInput(f"{path} comes from latents edited after step {step} of {stage!r}: it cannot be made again.")
    parent = parent.model_copy(update={"folder": chain.folder})
    return fork(parent, chain, shelf, step, stage, watch=watch, free=free).branch


def first_apart(before: Trail, after: Trail) -> Apart | None:
    """The first step of the first stage that is not the same; a step that only one run has is infinitely far."""
    for stage in [*before, *(name for name in after if name not in before)]:
        ours, theirs = after.get(stage, ()), before.get(stage, ())
        far = [distance(a, b) for a, b in zip(ours, theirs, strict=False)]
        far += [math.inf] * abs(len(ours) - len(theirs))
        at = next((i for i, d in enumerate(far) if d), None)
        if at is not None:
            return Apart(stage, (ours if at < len(ours) else theirs)[at].step, far[at], far[-1])
    return None


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    """What is not as it was, beside what was asked for."""
    for key, was in before.items():
        now = after.get(key)
        if key in _LEFT_ALONE or was == now:
            continue
        if isinstance(was, Mapping) and isinstance(now, Mapping):
            for name in {**was, **now}:
                if was.get(name) != now.get(name):
                    yield from _named(key, name, was.get(name), now.get(name))
        else:
            yield f"{key.replace('_', ' ')}: {was} -> {now}"


def _named(key: str, name: str, was: object, now: object) -> Iterator[str]:
    if key == "models":
        if not isinstance(was, Mapping) or not isinstance(now, Mapping):
            return  # a stage that only one of them has
        other = [part for part in {**was, **now} if was.get(part) != now.get(part)]
        yield f"the weights of {name}: {', '.join(other)}"
    elif key == "inputs":
        yield f"the input {name}" + (" is not there now" if now is None else " is another picture")
    else:
        yield f"{name}: {was or 'not installed'} -> {now or 'not installed'}"


def _machine(facts: Mapping[str, Any]) -> Machine:
    """What the picture was made on, as far as it is here."""
    device = torch.device("cuda" if torch.cuda.is_available() and facts.get("threads") is None else "cpu")
    how = (facts["variant"], facts["revision"], facts["attention"], facts["fast"])
    return Machine(device, dtype_of(facts["dtype"]), facts["models_from"], *how)


def _moved(facts: dict[str, Any], folder: Path) -> dict[str, Any]:
    """With bare names in place of absolute ones that are not there, for files that lie in a folder now."""
    here = {path.name for path in folder.iterdir()} if folder.is_dir() else set()

    def moved(told: Any) -> Any:
        if isinstance(told, dict):
            return {moved(key): moved(value) for key, value in told.items()}
        if isinstance(told, list):
            return [moved(part) for part in told]
        gone = isinstance(told, str) and (path := Path(told)).is_absolute() and path.name in here and not path.exists()
        return Path(told).name if gone else told

    return facts | {key: moved(facts[key]) for key in ("chain", "forked", "inputs") if key in facts}


def _folder(chain: Chain, path: Path, given: Path | None) -> Path:
    """Where all pictures and latents are that go into a chain, and as many of its adapters as are in one such place."""
    stages = [stage for stage in chain.stages if isinstance(stage, Denoising)]
    named = [getattr(stage, key, None) for stage in stages for key in ("image", "mask", "latents")]
    beside = ((*stage.control, stage.image_prompt, *(stage.prior.mix if stage.prior else ())) for stage in stages)
    named += [told.image for several in beside for told in several if told is not None]
    names = [name for name in named if name]
    adapters = [name for stage in stages for name in (*(told.file for told in stage.lora), *stage.embeddings.values())]
    places = [given] if given is not None else [path.parent, path.parent.parent, Path.cwd(), PACKAGED]
    fit = [place for place in places if all((place / name).is_file() for name in names)]
    if not fit:
        wanted = ", ".join(names)
        raise BadInput(
            f"{path.name} was made from {wanted}, not to be found in {places[0]}: give their folder with --inputs."
        )
    return max(fit, key=lambda place: sum((place / name).exists() for name in adapters))


def _pixels_apart(path: Path, known: str, now: Image.Image) -> tuple[float, float]:
    """Mean and largest difference from the picture in a file, if that holds the very pixels that were made."""
    if path.suffix == ".json":
        path = path.with_suffix(".png")
    if not path.is_file():
        return math.nan, math.nan
    with Image.open(path) as file:
        was = file.convert("RGB")
    if picture_digest(was) != known or was.size != now.size:
        return math.nan, math.nan
    far = np.abs(np.asarray(was, np.float64) - np.asarray(now.convert("RGB"), np.float64))
    return float(far.mean()), float(far.max())
