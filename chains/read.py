"""Chain files: TOML that reads like what it does, every mistake named with its line."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from ..core.errors import BadChain, closest
from .chain import KINDS, STAGE, Chain, Named, Stage, stage_names

_FILES = ("image", "latents", "mask", "lora", "embeddings", "control", "image_prompt")
PACKAGED = Path(__file__).parent
"""The chain files that come with the package."""


def packaged_chains() -> dict[str, Path]:
    """The chains that come with the package, by name."""
    return {path.stem: path for path in sorted(PACKAGED.glob("*.toml"))}


def read_chain(source: str | Path, overrides: Sequence[str] = (), **shared: object) -> Chain:
    """A chain from a file or the name of one that comes with the package.

    Args:
        overrides: ``key=value`` for every stage or ``stage.key=value`` for one; values are TOML, and what
            is not TOML is text.
        shared: further keys for every stage (None is left out).

    Raises:
        BadChain: no such file, not TOML, or a key or value that is not allowed; the line is named.
    """
    path = _find(source)
    if path.suffix == ".safetensors":
        raise BadChain(f"{path} is no chain file: if it is a run that was stopped, `unrolled resume {path}` goes on.")
    try:
        text = path.read_text(encoding="utf-8")
        document = tomllib.loads(text)
    except (OSError, UnicodeDecodeError) as error:
        raise BadChain(f"{path} cannot be read as a chain file ({error}): it must be TOML in UTF-8.") from error
    except tomllib.TOMLDecodeError as error:
        raise BadChain(f"{path} is not valid TOML: {error}.") from error
    stages = document.pop("stage", [])
    if not isinstance(stages, list) or not stages:
        raise BadChain(f"{path} has no [[stage]]: a chain needs at least one.")
    for key, value in shared.items():
        if value is not None:
            _everywhere(document, stages, key, value)
    for override in overrides:
        _override(document, stages, override)
    _make_way_for_levels(document, stages, [override.partition("=")[0].strip() for override in overrides], shared)
    given = {key for key, value in shared.items() if value is not None}
    given |= {override.partition("=")[0].strip().split(".")[-1] for override in overrides}
    return _assemble(document, stages, _Locator(path, text, given))


def changed(chain: Chain, overrides: Sequence[str], **shared: object) -> Chain:
    """The same chain with some keys changed, given as to :func:`read_chain`; raises as it does."""
    document = chain.model_dump(exclude={"stages", "folder"})
    stages = [stage.model_dump(exclude_unset=True) | {"do": stage.do, "name": stage.name} for stage in chain.stages]
    for key, value in shared.items():
        if value is not None:
            _everywhere(document, stages, key, value)
    for override in overrides:
        _override(document, stages, override)
    given = {*shared, *(override.partition("=")[0].strip().split(".")[-1] for override in overrides)}
    return _assemble(document, stages, _Locator(chain.folder / "a chain", "", given))


def _assemble(shared: dict[str, Any], stages: list[dict[str, Any]], where: _Locator) -> Chain:
    kinds = [_kind(stage, where, i) for i, stage in enumerate(stages)]
    own = Chain.model_fields.keys() - {"stages", "folder"}
    for key in shared:
        if key not in own and not any(key in kind.model_fields for kind in kinds):
            known = {*own, *(k for kind in kinds for k in kind.model_fields)}
            raise where.error(None, key, f"unknown key {key!r}{closest(key, known)}")
    full: list[Stage] = []
    for i, (kind, stage) in enumerate(zip(kinds, stages, strict=True)):
        inherited = {key: value for key, value in shared.items() if key in kind.model_fields and key not in own}
        try:
            full.append(STAGE.validate_python(inherited | stage))
        except ValidationError as error:
            raise where.fault(i, error, kind) from error
    try:
        return Chain(stages=tuple(full), folder=where.path.parent, **{key: shared[key] for key in shared if key in own})
    except ValidationError as error:
        raise where.fault(None, error, Chain) from error


def _kind(stage: Mapping[str, Any], where: _Locator, index: int) -> type[Named]:
    do = stage.get("do")
    if do not in KINDS:
        raise where.error(index, "do", f"do = {do!r} is not a stage; use one of {', '.join(KINDS)}")
    return KINDS[do]


def _everywhere(document: dict[str, Any], stages: list[dict[str, Any]], key: str, value: object) -> None:
    """What is given from outside for the whole chain goes before what single stages say."""
    document[key] = value
    for stage in stages:
        stage.pop(key, None)


def _override(document: dict[str, Any], stages: list[dict[str, Any]], override: str) -> None:
    key, equals, raw = override.partition("=")
    if not equals or not key.strip():
        raise BadChain(f"--set {override!r} is not of the form key=value or stage.key=value.")
    try:
        value = tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        value = raw
    if {*_FILES} & {*key.strip().split(".")}:
        value = _here(value)
    first, dot, rest = key.strip().partition(".")
    if not dot:
        return _everywhere(document, stages, first, value)
    names = stage_names(stages)
    shared = any(first in kind.model_fields for kind in KINDS.values())
    if first not in names and not shared:
        raise BadChain(f"--set {override!r} names no stage of this chain; its stages are {', '.join(names)}.")
    # A table such as scheduler may be reached into in all stages at once.
    tables = [stages[names.index(first)]] if first in names else [document.setdefault(first, {})]
    tables += [stage[first] for stage in stages if first not in names and first in stage]
    *parents, last = rest.split(".")
    for table in tables:
        for parent in parents:
            table = table.setdefault(parent, {}) if isinstance(table, dict) else table
        if not isinstance(table, dict):
            raise BadChain(f"--set {override!r} reaches into {first}, which is a single value.")
        table[last] = value


def _here(value: Any) -> Any:
    """One's own files, whatever folder the chain lies in."""
    if isinstance(value, list):
        return [_here(part) for part in value]
    if isinstance(value, dict):
        return {key: _here(part) for key, part in value.items()}
    return str(Path(value).resolve()) if isinstance(value, str) and Path(value).is_file() else value


def _make_way_for_levels(
    document: dict[str, Any], stages: list[dict[str, Any]], overridden: Sequence[str], shared: Mapping[str, object]
) -> None:
    """Levels given from outside have a number of steps of their own, whatever the file says."""
    outside = {key.split(".")[-1] for key in overridden}
    if not outside & {"sigmas", "timesteps"} or "steps" in outside or shared.get("steps") is not None:
        return
    for stage in stages:
        if {"sigmas", "timesteps"} & {*stage, *document}:
            stage.pop("steps", None)
    if {"sigmas", "timesteps"} & document.keys():
        document.pop("steps", None)
    elif "steps" in document:  # only some stages have levels of their own
        steps = document.pop("steps")
        for stage in stages:
            if not {"sigmas", "timesteps"} & stage.keys():
                stage.setdefault("steps", steps)


def _find(source: str | Path) -> Path:
    path = Path(source)
    if path.is_file():
        return path
    packaged = packaged_chains()
    if str(source) in packaged:
        return packaged[str(source)]
    near = closest(str(source), set(packaged))
    raise BadChain(f"There is no chain file {source}: use a path, or one of {', '.join(packaged)}{near or '.'}")


class _Locator:
    """Names the line of a chain file that a fault lies in."""

    def __init__(self, path: Path, text: str, given: set[str]) -> None:
        self.path, self.lines, self.given = path, text.splitlines(), given

    def fault(self, stage: int | None, error: ValidationError, kind: type[BaseModel]) -> BadChain:
        """The first of pydantic's complaints as one sentence."""
        first = error.errors()[0]
        # pydantic names the alternatives of a key after it: only what a file can hold is a name of it.
        parts = [str(part) for part in first["loc"] if str(part) not in KINDS]
        names = [part for part in parts if not part.startswith("literal[") and part != "Cut"]
        key = names[0] if names else ""
        if first["type"] == "extra_forbidden":
            message = f"unknown key {names[-1]!r}{closest(names[-1], kind.model_fields if len(names) == 1 else ())}"
        elif first["type"] == "missing":
            message = f"the key {'.'.join(names)!r} is needed"
        elif first["type"] == "value_error":
            message = str(first["ctx"]["error"])
        else:
            reason = first["msg"][0].lower() + first["msg"][1:]
            reason = reason.replace("valid tuple", 'list, e.g. ["jpg"]')
            message = f"{'.'.join(names)} = {first['input']!r} is not allowed: {reason}"
        return self.error(stage, key, message)

    def error(self, stage: int | None, key: str, message: str) -> BadChain:
        """``message`` with the line of ``key`` in a stage or above the first; not if it was given from outside."""
        message = message if message.endswith("?") else f"{message}."
        if key in self.given:
            return BadChain(f"Given for {self.path.name}: {message}")
        heads = [i for i, line in enumerate(self.lines) if re.match(r"\s*\[\[\s*stage\s*\]\]", line)]
        start, end = (0, heads[0] if heads else len(self.lines))
        if stage is not None and stage < len(heads):
            start, end = heads[stage], [*heads, len(self.lines)][stage + 1]
        for area in (range(start, end), range(heads[0] if heads else 0)):
            for i in area:
                if re.match(rf"\s*\[?\s*[\"']?{re.escape(key)}[\"']?\s*[=.\]]", self.lines[i]) and key:
                    return BadChain(f"{self.path}, line {i + 1}: {message}")
        line = f", line {start + 1}" if stage is not None and heads else ""
        return BadChain(f"{self.path}{line}: {message}")
