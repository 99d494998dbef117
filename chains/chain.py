"""Chain files: TOML that reads like what it does, checked key by key."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, TypeAdapter, ValidationError, model_validator

from ..core.errors import BadChain
from ..stages.image import Posterior
from ..stages.inpaint import Downsample

PACKAGED = Path(__file__).parent
"""The chain files that come with the package."""


class _Checked(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), populate_by_name=True)


class Cut(_Checked):
    """Where a run stops early, in exactly one way (see :meth:`unrolled.core.schedule.Schedule.index`)."""

    step: int | None = None
    steps_fraction: float | None = None
    sigma: float | None = None
    training_time: float | None = None

    def given(self) -> dict[str, float]:
        """The one way that was given."""
        return {name: value for name, value in self.model_dump().items() if value is not None}

    @model_validator(mode="after")
    def _one_way(self) -> Cut:
        if len(self.given()) != 1:
            raise ValueError("give exactly one of step, steps_fraction, sigma or training_time")
        return self


class _Named(_Checked):
    name: str = ""
    after: str | None = Field(None, description="the stage whose output this one takes; by default the one before")


class Denoising(_Named):
    """What every stage that denoises may be told."""

    model: str = "sd-1.5"
    prompt: str = ""
    negative_prompt: str = ""
    steps: int = Field(30, ge=1, strict=True)
    guidance_scale: FiniteFloat | list[FiniteFloat] = 7.5
    guidance_rescale: float = Field(0.0, ge=0.0, le=1.0)
    guidance_interval: tuple[int, int] | None = Field(None, description="first and last + 1 step that is guided")
    guidance_batched: bool = True
    solver: str | None = None
    scheduler: dict[str, Any] = Field(default_factory=dict, description="diffusers' scheduler options to change")
    eta: float = Field(0.0, ge=0.0, le=1.0)
    stop: Cut | None = None
    clip_skip: int = Field(0, ge=0)
    chunks: bool = False
    tiled: bool | None = None
    faithful: bool = False


class TextToImage(Denoising):
    """Pure noise to a picture."""

    do: Literal["text-to-image"] = "text-to-image"
    height: int | None = Field(None, ge=1, strict=True)
    width: int | None = Field(None, ge=1, strict=True)


class _FromPicture(Denoising):
    image: str | None = Field(None, description="a picture file, instead of a stage's output")
    fit: bool = Field(False, description="crop and resize picture and mask files to the size they are needed in")
    posterior: Posterior = "sample"
    strength: float | None = None
    first_step: int | None = Field(None, ge=0)
    via: Literal["pixels"] | None = None

    @model_validator(mode="after")
    def _one_start(self) -> _FromPicture:
        if self.strength is not None and self.first_step is not None:
            raise ValueError("give strength or first_step, not both")
        if self.via and self.image:
            raise ValueError("via says how a stage's output is handed on, it has no effect with image")
        return self


class ImageToImage(_FromPicture):
    """A picture or latents, noised and denoised again; or the rest of a run that was stopped."""

    do: Literal["image-to-image"] = "image-to-image"
    start: Literal["strength", "handoff"] = "strength"

    @model_validator(mode="after")
    def _handoff_alone(self) -> ImageToImage:
        if self.start == "handoff" and any(v is not None for v in (self.image, self.strength, self.first_step, self.via)):
            raise ValueError('start = "handoff" goes on from noisy latents: leave out image, strength, first_step and via')
        return self


class Inpaint(_FromPicture):
    """Repaint where the mask is white."""

    do: Literal["inpaint"] = "inpaint"
    model: str = "sd-1.5-inpainting"
    mask: str
    mask_blur: float = Field(0.0, ge=0.0)
    downsample: Downsample = "max"
    composite: bool = True

    @model_validator(mode="after")
    def _blur_of_a_composite(self) -> Inpaint:
        if self.mask_blur and not self.composite:
            raise ValueError("mask_blur fades the edge of the composite, it has no effect with composite = false")
        return self


class Sharpen(_Named):
    """Unsharp masking."""

    do: Literal["sharpen"] = "sharpen"
    percent: float = Field(100.0, ge=0.0)
    radius: float = Field(1.0, gt=0.0)


class Resize(_Named):
    """Lanczos by a factor."""

    do: Literal["resize"] = "resize"
    factor: float = Field(2.0, gt=0.0)


Stage = Annotated[TextToImage | ImageToImage | Inpaint | Sharpen | Resize, Field(discriminator="do")]
_STAGE: TypeAdapter[Stage] = TypeAdapter(Stage)
_KINDS: dict[str, type[_Named]] = {
    kind.model_fields["do"].default: kind for kind in (TextToImage, ImageToImage, Inpaint, Sharpen, Resize)
}


class Chain(_Checked):
    """A whole job: stages in order, and what is written.

    In Python: ``Chain(stages=[TextToImage(prompt="a castle"), Resize(factor=2)])``.
    """

    stages: tuple[Stage, ...] = Field(min_length=1)
    seed: int = Field(0, ge=0, strict=True)
    batch: int = Field(1, ge=1, strict=True)
    formats: tuple[Literal["png", "jpg", "webp"], ...] = ("png",)
    grid: bool = False
    gif: bool = False
    folder: Path = Field(Path(), exclude=True, description="what file names in the chain are relative to")

    @model_validator(mode="before")
    @classmethod
    def _name_stages(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("stages"), Sequence):
            stages = [s if isinstance(s, dict) else s.model_dump() for s in values["stages"]]
            return values | {"stages": [s | {"name": n} for s, n in zip(stages, stage_names(stages), strict=True)]}
        return values

    @model_validator(mode="after")
    def _order(self) -> Chain:
        names: list[str] = []
        for stage in self.stages:
            if stage.name in names:
                raise ValueError(f"two stages are called {stage.name!r}")
            if stage.after is not None and stage.after not in names:
                raise ValueError(f"stage {stage.name!r} comes after {stage.after!r}, which is no earlier stage")
            names.append(stage.name)
        return self

    def before(self, index: int) -> Stage | None:
        """The stage whose output stage ``index`` takes."""
        after = self.stages[index].after
        if after is not None:
            return next(stage for stage in self.stages if stage.name == after)
        return self.stages[index - 1] if index else None

    def seeds(self) -> tuple[int, ...]:
        """One per image: seed + i."""
        return tuple(self.seed + i for i in range(self.batch))


def stage_names(stages: Sequence[Mapping[str, Any]]) -> list[str]:
    """The stages' own names; else what they do, numbered from the second of a kind on."""
    names: list[str] = []
    for stage in stages:
        plain = str(stage.get("name") or stage.get("do", "stage"))
        again = sum(name == plain or name.startswith(f"{plain}-") for name in names)
        names.append(plain if stage.get("name") or not again else f"{plain}-{again + 1}")
    return names


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
    given = {key for key, value in shared.items() if value is not None}
    given |= {override.partition("=")[0].strip().split(".")[-1] for override in overrides}
    return _assemble(document, stages, _Locator(path, text, given))


def _assemble(shared: dict[str, Any], stages: list[dict[str, Any]], where: _Locator) -> Chain:
    kinds = [_kind(stage, where, i) for i, stage in enumerate(stages)]
    own = Chain.model_fields.keys() - {"stages", "folder"}
    for key in shared:
        if key not in own and not any(key in kind.model_fields for kind in kinds):
            known = {*own, *(k for kind in kinds for k in kind.model_fields)}
            raise where.error(None, key, f"unknown key {key!r}{_closest(key, known)}")
    full: list[Stage] = []
    for i, (kind, stage) in enumerate(zip(kinds, stages, strict=True)):
        inherited = {key: value for key, value in shared.items() if key in kind.model_fields and key not in own}
        try:
            full.append(_STAGE.validate_python(inherited | stage))
        except ValidationError as error:
            raise where.fault(i, error, kind) from error
    try:
        return Chain(stages=tuple(full), folder=where.path.parent, **{key: shared[key] for key in shared if key in own})
    except ValidationError as error:
        raise where.fault(None, error, Chain) from error


def _kind(stage: Mapping[str, Any], where: _Locator, index: int) -> type[_Named]:
    do = stage.get("do")
    if do not in _KINDS:
        raise where.error(index, "do", f"do = {do!r} is not a stage; use one of {', '.join(_KINDS)}")
    return _KINDS[do]


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
    first, dot, rest = key.strip().partition(".")
    if not dot:
        return _everywhere(document, stages, first, value)
    names = stage_names(stages)
    shared = any(first in kind.model_fields for kind in _KINDS.values())
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


def _find(source: str | Path) -> Path:
    path = Path(source)
    if path.is_file():
        return path
    packaged = packaged_chains()
    if str(source) in packaged:
        return packaged[str(source)]
    near = _closest(str(source), set(packaged))
    raise BadChain(f"There is no chain file {source}: use a path, or one of {', '.join(packaged)}{near}.")


def _closest(key: str, known: set[str]) -> str:
    near = difflib.get_close_matches(key, known, 1)
    return f"; did you mean {near[0]!r}?" if near else ""


class _Locator:
    """Names the line of a chain file that a fault lies in."""

    def __init__(self, path: Path, text: str, given: set[str]) -> None:
        self.path, self.lines, self.given = path, text.splitlines(), given

    def fault(self, stage: int | None, error: ValidationError, kind: type[BaseModel]) -> BadChain:
        """The first of pydantic's complaints as one sentence."""
        first = error.errors()[0]
        names = [str(part) for part in first["loc"] if str(part) not in _KINDS]
        key = names[0] if names else ""
        if first["type"] == "extra_forbidden":
            message = f"unknown key {names[-1]!r}{_closest(names[-1], set(kind.model_fields))}"
        elif first["type"] == "missing":
            message = f"the key {key!r} is needed"
        elif first["type"] == "value_error":
            message = str(first["ctx"]["error"])
        else:
            reason = first["msg"][0].lower() + first["msg"][1:]
            reason = reason.replace("valid tuple", 'list, e.g. ["jpg"]')
            message = f"{'.'.join(names)} = {first['input']!r} is not allowed: {reason}"
        return self.error(stage, key, message)

    def error(self, stage: int | None, key: str, message: str) -> BadChain:
        """``message`` with the line of ``key`` in a stage or above the first; not if it was given from outside."""
        if key in self.given:
            return BadChain(f"Given for {self.path.name}: {message}.")
        heads = [i for i, line in enumerate(self.lines) if re.match(r"\s*\[\[\s*stage\s*\]\]", line)]
        start, end = (0, heads[0] if heads else len(self.lines))
        if stage is not None and stage < len(heads):
            start, end = heads[stage], [*heads, len(self.lines)][stage + 1]
        for area in (range(start, end), range(heads[0] if heads else 0)):
            for i in area:
                if re.match(rf"\s*\[?\s*[\"']?{re.escape(key)}[\"']?\s*[=.\]]", self.lines[i]) and key:
                    return BadChain(f"{self.path}, line {i + 1}: {message}.")
        line = f", line {start + 1}" if stage is not None and heads else ""
        return BadChain(f"{self.path}{line}: {message}.")
