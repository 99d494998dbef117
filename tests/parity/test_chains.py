"""The packaged chains against the same chains written with diffusers' own pipelines, as benchmarks/article.py has them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import unrolled
from unrolled.chains.plan import plan
from unrolled.chains.read import packaged_chains
from unrolled.core.loading import Shelf

CHAINS = [
    "text-to-image-to-image",
    "image-to-image-to-image",
    "image-to-upscaler-to-super-resolution",
    "text-to-image-to-inpaint",
    "inpaint-to-image-to-image",
    "base-to-refiner",
    "text-to-image-and-finish",
]
PAIRS_SAVED = {"image-to-image-to-image": 2, "image-to-upscaler-to-super-resolution": 1, "inpaint-to-image-to-image": 1}
PAIRS_SAVED["base-to-refiner"] = 1


@pytest.fixture(scope="module")
def article() -> ModuleType:
    path = Path(unrolled.__file__).parent / "benchmarks" / "article.py"
    spec = importlib.util.spec_from_file_location("article", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_all_of_them_are_here(article: ModuleType) -> None:
    assert list(article.CHAINS) == CHAINS
    assert set(CHAINS) <= set(packaged_chains())


@pytest.mark.slow
@pytest.mark.parametrize("name", CHAINS)
def test_the_same_picture(name: str, article: ModuleType, tmp_path: Path) -> None:
    # Sharpening doubles a difference of 1: there the picture before it is compared.
    overrides = ["sharpened.percent=0", "enlarged.factor=1"] if name == "text-to-image-and-finish" else []
    chain = article.chain_of(name, "miniature", *overrides)
    ours = article.ours(chain, Shelf(device="cpu"))
    theirs = article.CHAINS[name](chain, article.loader("miniature", tmp_path))
    assert ours.size == theirs.size
    assert article.difference(ours, theirs) <= 1


@pytest.mark.parametrize("name", CHAINS)
def test_latents_are_handed_on_wherever_they_can_be(name: str, article: ModuleType) -> None:
    plans = plan(article.chain_of(name), Shelf(device="cpu"))
    assert sum("latents" in item.takes for item in plans) == PAIRS_SAVED.get(name, 0)
