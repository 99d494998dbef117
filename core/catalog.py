"""Short names of models: where each lives on the hub, and the miniature that stands in offline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Entry:
    """One known model.

    Args:
        hub: its hub id.
        miniature: the folder under ``miniatures/`` that stands in for it.
        borrows: components its miniature takes from another one's folder.
        about: one line for people.
    """

    hub: str
    miniature: str
    about: str
    borrows: Mapping[str, str] = field(default_factory=dict)


CATALOG: Mapping[str, Entry] = {
    "sd-1.5": Entry(
        hub="stable-diffusion-v1-5/stable-diffusion-v1-5",
        miniature="sd-1.5",
        about="Stable Diffusion 1.5, text to image, 512 px (miniature: emoji, 64 px)",
    ),
    "sd-1.5-inpainting": Entry(
        hub="stable-diffusion-v1-5/stable-diffusion-inpainting",
        miniature="sd-1.5-inpainting",
        about="Stable Diffusion inpainting, 9-channel UNet",
        borrows={"vae": "sd-1.5", "text_encoder": "sd-1.5", "tokenizer": "sd-1.5"},
    ),
}

MOVED = {
    "runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "runwayml/stable-diffusion-inpainting": "stable-diffusion-v1-5/stable-diffusion-inpainting",
}
"""Hub ids that are gone, and where their models went."""
