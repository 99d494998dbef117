"""What every step of a stage depends on, as a digest: two runs with the same one have the same latents there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..core.checkpoint import fingerprint, fingerprint_of
from ..core.hub import CONFIGS
from ..core.latents import packed
from ..core.loading import Shelf
from ..core.source import Source
from ..core.weights import read_json
from .chain import Chain, Denoising
from .outputs import Output
from .plan import StagePlan
from .record import Machine, device_name, versions
from .trail import picture_digest

_BY_STEP = {"name", "after", "guidance_scale", "guidance_interval", "stop"}
"""Options that are no part of every step, or change only some."""

_PROMPTS = {"prompt", "negative_prompt", "prompt_2", "negative_prompt_2"}

_CODE = ("core", "stages", "schedulers", "kernels", "chains")
"""The folders of this package that make latents."""


class Keys(NamedTuple):
    """Of one stage.

    Args:
        setting: of all that goes into every step.
        steps: of what each step depends on, all before it included; repetitions one after the other.
    """

    setting: str
    steps: tuple[str, ...]


def keys_of(chain: Chain, item: StagePlan, before: Output | None, stream: str, shelf: Shelf) -> Keys | None:
    """The keys of a stage that is handed ``before``; None for one that does not denoise."""
    stage = item.stage
    if not isinstance(stage, Denoising) or item.run is None or item.source is None:
        return None
    machine = Machine.of(shelf)
    setting = _digest(
        {
            "versions": versions(),
            "code": _code(),
            "device": device_name(machine.device),
            "threads": torch.get_num_threads(),
            "how": [str(machine.dtype), machine.attention, machine.fast],
            "weights": [weights_of(item.source), item.changes.fingerprints(), item.companions.fingerprints()],
            "prior": item.prior and weights_of(item.prior),
            "configs": [_configs(source) for source in (item.source, item.prior) if source is not None],
            "stage": stage.model_dump(mode="json", exclude=_BY_STEP),
            "files": [fingerprint_of(file) for file in _files(stage, chain.folder)],
            "size": item.size,
            "levels": len(item.run.whole),
            "noise": [chain.seeds(), stream, item.continues],
            "before": before and _handed(before, pixels=item.decodes),
        }
    )
    found, key = list[str](), setting
    for repetition in range(item.repeats):
        for step in item.trace:
            scales = [item.guidance_at(prediction.sigma) for prediction in step.predictions]
            key = _digest([key, repetition, step.index, step.sigma, step.sigma_next, step.timestep, scales])
            found.append(key)
    return Keys(setting, tuple(found))


def stream_of(chain: Chain, index: int) -> str:
    """Every denoising stage draws its own noise; the first one what a script draws by default."""
    first = next((i for i, stage in enumerate(chain.stages) if isinstance(stage, Denoising)), 0)
    return "" if index == first else chain.stages[index].name


def weights_of(source: Source) -> dict[str, str]:
    """Fingerprints of a model's components, without loading it."""
    return {name: fingerprint(source.part(name)) for name in source.parts}


@cache
def _code() -> str:
    """A digest of this package's own code: who changes a solver wants other latents, whatever the version says."""
    root = Path(__file__).parent.parent
    found = sorted(path for folder in _CODE for path in (root / folder).rglob("*") if path.suffix in (".py", ".json"))
    return _digest([[str(path.relative_to(root)), hashlib.sha256(path.read_bytes()).hexdigest()] for path in found])


def _configs(source: Source) -> list[Any]:
    """What a model says of itself beside its components: how it was trained, what it makes of no prompt."""
    files = (file for name in CONFIGS for file in sorted(source.folders[name].glob("*.json")))
    return [source.index, dict(source.changes), *(read_json(file) for file in files)]


def _files(stage: Denoising, folder: Path) -> Iterator[Path]:
    """Every file that the stage names, whatever for; prompts name none."""

    def leaves(value: Any) -> Iterator[str]:
        if isinstance(value, str):
            yield value
        elif isinstance(value, list):
            for part in value:
                yield from leaves(part)
        elif isinstance(value, dict):
            for key, part in value.items():
                if key not in _PROMPTS:
                    yield from leaves(part)

    for name in leaves(stage.model_dump(mode="json")):
        if name and (path := folder / name).is_file():
            yield path


def _handed(before: Output, *, pixels: bool) -> list[Any]:
    """A digest of what a stage made, as the next one takes it."""
    if pixels or before.latents is None:
        return [picture_digest(picture) for picture in before.pictures()]
    tensors, facts = packed(before.latents)
    return [facts, *(hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for tensor in tensors.values())]


def _digest(value: Sequence[Any] | dict[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()
