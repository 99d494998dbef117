"""What a run makes: pictures, latents, files, and what is saved when it fails."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from ..core.files import claim, write_atomically
from ..core.latents import Latents, batch
from ..stages import finish
from .chain import Chain
from .record import Machine, encode, manifest, parameters
from .trail import Mark


@dataclass
class Output:
    """What a stage made: latents, or pictures, or both; pictures are decoded when first asked for."""

    latents: Latents | None = None
    made: list[Image.Image] = field(default_factory=list)
    decoder: Callable[[Latents], list[Image.Image]] | None = None

    @property
    def is_picture(self) -> bool:
        """Whether there is a picture to see: not for a run that was stopped while still noisy."""
        return bool(self.made) or (self.latents is not None and self.latents.is_clean)

    def pictures(self) -> list[Image.Image]:
        """As many as there are seeds."""
        if not self.made and self.decoder is not None and self.latents is not None:
            self.made = self.decoder(self.latents)
        return self.made


@dataclass
class Result:
    """A finished run: the pictures of each stage, and the files written.

    Args:
        inputs: picture files that went in, by name.
        frames: of the first image's animation.
        models: fingerprints of the weights of every stage's model, and of its prior.
        trail: of every stage, of every step, of every image.
        forked: what run it is a branch of, and where it leaves it; see :mod:`.fork`.
    """

    outputs: dict[str, Output] = field(default_factory=dict)
    inputs: dict[str, Image.Image] = field(default_factory=dict)
    frames: list[Image.Image] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    models: dict[str, Mapping[str, str]] = field(default_factory=dict)
    trail: dict[str, list[list[Mark]]] = field(default_factory=dict)
    forked: dict[str, Any] | None = None

    @property
    def pictures(self) -> list[Image.Image]:
        """The last stage's, one per seed."""
        return list(self.outputs.values())[-1].pictures()


def joined(first: Result, second: Result, note: str) -> Result:
    """Two runs of one chain on parts of a batch as one."""
    for name, theirs in second.outputs.items():
        mine = first.outputs[name]
        made = mine.made + theirs.made if mine.made and theirs.made else []
        latents = batch([mine.latents, theirs.latents]) if mine.latents and theirs.latents else None
        first.outputs[name] = Output(latents, made, mine.decoder)
        first.seconds[name] += second.seconds[name]
    for name, steps in second.trail.items():
        first.trail[name] = [mine + theirs for mine, theirs in zip(first.trail[name], steps, strict=True)]
    first.files += second.files
    first.notes[:] = [note, *first.notes, *second.notes]
    return first


def write(
    chain: Chain,
    result: Result,
    machine: Machine,
    folder: Path,
    stem: str = "output",
    announce: Callable[[str], object] = lambda name: None,
    before: Sequence[Path] = (),
) -> None:
    """Write what the chain asks for, one set of files per image; nothing is overwritten, and names are announced first.

    Args:
        before: names of sets, without endings, that a killed process announced: images that are whole there stay.
    """
    for index, (seed, picture) in enumerate(zip(chain.seeds(), result.pictures, strict=True)):
        facts = manifest(chain, index, result, machine)
        if (name := next((name for name in before if _is_of(name, facts)), None)) is not None:
            result.files += sorted(file for file in folder.glob(f"{name.name}[.-]*") if file.suffix != ".json")
            continue
        name = claim(folder, stem, ".json", announce)
        text = parameters(chain, seed, picture.size)
        try:
            for ending in chain.formats:
                result.files.append(write_atomically(f"{name}.{ending}", encode(picture, ending, text, facts)))
            if chain.grid:
                result.files.append(write_atomically(f"{name}-grid.png", encode(sheet(result, index), "png", text, facts)))
            if chain.gif and index == 0:
                frames = [finish.resize(frame, size=picture.size) for frame in [*result.frames, picture]]
                result.files.append(write_atomically(f"{name}.gif", finish.gif(frames)))
            write_atomically(f"{name}.json", json.dumps(facts, indent=1, ensure_ascii=False).encode())
        except BaseException:
            if not Path(f"{name}.json").stat().st_size:
                for file in folder.glob(f"{name.name}[.-]*"):
                    file.unlink()
            raise


def _is_of(name: Path, facts: Mapping[str, Any]) -> bool:
    """Whether a set of files is whole, which its .json says that is written last, and of an image of these facts."""
    try:
        told = json.loads(name.with_name(f"{name.name}.json").read_text(encoding="utf-8"))
        return all(told[key] == json.loads(json.dumps(facts[key])) for key in ("chain", "made_in", "trail", "pixels"))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def sheet(result: Result, index: int = 0, high: int | None = None) -> Image.Image:
    """What went into one image and every stage's picture of it, side by side.

    Args:
        high: the height of each in pixels; by default the highest one's.
    """
    seen = {Path(name).stem: picture for name, picture in result.inputs.items()}
    seen |= {name: output.pictures()[index] for name, output in result.outputs.items() if output.is_picture}
    high = high or max(picture.height for picture in seen.values())
    same = len({picture.size for picture in seen.values()}) == 1
    labels = [name if same else f"{name} {picture.width}x{picture.height}" for name, picture in seen.items()]
    alike = [finish.resize(picture, high / picture.height) for picture in seen.values()]
    return finish.grid(alike, columns=len(alike), labels=labels)


def rescue(chain: Chain, result: Result, machine: Machine, folder: Path) -> None:
    """Write the pictures of the stages that are finished before an error goes on up."""
    finished = [output for output in result.outputs.values() if output.is_picture]
    if finished and finished[-1] is list(result.outputs.values())[-1]:
        with suppress(Exception):  # a further error must not hide the first
            write(chain.model_copy(update={"grid": False, "gif": False}), result, machine, folder, "unfinished")
