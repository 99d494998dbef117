"""Short names of models: where each lives on the hub, and the miniature that stands in offline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Entry:
    """One known model.

    Args:
        hub: its hub id; the miniature that stands in for it lies in the folder of its short name.
        about: one line for people.
        borrows: components its miniature takes from another one, and where they lie.
    """

    hub: str
    about: str
    borrows: Mapping[str, str] = field(default_factory=dict)


_TEXT = {"text_encoder": "sd-1.5/text_encoder", "tokenizer": "sd-1.5/tokenizer"}
_TEXT_AND_VAE = {**_TEXT, "vae": "sd-1.5/vae"}
_SECOND_TEXT = {"tokenizer_2": "sd-1.5/tokenizer", "text_encoder_2": "kandinsky-2.2-prior/text_encoder"}

CATALOG: Mapping[str, Entry] = {
    "sd-1.5": Entry(
        hub="stable-diffusion-v1-5/stable-diffusion-v1-5",
        about="Stable Diffusion 1.5, text to image, 512 px (miniature: emoji, 64 px)",
    ),
    "sd-1.5-inpainting": Entry(
        hub="stable-diffusion-v1-5/stable-diffusion-inpainting",
        about="Stable Diffusion inpainting, 9-channel UNet",
        borrows=_TEXT_AND_VAE,
    ),
    "comic-diffusion": Entry(
        hub="ogkalu/Comic-Diffusion",
        about='Stable Diffusion fine-tuned to comics; say "charliebo artstyle" (miniature: flat emoji)',
        borrows=_TEXT_AND_VAE,
    ),
    "pixel-art-style": Entry(
        hub="kohbanye/pixel-art-style",
        about='Stable Diffusion fine-tuned to pixel art; say "pixelartstyle"',
        borrows=_TEXT_AND_VAE,
    ),
    "sdxl-base": Entry(
        hub="stabilityai/stable-diffusion-xl-base-1.0",
        about="Stable Diffusion XL, two text encoders, 1024 px (miniature: 128 px)",
        borrows={**_TEXT, **_SECOND_TEXT},
    ),
    "sdxl-refiner": Entry(
        hub="stabilityai/stable-diffusion-xl-refiner-1.0",
        about="Stable Diffusion XL's refiner: the last fifth of a run, image to image, inpainting",
        borrows={"vae": "sdxl-base/vae", **_SECOND_TEXT},
    ),
    "kandinsky-2.2-prior": Entry(
        hub="kandinsky-community/kandinsky-2-2-prior",
        about="Kandinsky 2.2's prior: from text to the image embedding its decoders take",
        borrows={"tokenizer": "sd-1.5/tokenizer"},
    ),
    "kandinsky-2.2-decoder": Entry(
        hub="kandinsky-community/kandinsky-2-2-decoder",
        about="Kandinsky 2.2, 512 px (miniature: 64 px)",
    ),
    "kandinsky-2.2-decoder-inpaint": Entry(
        hub="kandinsky-community/kandinsky-2-2-decoder-inpaint",
        about="Kandinsky 2.2 inpainting, 9-channel UNet",
        borrows={"movq": "kandinsky-2.2-decoder/movq"},
    ),
    "x2-latent-upscaler": Entry(
        hub="stabilityai/sd-x2-latent-upscaler",
        about="twice the size, from Stable Diffusion's latents to latents",
        borrows=_TEXT_AND_VAE,
    ),
    "x4-upscaler": Entry(
        hub="stabilityai/stable-diffusion-x4-upscaler",
        about="four times the size, from a picture with some noise on it",
        borrows=_TEXT_AND_VAE,
    ),
}

MOVED = {
    "runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "runwayml/stable-diffusion-inpainting": "stable-diffusion-v1-5/stable-diffusion-inpainting",
}
"""Hub ids that are gone, and where their models went."""
