"""Tiny random Stable Diffusion checkpoints in the diffusers folder layout."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw

# Triton settles at its import, which diffusers brings about, whether kernels run in its interpreter.
os.environ["TRITON_INTERPRET"] = str(int(not torch.cuda.is_available()))
import unrolled
from unrolled.core.latents import LatentSpace
from unrolled.core.loading import Model, Prior, load, load_prior
from unrolled.miniatures.tiny import write_tiny
from unrolled.miniatures.tiny_kandinsky import write_tiny_kandinsky, write_tiny_prior
from unrolled.miniatures.tiny_sdxl import write_tiny_sdxl
from unrolled.miniatures.tiny_upscalers import write_tiny_x2, write_tiny_x4

del os.environ["TRITON_INTERPRET"]

# The repository's root is the package, and pytest would import it once more, under its folder's name.
sys.modules.setdefault(Path(unrolled.__file__).resolve().parent.name, unrolled)


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


@pytest.fixture(scope="session")
def tiny_sdxl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_sdxl(tmp_path_factory.mktemp("models") / "tiny-sdxl")


@pytest.fixture(scope="session")
def tiny_refiner_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_sdxl(tmp_path_factory.mktemp("models") / "tiny-refiner", refiner=True)


@pytest.fixture(scope="session")
def tiny_sdxl(tiny_sdxl_folder: Path) -> Model:
    return load(str(tiny_sdxl_folder), device="cpu")


@pytest.fixture(scope="session")
def tiny_refiner(tiny_refiner_folder: Path) -> Model:
    return load(str(tiny_refiner_folder), device="cpu")


@pytest.fixture(scope="session")
def tiny_prior_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_prior(tmp_path_factory.mktemp("models") / "tiny-prior")


@pytest.fixture(scope="session")
def tiny_kandinsky_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_kandinsky(tmp_path_factory.mktemp("models") / "tiny-kandinsky")


@pytest.fixture(scope="session")
def tiny_kandinsky_inpaint_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_kandinsky(tmp_path_factory.mktemp("models") / "tiny-kandinsky-inpaint", inpaint=True)


@pytest.fixture(scope="session")
def tiny_prior(tiny_prior_folder: Path) -> Prior:
    return load_prior(str(tiny_prior_folder), device="cpu")


@pytest.fixture(scope="session")
def tiny_kandinsky(tiny_kandinsky_folder: Path) -> Model:
    return load(str(tiny_kandinsky_folder), device="cpu")


@pytest.fixture(scope="session")
def tiny_kandinsky_inpaint(tiny_kandinsky_inpaint_folder: Path) -> Model:
    return load(str(tiny_kandinsky_inpaint_folder), device="cpu")


@pytest.fixture(scope="session")
def tiny_x2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_x2(tmp_path_factory.mktemp("models") / "tiny-x2")


@pytest.fixture(scope="session")
def tiny_x4_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_x4(tmp_path_factory.mktemp("models") / "tiny-x4")


@pytest.fixture(scope="session")
def tiny_x2(tiny_x2_folder: Path) -> Model:
    return load(str(tiny_x2_folder), device="cpu")


@pytest.fixture(scope="session")
def tiny_x4(tiny_x4_folder: Path) -> Model:
    return load(str(tiny_x4_folder), device="cpu")


@pytest.fixture(scope="session")
def exact() -> Callable[[Any], Any]:
    """diffusers' UnCLIPScheduler with its coefficients in float64: in float32 it loses 1 - alpha-bar of the last step."""

    def in_float64(scheduler: Any) -> Any:
        scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
        scheduler.alphas = scheduler.alphas_cumprod.clone()
        scheduler.alphas[1:] /= scheduler.alphas_cumprod[:-1]
        scheduler.betas = 1 - scheduler.alphas
        return scheduler

    return in_float64


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
