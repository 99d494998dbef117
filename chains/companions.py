"""ControlNets and image prompts of a stage: found and checked for the plan, loaded and put to work for the run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from ..core.checkpoint import fingerprint, fingerprint_of, read_config, require_class
from ..core.companions import ImageAdapterSource, find_controlnet, find_image_adapter, load_controlnet, load_image_adapter
from ..core.control import Control, between, controlled, require_control_fits
from ..core.denoiser import ConditionalDenoiser
from ..core.errors import BadInput
from ..core.image_adapter import ImageAdapter, image_prompted, read_halves
from ..core.loading import Model, Shelf
from ..core.source import Source
from ..core.weights import Part
from ..stages.control import with_control
from ..stages.image_prompt import with_image_prompt
from ..stages.pictures import read_picture
from .adapters import ControlOptions, ImagePromptOptions
from .chain import Denoising
from .prompts import Pair
from .runs import Run


@dataclass(frozen=True)
class Companions:
    """Where a stage's ControlNets and its IP-Adapter lie."""

    controlnets: tuple[Part, ...] = ()
    image_adapter: ImageAdapterSource | None = None

    @property
    def parts(self) -> tuple[Part, ...]:
        """The components that are loaded for them."""
        return (*self.controlnets, *([self.image_adapter.image_encoder] if self.image_adapter else []))

    def fingerprints(self) -> dict[str, str]:
        """Digests of their weights, by names that no component of a model has."""
        found = {f"control {i}": fingerprint(part) for i, part in enumerate(self.controlnets, 1)}
        if self.image_adapter is not None:
            found["image prompt"] = fingerprint_of(self.image_adapter.file)
            found["image prompt, encoder"] = fingerprint(self.image_adapter.image_encoder)
        return found


def find_companions(
    stage: Denoising, source: Source, shelf: Shelf, folder: Path, size: tuple[int, int], *, weights: bool = False
) -> Companions:
    """Where they lie, checked with their pictures; of weights only names and shapes are read.

    Args:
        folder: what file names are relative to.
        size: width and height in pixels of what is painted.

    Raises:
        BadInput: a picture is missing or of another size; BadModel: there is no such network, or it is for another UNet.
    """
    of: dict[str, Any] = {"models": shelf.models, "revision": shelf.revision, "weights": weights}
    unet, parts, adapter = source.config("unet"), list[Part](), None
    for told in stage.control:
        control_picture(told, folder, size)
        parts.append(part := find_controlnet(_here(folder, told.model), source, variant=shelf.variant, **of))
        require_class(part)
        require_control_fits(read_config(part), unet, told.model)
    if (prompt := stage.image_prompt) is not None:
        read_picture(folder / prompt.image)
        encoder = prompt.image_encoder and _here(folder, prompt.image_encoder)
        adapter = find_image_adapter(_here(folder, prompt.adapter), encoder, **of)
        require_class(adapter.image_encoder)
        read_halves(adapter.file, unet, source.name)
    return Companions(tuple(parts), adapter)


def control_picture(told: ControlOptions, folder: Path, size: tuple[int, int]) -> Image.Image:
    """What a ControlNet is to follow; BadInput unless it is of the size that is painted, or may be fitted."""
    picture = read_picture(folder / told.image)
    if told.fit:
        return ImageOps.fit(picture, size, Image.Resampling.LANCZOS)
    if picture.size != size:
        raise BadInput(
            f"the control picture {told.image} is {picture.width}x{picture.height} but {size[0]}x{size[1]} is painted: "
            "they must be of one size, or say fit = true in control."
        )
    return picture


@dataclass(frozen=True)
class Beside:
    """What stands beside a model in one stage: ControlNets with their pictures, an IP-Adapter with its own."""

    controls: tuple[tuple[ControlOptions, Any, Image.Image], ...] = ()
    image_prompt: tuple[ImagePromptOptions, ImageAdapter, Image.Image] | None = None

    def require(self, stage: Denoising) -> None:
        """Raise BadInput unless a stage's are here."""
        if (len(self.controls), self.image_prompt is not None) != (len(stage.control), stage.image_prompt is not None):
            raise BadInput(
                f"{stage.name or 'the stage'} has ControlNets or an image prompt that are not loaded, or the other way "
                "round: hand over what load_companions gives as beside."
            )

    def on(self, model: Model) -> AbstractContextManager[None]:
        """The model's UNet with the IP-Adapter on it, while it lasts."""
        if self.image_prompt is None:
            return nullcontext()
        return image_prompted(model, self.image_prompt[1], self.image_prompt[0].scale)

    def conditioned(self, model: Model, prompts: Pair) -> Pair:
        """The conditionings with the pictures in them."""
        cond, uncond = prompts
        if self.image_prompt is not None:
            _, adapter, picture = self.image_prompt
            cond, uncond = with_image_prompt(adapter, cond, picture), with_image_prompt(adapter, uncond, None)
        if self.controls:
            pictures = [picture for _, _, picture in self.controls]
            cond, uncond = with_control(model, cond, pictures), with_control(model, uncond, pictures)
        return cond, uncond

    def steered(self, network: ConditionalDenoiser, run: Run) -> ConditionalDenoiser:
        """The network under the ControlNets, in their steps of a run."""
        return controlled(network, [_control(told, net, run) for told, net, _ in self.controls])


def load_companions(
    found: Companions,
    stage: Denoising,
    model: Model,
    shelf: Shelf,
    folder: Path,
    size: tuple[int, int],
    batch: int = 1,
) -> Beside:
    """What :func:`find_companions` found, loaded; arguments as there."""
    networks = [load_controlnet(shelf, part, model, size, batch) for part in found.controlnets]
    pictures = [control_picture(told, folder, size) for told in stage.control]
    prompt = None
    if stage.image_prompt is not None and found.image_adapter is not None:
        adapter = load_image_adapter(shelf, found.image_adapter, model)
        prompt = stage.image_prompt, adapter, read_picture(folder / stage.image_prompt.image)
    return Beside(tuple(zip(stage.control, networks, pictures, strict=True)), prompt)


def inputs(beside: Beside) -> Mapping[str, Image.Image]:
    """The picture files that went in, by name."""
    shown = {told.image: picture for told, _, picture in beside.controls}
    return shown | ({beside.image_prompt[0].image: beside.image_prompt[2]} if beside.image_prompt else {})


def lines(stage: Denoising) -> Iterator[str]:
    """What a plan says of them."""
    for told in stage.control:
        part = "" if (told.start, told.end) == (0.0, 1.0) else f", {told.start:.0%} to {told.end:.0%}"
        yield f"{told.image} by {Path(told.model).stem}, {told.scale:g}{part}"
    if (prompt := stage.image_prompt) is not None:
        yield f"{prompt.image} by {Path(prompt.adapter).stem}, {prompt.scale:g}"


def unused(stage: Denoising, run: Run) -> Iterator[tuple[str, str]]:
    """Options that add nothing to a run, and why."""
    for told in stage.control:
        control = _control(told, None, run)
        if not any(control.at(sigma) for sigma in run.schedule.sigmas[:-1]):
            yield "control", f"{told.model} acts in none of the {len(run.schedule)} steps that are run; leave it out"
    if stage.image_prompt is not None and not stage.image_prompt.scale:
        yield "image_prompt", "at scale 0 it adds nothing; leave it out"


def _control(told: ControlOptions, network: Any, run: Run) -> Control:
    # A stop is no end of the schedule: where a run is cut does not move what acts before.
    return Control(network, between(run.whole[run.schedule.first :], told.scale, told.start, told.end))


def _here(folder: Path, name: str) -> str:
    """A file or folder relative to the chain, if it is there; else as it was said."""
    return str(folder / name) if (folder / name).exists() else name
