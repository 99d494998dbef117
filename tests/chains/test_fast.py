"""Whole chains with optimised networks: the same pictures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner
from unrolled.__main__ import app
from unrolled.chains.chain import Chain, Denoising, ImageToImage, Inpaint, PriorOptions, TextToImage, Upscale
from unrolled.chains.run import run
from unrolled.core.loading import Shelf
from unrolled.kernels.fast import fast_of


def chain_of(name: str, folder: dict[str, str], files: Path) -> Chain:
    """Two pictures by a system."""
    one: list[Denoising]
    if name in ("text-to-image", "sdxl", "base-to-refiner"):
        model = folder["tiny" if name == "text-to-image" else "tiny_sdxl"]
        one = [TextToImage(name="first", model=model, prompt="a castle", steps=4)]
        if name == "base-to-refiner":
            one.append(ImageToImage(name="second", model=folder["tiny_refiner"], prompt="a castle", steps=6, strength=0.5))
    elif name in ("inpaint", "blended-inpaint"):
        model = folder["tiny_inpaint" if name == "inpaint" else "tiny"]
        images = [str(files / "picture.png")]
        one = [Inpaint(model=model, prompt="a boat", image=images[0], mask=str(files / "mask.png"), steps=4)]
    elif name == "kandinsky":
        prior = PriorOptions(model=folder["tiny_prior"], steps=3)
        one = [TextToImage(model=folder["tiny_kandinsky"], prompt="a castle", steps=4, prior=prior)]
    else:
        first = TextToImage(name="first", model=folder["tiny"], prompt="a castle", steps=2)
        one = [first, Upscale(name="second", model=folder[name], prompt="a castle", steps=3, via="pixels")]
    return Chain(stages=tuple(one), batch=2)


NAMES = ["text-to-image", "sdxl", "base-to-refiner", "inpaint", "blended-inpaint", "kandinsky", "tiny_x2", "tiny_x4"]


@pytest.fixture
def files(tmp_path: Path, picture: Image.Image, mask: Image.Image) -> Path:
    picture.save(tmp_path / "picture.png")
    mask.save(tmp_path / "mask.png")
    return tmp_path


@pytest.fixture
def folder(request: pytest.FixtureRequest) -> dict[str, str]:
    names = ("tiny", "tiny_inpaint", "tiny_sdxl", "tiny_refiner", "tiny_prior", "tiny_kandinsky", "tiny_x2", "tiny_x4")
    return {name: str(request.getfixturevalue(f"{name}_folder")) for name in names}


@pytest.mark.parametrize("name", NAMES)
def test_the_same_pictures(name: str, folder: dict[str, str], files: Path) -> None:
    chain = chain_of(name, folder, files)
    plain, shelf = run(chain, Shelf(device="cpu")), Shelf(device="cpu", fast=True)
    fast = run(chain, shelf)
    assert fast.notes == plain.notes
    assert len(fast.pictures) == len(plain.pictures) == 2
    for ours, theirs in zip(fast.pictures, plain.pictures, strict=True):
        assert np.abs(np.asarray(ours, dtype=int) - np.asarray(theirs, dtype=int)).max() <= 1
    model = shelf.load(str(getattr(chain.stages[-1], "model", "")))
    assert fast_of(model.unet) is not None
    assert fast_of(model.vae) is not None


@pytest.mark.parametrize("offload", ["resident", "model", "layer"])
def test_wherever_the_networks_live(tiny_folder: Path, offload: str, recwarn: pytest.WarningsRecorder) -> None:
    chain = Chain(stages=(TextToImage(model=str(tiny_folder), prompt="a castle", steps=3),))
    (plain,) = run(chain, Shelf(device="cpu")).pictures
    shelf = Shelf(device="cpu", fast=True, offload=offload)  # type: ignore[arg-type]
    result = run(chain, shelf)
    assert np.abs(np.asarray(result.pictures[0], dtype=int) - np.asarray(plain, dtype=int)).max() <= 1
    unfit = [note for note in result.notes if "not made fast" in note]
    assert bool(unfit) == (offload == "layer")
    assert (fast_of(shelf.load(str(tiny_folder)).unet) is None) == (offload == "layer")


def test_the_switch(tiny_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "chain.toml"
    file.write_text(f'[[stage]]\ndo = "text-to-image"\nmodel = "{tiny_folder}"\nprompt = "a castle"\nsteps = 2\n')
    for more in ([], ["--fast"]):
        done = CliRunner().invoke(app, ["run", str(file), "--output", str(tmp_path / "out"), "--device", "cpu", *more])
        assert done.exit_code == 0, done.output
    manifests = [json.loads(f.read_text()) for f in sorted((tmp_path / "out").rglob("*.json"))]
    assert [m["fast"] for m in manifests] == [False, True]
