"""Tiny random Stable Diffusion checkpoints in the diffusers folder layout."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from PIL import Image, ImageDraw
from unrolled.core.latents import LatentSpace
from unrolled.core.loading import Model, load
from unrolled.miniatures.tiny import write_tiny


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny_inpaint_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("models") / "tiny-inpaint", in_channels=9)


@pytest.fixture(scope="session")
def tiny(tiny_folder: Path) -> Model:
    return load(str(tiny_folder), device="cpu")


@pytest.fixture(scope="session")
def tiny_inpaint(tiny_inpaint_folder: Path) -> Model:
    return load(str(tiny_inpaint_folder), device="cpu")


@pytest.fixture
def broken(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint to damage."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "broken"))


@pytest.fixture(scope="session")
def picture() -> Image.Image:
    """A 64x64 picture with edges and gradients."""
    image = Image.radial_gradient("L").resize((64, 64))
    image = Image.merge("RGB", (image, image.rotate(90), Image.linear_gradient("L").resize((64, 64))))
    ImageDraw.Draw(image).rectangle((10, 20, 40, 50), fill=(200, 30, 60))
    return image


@pytest.fixture(scope="session")
def mask() -> Image.Image:
    """White in the middle, with an edge that no latent cell is aligned to."""
    image = Image.new("L", (64, 64))
    ImageDraw.Draw(image).rectangle((13, 19, 45, 51), fill=255)
    return image


@pytest.fixture
def space() -> LatentSpace:
    """A latent space of no model."""
    return LatentSpace("AutoencoderKL", 4, 8, 0.18215, "0123456789abcdef")
