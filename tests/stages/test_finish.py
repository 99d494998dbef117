import io

import numpy as np
import pytest
from PIL import Image, ImageSequence
from unrolled.core.errors import BadInput
from unrolled.stages.finish import FORMATS, gif, grid, resize, sharpen


def contrast(image: Image.Image) -> float:
    return float(np.abs(np.diff(np.asarray(image.convert("L")).astype(int), axis=1)).mean())


def test_sharpening_raises_contrast(picture: Image.Image) -> None:
    assert sharpen(picture, 0).tobytes() == picture.tobytes()
    assert contrast(picture) < contrast(sharpen(picture)) < contrast(sharpen(picture, 300))


@pytest.mark.parametrize(("percent", "radius"), [(-1.0, 1.0), (100.0, 0.0), (100.0, -2.0)])
def test_sharpening_out_of_range(picture: Image.Image, percent: float, radius: float) -> None:
    message = f"Sharpening takes a percent of at least 0 and a radius above 0, got {percent:g} and {radius:g}"
    with pytest.raises(BadInput, match=message):
        sharpen(picture, percent, radius)


@pytest.mark.parametrize(
    ("factor", "size", "wanted"), [(2.0, None, (128, 128)), (0.4, None, (26, 26)), (None, (10, 7), (10, 7))]
)
def test_resize(picture: Image.Image, factor: float | None, size: tuple[int, int] | None, wanted: tuple[int, int]) -> None:
    resized = resize(picture, factor, size)
    assert resized.size == wanted
    assert resized.tobytes() == picture.resize(wanted, Image.Resampling.LANCZOS).tobytes()


@pytest.mark.parametrize(("factor", "size"), [(None, None), (2.0, (8, 8))])
def test_resize_by_one_of_the_two(picture: Image.Image, factor: float | None, size: tuple[int, int] | None) -> None:
    with pytest.raises(BadInput, match="A resize takes either a factor or a size"):
        resize(picture, factor, size)


@pytest.mark.parametrize(
    ("factor", "size", "shown"), [(0.001, None, "0, 0"), (None, (0, 5), "0, 5"), (-1.0, None, "-64, -64")]
)
def test_resize_to_nothing(picture: Image.Image, factor: float | None, size: tuple[int, int] | None, shown: str) -> None:
    with pytest.raises(BadInput, match=rf"A resize to \({shown}\) leaves nothing: sides must be at least 1 pixel"):
        resize(picture, factor, size)


COLOURS = ["red", "lime", "blue", "black", "orange"]


@pytest.mark.parametrize(
    ("count", "columns", "shape"), [(1, None, (1, 1)), (5, None, (3, 2)), (4, 4, (4, 1)), (3, 1, (1, 3))]
)
def test_grid_places_row_by_row(count: int, columns: int | None, shape: tuple[int, int]) -> None:
    pictures = [Image.new("RGB", (20, 10), colour) for colour in COLOURS[:count]]
    sheet = grid(pictures, columns, gap=4)
    assert sheet.size == (4 + shape[0] * 24, 4 + shape[1] * 14)
    for i, picture in enumerate(pictures):
        left, top = 4 + i % shape[0] * 24, 4 + i // shape[0] * 14
        assert sheet.crop((left, top, left + 20, top + 10)).tobytes() == picture.tobytes()
    assert sheet.getpixel((0, 0)) == (255, 255, 255)


def test_grid_centres_smaller_pictures() -> None:
    sheet = grid([Image.new("RGB", (20, 20), "red"), Image.new("RGB", (10, 10), "blue")], gap=0)
    assert sheet.crop((25, 5, 35, 15)).getcolors() == [(100, (0, 0, 255))]
    assert sheet.getpixel((24, 5)) == (255, 255, 255)


def test_labels_stand_below_their_pictures_and_are_wrapped() -> None:
    pictures = [Image.new("RGB", (80, 40), "white")] * 2
    plain, one, long = (grid(pictures, 2, labels) for labels in ([], ["cat", ""], ["a cat with a very long name", ""]))
    assert plain.height < one.height < long.height
    ink = np.asarray(one.convert("L")) < 128
    assert ink[44:, : one.width // 2].any()
    assert not ink[:44].any()
    assert not ink[:, one.width // 2 + 4 :].any()
    wrapped = np.asarray(long.convert("L")) < 128
    assert not wrapped[:, long.width // 2 + 4 :].any()


def test_bad_grids(picture: Image.Image) -> None:
    with pytest.raises(BadInput, match="A grid needs at least one picture"):
        grid([])
    with pytest.raises(BadInput, match="A grid of 1 pictures was given 2 labels: give one each, or none"):
        grid([picture], labels=["a", "b"])


@pytest.mark.parametrize("columns", [0, -1])
def test_a_grid_of_no_columns(picture: Image.Image, columns: int) -> None:
    with pytest.raises(BadInput, match=f"A grid needs at least one column, got {columns}"):
        grid([picture], columns)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_gif_holds_every_picture_and_the_last_longer(count: int) -> None:
    data = gif([Image.new("RGB", (16, 8), colour) for colour in COLOURS[:count]], seconds=0.25, hold=1.5)
    film = Image.open(io.BytesIO(data))
    assert (film.format, film.size, film.n_frames) == ("GIF", (16, 8), count)  # type: ignore[attr-defined]
    frames = [(f.convert("RGB").getpixel((0, 0)), f.info["duration"]) for f in ImageSequence.Iterator(film)]
    wanted = [Image.new("RGB", (1, 1), colour).getpixel((0, 0)) for colour in COLOURS[:count]]
    assert frames == list(zip(wanted, [250] * (count - 1) + [1500], strict=True))
    assert count == 1 or film.info["loop"] == 0


def test_gif_of_equal_pictures_lasts_as_long(picture: Image.Image) -> None:
    film = Image.open(io.BytesIO(gif([picture] * 3, seconds=0.2, hold=1.0)))
    assert sum(f.info["duration"] for f in ImageSequence.Iterator(film)) == 1400


def test_a_gif_of_nothing() -> None:
    with pytest.raises(BadInput, match="A GIF needs at least one picture"):
        gif([])


@pytest.mark.parametrize("ending", FORMATS)
def test_every_format_can_be_written(picture: Image.Image, ending: str) -> None:
    file = io.BytesIO()
    picture.save(file, FORMATS[ending])
    assert Image.open(file).size == picture.size
