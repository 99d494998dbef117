"""LoRAs and learned words of a stage: found and checked for the plan, on its model while it runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from ..core.checkpoint import fingerprint_of, layer_shapes
from ..core.loading import Model, Shelf
from ..core.lora import PARTS, lora, peft_config, read_lora
from ..core.source import Source, find_file
from ..core.textual_inversion import read_vectors, textual_inversion
from ..core.weights import has_weights
from .chain import Denoising


@dataclass(frozen=True)
class Changes:
    """What a stage's model is changed by.

    Args:
        loras: files and their weights.
        words: files by the word that stands for each in prompts.
        allow_pickle: whether those of words may be pickles of tensors.
    """

    loras: tuple[tuple[Path, float], ...] = ()
    words: Mapping[str, Path] = field(default_factory=dict)
    allow_pickle: bool = False

    @contextmanager
    def on(self, model: Model) -> Iterator[None]:
        """All of it on a model, for a ``with`` block."""
        with ExitStack() as stack:
            for file, weight in self.loras:
                stack.enter_context(lora(model, file, weight))
            for word, file in self.words.items():
                stack.enter_context(textual_inversion(model, word, file, allow_pickle=self.allow_pickle))
            yield

    def fingerprints(self) -> dict[str, str]:
        """Digests of the files, by names that no component of a model has; PEFT's LoRAs are of two each."""
        found = {f"lora {i}": fingerprint_of(file) for i, (file, _) in enumerate(self.loras, 1)}
        configs = {f"lora {i}, config": peft_config(file) for i, (file, _) in enumerate(self.loras, 1)}
        found |= {name: fingerprint_of(file) for name, file in configs.items() if file.is_file()}
        return found | {f"embedding {word}": fingerprint_of(file) for word, file in self.words.items()}


def find_changes(stage: Denoising, source: Source, shelf: Shelf, folder: Path) -> Changes:
    """Where a stage's LoRAs and words lie, checked against its model's weights where those are on this disk.

    Args:
        folder: what file names are relative to.

    Raises:
        BadModel: a file is missing, damaged, of another kind or for another model.
    """

    def find(name: str) -> Path:
        here = folder / name
        return here if here.is_file() else find_file(name, shelf.models, shelf.revision, stage.allow_pickle)

    changes = Changes(
        tuple((find(told.file), told.weight) for told in stage.lora),
        {word: find(name) for word, name in stage.embeddings.items()},
        stage.allow_pickle,
    )
    parts = [source.part(name) for name in PARTS if name in source.parts]
    if changes.loras and all(has_weights(part) for part in parts):
        shapes = {part.name: layer_shapes(part) for part in parts}
        for file, _ in changes.loras:
            read_lora(file, shapes, source.name, source.config("unet").get("layers_per_block", 2))
    widths = {part.name: source.config(part.name)["hidden_size"] for part in parts if part.name != "unet"}
    for file in changes.words.values():
        read_vectors(file, widths, source.name, stage.allow_pickle)
    return changes


def lines(stage: Denoising) -> Iterator[str]:
    """What a plan says of them."""
    for told in stage.lora:
        yield f"LoRA {Path(told.file).stem}, {told.weight:g}"
    for word, name in stage.embeddings.items():
        yield f"{word} as {Path(name).stem}"


def notes(stage: Denoising) -> Iterator[str]:
    """What may surprise."""
    for told in stage.lora:
        if not told.weight:
            yield f"the LoRA {told.file} has the weight 0, which adds nothing: leave it out"
