"""The door for pictures: opened safely, turned, converted on purpose, or refused."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ..core.errors import BadInput, Note

MAX_PIXELS = 64_000_000
"""Larger pictures are refused before they are decoded (decompression bombs)."""

_MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "CMYK", "YCbCr")

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
"""The only formats that are opened."""


def read_picture(path: str | Path) -> Image.Image:
    """A picture as 8-bit RGB, turned as its EXIF says.

    Transparency is laid on white; palettes, grey, CMYK and 16-bit grey are converted.

    Raises:
        BadInput: missing, damaged, too large, of an unknown format or of a mode with no clear meaning.
    """
    return as_rgb(_open(path), str(path))


def read_mask(path: str | Path) -> Image.Image:
    """A mask as 8-bit grey; white repaints, black keeps.

    Raises:
        BadInput: as :func:`read_picture`, and if it has transparency: alpha means "keep" in some
            tools and "repaint" in others.
    """
    return as_mask(_open(path), str(path))


def as_rgb(image: Image.Image, name: str = "The picture") -> Image.Image:
    """Any readable mode as RGB; see :func:`read_picture`."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        grey = (np.asarray(image).astype(np.uint32) + 128) // 257
        image = Image.fromarray(grey.astype(np.uint8))
    if image.mode not in _MODES:
        raise BadInput(f"{name} has mode {image.mode}, whose range is not known: save it as 8-bit RGB.")
    if _has_alpha(image):
        rgba = image.convert("RGBA")
        if _is_transparent(rgba):
            warnings.warn(f"{name} is partly transparent; it was laid on white.", Note, stacklevel=2)
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def as_mask(image: Image.Image, name: str = "The mask") -> Image.Image:
    """Any readable mode as 8-bit grey; see :func:`read_mask`."""
    if _has_alpha(image) and _is_transparent(image.convert("RGBA")):
        raise BadInput(
            f"{name} has transparent parts, and it is unclear whether they mean keep or repaint: "
            "save it without alpha, white where it shall be repainted."
        )
    return as_rgb(image, name).convert("L")


def require_size(image_size: tuple[int, int], cell: int, name: str = "The picture") -> None:
    """Raise BadInput unless (width, height) are multiples of the latent cell; names the nearest sizes."""
    width, height = image_size
    if width < cell or height < cell or width % cell or height % cell:
        down = tuple(max(cell, side // cell * cell) for side in image_size)
        up = tuple(max(cell, -(-side // cell) * cell) for side in image_size)
        sizes = sorted({down, up})
        nearest = ("sizes are " if len(sizes) > 1 else "size is ") + " and ".join(f"{w}x{h}" for w, h in sizes)
        raise BadInput(f"{name} is {width}x{height}, but sides must be multiples of {cell}: the nearest {nearest}.")


def to_tensor(pictures: Image.Image | Sequence[Image.Image]) -> Tensor:
    """Pictures of one size as (batch, 3, height, width) in [-1, 1]."""
    several = [pictures] if isinstance(pictures, Image.Image) else list(pictures)
    if len({picture.size for picture in several}) > 1:
        sizes = ", ".join(f"{p.width}x{p.height}" for p in several)
        raise BadInput(f"The pictures of a batch must be of one size, got {sizes}.")
    array = np.stack([np.asarray(picture.convert("RGB")) for picture in several])
    return torch.from_numpy(array).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def to_pictures(tensor: Tensor) -> list[Image.Image]:
    """The inverse of :func:`to_tensor`, rounded and clamped to 8 bits."""
    array = (tensor.float() / 2 + 0.5).clamp(0, 1).mul(255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(picture) for picture in array]


def clip_pixels(options: Mapping[str, Any], pictures: Sequence[Image.Image]) -> Tensor:
    """Pictures of any size as a CLIP image encoder takes them: (batch, 3, side, side), resized, cropped, normalised.

    Args:
        options: of ``preprocessor_config.json``; what it does not say is CLIP's own.
    """
    from transformers import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil.from_dict(dict(options))
    pixels: Tensor = processor([picture.convert("RGB") for picture in pictures], return_tensors="pt").pixel_values
    return pixels


def _open(path: str | Path) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(path, formats=FORMATS)
            if image.width * image.height > MAX_PIXELS:
                image.close()
                raise _too_large(path)
            image.load()
            return image
    except IsADirectoryError as error:
        raise BadInput(f"{path} is a folder, not a picture: name a file in it.") from error
    except FileNotFoundError as error:
        raise BadInput(f"There is no picture at {path}.") from error
    except Image.DecompressionBombError as error:
        raise _too_large(path) from error
    except UnidentifiedImageError as error:
        raise BadInput(f"{path} is not a picture of a known format ({', '.join(FORMATS)}).") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise BadInput(f"{path} is damaged and cannot be read as a picture ({error}).") from error


def _has_alpha(image: Image.Image) -> bool:
    return image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info


def _is_transparent(rgba: Image.Image) -> bool:
    return any(rgba.getchannel("A").histogram()[:255])


def _too_large(path: str | Path) -> BadInput:
    limit = f"{MAX_PIXELS / 1e6:.0f} million"
    return BadInput(f"{path} has more pixels than the {limit} that are opened: make it smaller first.")
