"""Draws docs/chains/contact-sheet.png: every packaged chain, what went in and what each stage made of it."""

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from unrolled import Shelf, resize
from unrolled.chains.outputs import sheet
from unrolled.chains.read import read_chain
from unrolled.chains.run import run

CHAINS = (
    "text-to-image-to-image",
    "image-to-image-to-image",
    "image-to-upscaler-to-super-resolution",
    "text-to-image-to-inpaint",
    "inpaint-to-image-to-image",
    "base-to-refiner",
    "text-to-image-and-finish",
)
HIGH, TITLE, WIDTH = 190, 26, 980


def row(name: str) -> Image.Image:
    """One chain under its name, all pictures of one height."""
    result = run(read_chain(name, grid=True), Shelf(device="cpu"))
    pictures = sheet(result, high=HIGH)
    page = Image.new("RGB", (WIDTH, TITLE + pictures.height), "white")
    ImageDraw.Draw(page).text((8, 6), name, "black", ImageFont.load_default(size=16))
    page.paste(pictures if pictures.width <= WIDTH else resize(pictures, WIDTH / pictures.width), (0, TITLE))
    return page


def main() -> None:
    """All chains, one below the other."""
    rows = [row(name) for name in CHAINS]
    page = Image.new("RGB", (WIDTH, sum(picture.height for picture in rows)), "white")
    top = 0
    for picture in rows:
        page.paste(picture, (0, top))
        top += picture.height
    page.save(Path(__file__).parent / "chains" / "contact-sheet.png", optimize=True)


if __name__ == "__main__":
    main()
