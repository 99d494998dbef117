"""A chain under way in one file, from which any process goes on to the very same pictures."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..core.errors import BadInput
from ..core.files import held, leftovers, write_atomically
from ..core.latents import FORMAT, packed, unpacked
from ..core.loop import Point
from .chain import Chain
from .outputs import Output, Result
from .record import Machine
from .trail import Mark

STEM = "interrupted"
_NOTHING_YET = "unrolled-run-1"
"""The format of a run that has not made a step; one that has can be read as latents too."""


@dataclass(frozen=True)
class Saved:
    """A chain under way.

    Args:
        chain: as planned, with its systems' usual values filled in.
        machine: what it runs on and where its models come from.
        stage: the one under way, by name.
        point: where that stands; None before its first step.
        result: what the stages before it made.
        claimed: names of outputs, without endings, that it has begun to write.
    """

    chain: Chain
    machine: Machine
    stage: str
    point: Point | None = None
    result: Result = field(default_factory=Result)
    claimed: tuple[str, ...] = ()

    def save(self, path: Path) -> None:
        """Write all of it to one safetensors file, atomically; ``Latents.load`` reads its latents.

        Raises:
            NonFinite: the latents hold NaN or infinity; CannotWrite: see :func:`write_atomically`.
        """
        tensors, run = _packed(self.result)
        run |= {
            "chain": self.chain.model_dump(mode="json"),
            "folder": str(self.chain.folder.resolve()),
            "machine": self.machine.told(),
            "stage": self.stage,
            "step": self.point and self.point.step,
            "claimed": self.claimed,
        }
        metadata = {"format": _NOTHING_YET}
        if self.point is not None:
            more, facts = packed(self.point.latents)
            tensors |= more
            metadata = {"format": FORMAT, "latents": json.dumps(facts)}
        write_atomically(path, save(tensors, metadata | {"run": json.dumps(run)}))

    @classmethod
    def load(cls, path: Path) -> Saved:
        """Read what :meth:`save` wrote; bit-exact.

        Raises:
            BadInput: there is no such file, it is damaged, or of another kind.
        """
        if not path.is_file():
            raise BadInput(f"There is no saved run at {path}.")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if "run" not in metadata:
                    raise BadInput(f"{path} holds no run: give a file that `unrolled run` saved, or the folder it is in.")
                run = json.loads(metadata["run"])
                point = None
                if run["step"] is not None:
                    point = Point(unpacked(file.get_tensor, json.loads(metadata["latents"])), run["step"])
                if any(Path(name).name != name for name in run["claimed"]):
                    raise ValueError("its outputs lie elsewhere")
                return cls(
                    Chain.model_validate(run["chain"] | {"folder": Path(run["folder"])}),
                    Machine.read(run["machine"]),
                    run["stage"],
                    point,
                    _unpacked(file.get_tensor, run),
                    tuple(run["claimed"]),
                )
        except (SafetensorError, KeyError, TypeError, ValueError, AttributeError, RuntimeError, ValidationError) as error:
            said = str(error).splitlines()[0]
            raise BadInput(f"{path} is damaged and cannot be gone on from ({said}): run the chain again.") from error

    def other_weights(self, stage: str, models: Mapping[str, str]) -> str | None:
        """Why a stage cannot go on with these weights, by their fingerprints; None if it can."""
        before = self.result.models.get(stage, models)
        other = sorted(name for name in {**before, **models} if before.get(name) != models.get(name))
        if not other:
            return None
        return f"the weights of {', '.join(other)} are not those that the saved run was begun with: run the chain again."

    def sweep(self, path: Path) -> None:
        """Remove what a killed process left half written: the set of outputs it was at, and temporary files."""
        for name in self.claimed:
            stem = path.with_name(name)
            if (last := stem.with_name(f"{name}.json")).is_file() and not last.stat().st_size:
                for file in path.parent.glob(f"{name}[.-]*"):
                    file.unlink(missing_ok=True)
            leftovers(path.parent, name)
        leftovers(path.parent, path.name)


def find_saved(where: Path) -> Path:
    """The file of a run: itself, or the newest in a folder that no process is still at.

    Raises:
        BadInput: there is none.
    """
    if not where.is_dir():
        return where
    every = sorted(where.glob(f"{STEM}_*.safetensors"), key=lambda file: file.stat().st_mtime_ns)
    found = [file for file in every if is_left(file)]
    if every and not found:
        raise BadInput(f"The run in {where} is still under way: wait for it, or stop it first.")
    for empty in (file for file in found if not file.stat().st_size):
        empty.unlink()  # claimed by a run that was killed before it saved anything
        leftovers(where, empty.name)
    if not (found := [file for file in found if file.exists()]):
        raise BadInput(
            f"There is no saved run in {where}: `unrolled run CHAIN --save-every 1` saves one after every step, "
            "until it is finished."
        )
    return found[-1]


def is_left(path: Path) -> bool:
    """Whether no process is at the run in a file."""
    if (file := held(path)) is None:
        return False
    file.close()
    return True


def _packed(result: Result) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors: dict[str, Tensor] = {}

    def keep(pictures: list[Image.Image], prefix: str) -> int:
        for i, picture in enumerate(pictures):
            tensors[f"{prefix}.{i}"] = torch.from_numpy(np.array(picture))
        return len(pictures)

    outputs = []
    for i, (name, output) in enumerate(result.outputs.items()):
        latents = None
        if output.latents is not None:
            more, latents = packed(output.latents, f"output.{i}.")
            tensors.update(more)
        outputs.append({"name": name, "latents": latents, "pictures": keep(output.made, f"output.{i}.picture")})
    facts = {
        "outputs": outputs,
        "frames": keep(result.frames, "frame"),
        "inputs": list(result.inputs),
        "notes": result.notes,
        "seconds": result.seconds,
        "models": {name: dict(prints) for name, prints in result.models.items()},
        "trail": result.trail,
        "forked": result.forked,
    }
    keep(list(result.inputs.values()), "input")
    return tensors, facts


def _unpacked(tensor: Callable[[str], Tensor], facts: Mapping[str, Any]) -> Result:
    def pictures(count: int, prefix: str) -> list[Image.Image]:
        return [Image.fromarray(tensor(f"{prefix}.{i}").numpy()) for i in range(count)]

    result = Result(
        frames=pictures(facts["frames"], "frame"),
        inputs=dict(zip(facts["inputs"], pictures(len(facts["inputs"]), "input"), strict=True)),
        notes=list(facts["notes"]),
        forked=facts["forked"],
        seconds=dict(facts["seconds"]),
        models=dict(facts["models"]),
        trail={name: [[Mark(*mark) for mark in images] for images in steps] for name, steps in facts["trail"].items()},
    )
    for i, output in enumerate(facts["outputs"]):
        held = output["latents"]
        latents = None if held is None else unpacked(tensor, held, f"output.{i}.")
        result.outputs[output["name"]] = Output(latents, pictures(output["pictures"], f"output.{i}.picture"))
    return result
