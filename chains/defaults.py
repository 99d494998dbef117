"""What a stage does when it is not told otherwise: each system's usual values, which are diffusers'."""

from __future__ import annotations

from typing import NamedTuple, TypeVar

from ..core.source import System
from .chain import Denoising, ImageToImage, Inpaint


class Defaults(NamedTuple):
    """The usual values of one system."""

    guidance_scale: float
    strength: float = 1.0
    inpaint_strength: float = 1.0
    inpaint_guidance_scale: float | None = None


DEFAULTS: dict[System, Defaults] = {
    "sd": Defaults(7.5, 0.8),
    "sdxl": Defaults(5.0, 0.3, 0.9999, 7.5),
    "kandinsky": Defaults(4.0, 0.3),
    "x2": Defaults(9.0),
    "x4": Defaults(9.0),
}

SpecT = TypeVar("SpecT", bound=Denoising)


def filled(spec: SpecT, system: System) -> SpecT:
    """The stage with its system's usual guidance scale and strength where it names none."""
    usual, given = DEFAULTS[system], dict[str, object]()
    if spec.guidance_scale is None:
        own = usual.inpaint_guidance_scale if isinstance(spec, Inpaint) else None
        given["guidance_scale"] = usual.guidance_scale if own is None else own
    goes_on = isinstance(spec, ImageToImage) and spec.start != "strength"
    if isinstance(spec, ImageToImage | Inpaint) and not goes_on and spec.strength is None and spec.first_step is None:
        given["strength"] = usual.inpaint_strength if isinstance(spec, Inpaint) else usual.strength
    return spec.model_copy(update=given)
