import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from unrolled.core.errors import BadInput, Note
from unrolled.core.latents import LatentSpace
from unrolled.stages.pictures import (
    MAX_PIXELS,
    as_mask,
    as_rgb,
    read_mask,
    read_picture,
    require_size,
    to_pictures,
    to_tensor,
)

RED, WHITE, HALF = (200, 30, 60), (255, 255, 255), (200, 30, 60, 128)


def saved(image: Image.Image, path: Path, **options: Any) -> Path:
    image.save(path, **options)
    return path


def quietly(image: Image.Image) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return as_rgb(image)


# --- orientation


@pytest.mark.parametrize("ending", ["jpg", "png", "webp"])
@pytest.mark.parametrize(("orientation", "corner"), [(1, (0, 0)), (3, (31, 15)), (6, (15, 0)), (8, (0, 31))])
def test_turned_as_exif_says(tmp_path: Path, ending: str, orientation: int, corner: tuple[int, int]) -> None:
    image = Image.new("RGB", (32, 16), "white")
    image.paste("black", (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(image, tmp_path / f"turned.{ending}", exif=exif)
    turned = read_picture(path)
    assert turned.size == ((32, 16) if orientation in (1, 3) else (16, 32))
    assert max(np.asarray(turned)[corner[1], corner[0]]) < 40
    assert read_mask(path).size == turned.size
    assert quietly(turned).size == turned.size  # once is enough


def test_damaged_exif_is_no_crash(tmp_path: Path) -> None:
    path = saved(Image.new("RGB", (8, 8), RED), tmp_path / "a.jpg", exif=b"Exif\x00\x00nonsense", quality=100)
    assert read_picture(path).size == (8, 8)


# --- modes


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "CMYK", "P", "YCbCr"])
def test_an_opaque_picture_keeps_its_colour(mode: str) -> None:
    image = Image.new("RGB", (4, 4), RED)
    converted = quietly(image.quantize(2) if mode == "P" else image.convert(mode))
    assert converted.mode == "RGB"
    assert np.abs(np.asarray(converted).astype(int) - RED).max() <= 2


@pytest.mark.parametrize(("mode", "value"), [("L", 90), ("LA", (90, 255)), ("1", 1)])
def test_grey_becomes_rgb(mode: str, value: Any) -> None:
    grey = 255 if mode == "1" else 90
    assert quietly(Image.new(mode, (4, 4), value)).getpixel((0, 0)) == (grey,) * 3


@pytest.mark.parametrize(
    ("image", "wanted"),
    [
        (Image.new("RGBA", (4, 4), (0, 0, 0, 0)), WHITE),
        (Image.new("RGBA", (4, 4), HALF), (227, 142, 157)),
        (Image.new("LA", (4, 4), (0, 0)), WHITE),
        (Image.new("LA", (4, 4), (100, 128)), (177, 177, 177)),
    ],
)
def test_transparency_is_laid_on_white_and_said(image: Image.Image, wanted: tuple[int, ...]) -> None:
    with pytest.warns(Note, match=r"The picture is partly transparent; it was laid on white\."):
        converted = as_rgb(image)
    assert np.abs(np.asarray(converted).astype(int) - wanted).max() <= 1


def test_a_palette_with_transparency(tmp_path: Path) -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, *RED])
    image.putpixel((0, 0), 0)
    path = saved(image, tmp_path / "p.png", transparency=0)
    with pytest.warns(Note, match=r"p\.png is partly transparent"):
        converted = read_picture(path)
    assert converted.getpixel((0, 0)) == WHITE
    assert converted.getpixel((1, 1)) == RED


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_transparent_colour(tmp_path: Path, mode: str) -> None:
    image = Image.new(mode, (4, 4), "black")
    path = saved(image, tmp_path / "t.png", transparency=0 if mode == "L" else (0, 0, 0))
    with pytest.warns(Note, match=r"t\.png is partly transparent"):
        assert read_picture(path).getpixel((0, 0)) == WHITE
    with pytest.raises(BadInput, match=r"t\.png has transparent parts"):
        read_mask(path)


@pytest.mark.parametrize(("value", "grey"), [(65535, 255), (0, 0), (257, 1), (32768, 128), (128, 0), (129, 1)])
def test_sixteen_bits_are_scaled(tmp_path: Path, value: int, grey: int) -> None:
    path = saved(Image.fromarray(np.full((4, 4), value, np.uint16)), tmp_path / "deep.png")
    assert Image.open(path).mode == "I;16"
    assert read_picture(path).getpixel((2, 2)) == (grey,) * 3
    assert read_mask(path).getpixel((2, 2)) == grey


def test_sixteen_bits_with_a_transparent_value(tmp_path: Path) -> None:
    """Pillow writes no such file; a transparency chunk is put in by hand."""
    path = saved(Image.fromarray(np.zeros((4, 4), np.uint16)), tmp_path / "deep.png")
    body = b"tRNS" + struct.pack(">H", 0)
    chunk = struct.pack(">I", 2) + body + struct.pack(">I", zlib.crc32(body))
    data = path.read_bytes()
    at = data.find(b"IDAT") - 4
    path.write_bytes(data[:at] + chunk + data[at:])
    with pytest.raises(BadInput, match=r"deep\.png has transparent parts"):
        read_mask(path)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_modes_without_a_known_range_are_refused(tmp_path: Path, mode: str) -> None:
    path = saved(Image.new(mode, (4, 4)), tmp_path / "raw.tiff")
    for read in (read_picture, read_mask):
        with pytest.raises(BadInput, match=rf"raw\.tiff has mode {mode}, whose range is not known: save it as 8-bit RGB\."):
            read(path)


# --- masks


@pytest.mark.parametrize("image", [Image.new("RGBA", (4, 4), (255, 255, 255, 0)), Image.new("LA", (4, 4), (255, 200))])
def test_a_mask_with_alpha_is_refused(tmp_path: Path, image: Image.Image) -> None:
    path = saved(image, tmp_path / "m.png")
    with pytest.raises(BadInput) as caught:
        read_mask(path)
    assert str(caught.value) == (
        f"{path} has transparent parts, and it is unclear whether they mean keep or repaint: "
        "save it without alpha, white where it shall be repainted."
    )


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "RGBA", "LA", "P"])
def test_an_opaque_mask_becomes_grey(mode: str) -> None:
    mask = as_mask(Image.new("RGB", (4, 4), "white").convert(mode))
    assert (mask.mode, mask.getpixel((0, 0))) == ("L", 255)


# --- what cannot be opened


def png_header(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims to be huge."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("width", "height"), [(8001, 8000), (10_000, 10_000), (50_000, 50_000)])
def test_a_picture_that_claims_to_be_huge(tmp_path: Path, width: int, height: int) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png_header(width, height))
    assert width * height > MAX_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(
            BadInput, match=r"bomb\.png has more pixels than the 64 million that are opened: make it smaller"
        ):
            read_picture(path)


def test_not_a_picture(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("<svg/>")
    with pytest.raises(BadInput, match=r"a\.png is not a picture of a known format \(PNG, JPEG, WEBP, BMP, TIFF\)\."):
        read_picture(tmp_path / "a.png")


def test_a_format_that_is_not_opened(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.gif")
    with pytest.raises(BadInput, match=r"a\.gif is not a picture of a known format"):
        read_picture(tmp_path / "a.gif")


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "bmp", "tiff"])
@pytest.mark.parametrize("part", [0.4, 0.8])
def test_a_truncated_picture(tmp_path: Path, picture: Image.Image, ending: str, part: float) -> None:
    path = saved(picture, tmp_path / f"cut.{ending}")
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * part)])
    with pytest.raises(
        BadInput, match=rf"cut\.{ending} is (damaged and cannot be read as a picture \(|not a picture of a known)"
    ):
        read_picture(path)


def test_a_missing_picture(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"There is no picture at .*none\.png\."):
        read_picture(tmp_path / "none.png")


def test_a_folder_is_no_picture(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"is a folder, not a picture: name a file in it"):
        read_picture(tmp_path)


# --- sizes and tensors


@pytest.mark.parametrize(
    ("size", "nearest"),
    [
        ((427, 640), "sizes are 424x640 and 432x640"),
        ((513, 100), "sizes are 512x96 and 520x104"),
        ((7, 8), "size is 8x8"),
        ((0, 20), "sizes are 8x16 and 8x24"),
    ],
)
def test_sizes_name_the_nearest_that_fit(space: LatentSpace, size: tuple[int, int], nearest: str) -> None:
    with pytest.raises(BadInput) as caught:
        require_size(size, space.downscale)
    asked = f"{size[0]}x{size[1]}"
    assert str(caught.value) == f"The picture is {asked}, but sides must be multiples of 8: the nearest {nearest}."


def test_sizes_that_fit(space: LatentSpace) -> None:
    for size in [(512, 768), (8, 8)]:
        require_size(size, space.downscale)  # nothing is raised
    with pytest.raises(BadInput):
        require_size((512, 767), space.downscale)


def test_a_round_trip_is_exact() -> None:
    values = np.arange(256 * 3, dtype=np.uint8).reshape(16, 16, 3)
    pictures = [Image.fromarray(values), Image.fromarray(255 - values)]
    tensor = to_tensor(pictures)
    assert (tensor.shape, tensor.dtype) == ((2, 3, 16, 16), torch.float32)
    assert (float(tensor.min()), float(tensor.max())) == (-1.0, 1.0)
    for before, after in zip(pictures, to_pictures(tensor), strict=True):
        assert before.tobytes() == after.tobytes()


def test_pixels_out_of_range_are_clamped() -> None:
    tensor = torch.tensor([-3.0, -1.0, 0.0, 1.0, 7.0]).expand(1, 3, 1, 5)
    assert [p[0] for p in np.asarray(to_pictures(tensor)[0])[0]] == [0, 0, 128, 255, 255]


def test_a_batch_is_of_one_size() -> None:
    with pytest.raises(BadInput, match=r"The pictures of a batch must be of one size, got (8x8, 16x8|16x8, 8x8)\."):
        to_tensor([Image.new("RGB", (8, 8)), Image.new("RGB", (16, 8))])
