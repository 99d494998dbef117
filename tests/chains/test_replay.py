"""A picture is made again from itself, and what is different is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from unrolled.chains.chain import Chain, ImageToImage, Ingredient, PriorOptions, TextToImage
from unrolled.chains.compare import compare
from unrolled.chains.record import Machine, encode, manifest, read_manifest
from unrolled.chains.replay import replay
from unrolled.chains.run import run
from unrolled.chains.trail import distance, marks
from unrolled.core.errors import BadInput
from unrolled.core.loading import Shelf


@pytest.fixture(scope="module")
def shelf() -> Shelf:
    return Shelf(device="cpu")


@pytest.fixture
def chain(tiny_folder: Path) -> Chain:
    common: dict[str, Any] = {"model": str(tiny_folder), "prompt": "a castle", "steps": 4, "solver": "dpm++2m-sde"}
    return Chain(
        stages=(TextToImage(name="text", **common), ImageToImage(name="again", strength=0.6, **common)), batch=2, seed=3
    )


@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
def test_any_picture_of_a_batch_is_identical(ending: str, chain: Chain, shelf: Shelf, tmp_path: Path) -> None:
    files = run(chain.model_copy(update={"formats": (ending,)}), shelf, tmp_path).files
    if ending == "png":
        (tmp_path / "output_001.json").unlink()  # the picture alone is enough
    for file in files:
        again = replay(file)
        assert str(again) == "identical"
        assert again.apart is None
        assert not again.changed


def changed(path: Path, **facts: object) -> Path:
    """The same picture, saying something else of itself."""
    told = read_manifest(path) | facts
    path.write_bytes(encode(Image.open(path), "png", "", told))
    return path


def test_the_first_step_that_is_apart_is_named(chain: Chain, shelf: Shelf, tmp_path: Path) -> None:
    (file, _) = run(chain, shelf, tmp_path).files
    facts = read_manifest(file)
    facts["chain"]["stages"][1]["guidance_scale"] = 3.0
    again = replay(changed(file, chain=facts["chain"]))
    assert not again.same
    assert again.apart is not None
    assert (again.apart.stage, again.apart.step) == ("again", 2)  # the first step that strength 0.6 of 4 leaves
    assert 1e-4 < again.apart.there < 1
    assert str(again).startswith("apart from step 3 of stage 'again' on, by ")
    assert "pixels by " in str(again)
    assert "changed: nothing that is written down" in str(again)


def test_what_has_changed_is_named(chain: Chain, shelf: Shelf, tmp_path: Path) -> None:
    (file, _) = run(chain, shelf, tmp_path).files
    facts = read_manifest(file)
    weights = facts["models"] | {"text": facts["models"]["text"] | {"unet": "0"}}
    versions = {name: v for name, v in facts["versions"].items() if name != "numpy"} | {"torch": "1.0"}
    again = replay(changed(file, versions=versions, device="another card", models=weights, pixels="0"))
    assert not again.same
    lines = str(again).splitlines()
    assert lines[0].startswith("every step is the same, but the picture is not")
    assert f"changed: torch: 1.0 -> {torch.__version__}" in lines
    assert "changed: the weights of text: unet" in lines
    assert any(line.startswith("changed: device: another card -> ") for line in lines)


def test_inputs_are_found_and_told_apart(tiny_folder: Path, shelf: Shelf, picture: Image.Image, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    picture.save(tmp_path / "in" / "start.png")
    stage = ImageToImage(model=str(tiny_folder), image="start.png", steps=4, strength=0.5, fit=True)
    (file,) = run(Chain(stages=(stage,), folder=tmp_path / "in"), shelf, tmp_path / "out").files
    with pytest.raises(BadInput, match=r"output_000.png was made from start.png, not to be found in .*--inputs"):
        replay(file)
    assert replay(file, inputs=tmp_path / "in").same
    picture.rotate(180).save(tmp_path / "in" / "start.png")
    again = replay(file, inputs=tmp_path / "in")
    assert again.changed == ("the input start.png is another picture",)


def test_inputs_that_were_given_by_absolute_paths(
    tiny_folder: Path, shelf: Shelf, picture: Image.Image, tmp_path: Path
) -> None:
    for name in ("in", "moved"):
        (tmp_path / name).mkdir()
    picture.save(tmp_path / "in" / "start.png")
    stage = ImageToImage(model=str(tiny_folder), image=str(tmp_path / "in" / "start.png"), steps=2, strength=0.5, fit=True)
    (file,) = run(Chain(stages=(stage,)), shelf, tmp_path / "out").files
    assert replay(file).same
    (tmp_path / "in" / "start.png").rename(tmp_path / "moved" / "start.png")
    with pytest.raises(BadInput, match="give their folder with --inputs"):
        replay(file)
    again = replay(file, inputs=tmp_path / "moved")
    assert (str(again), again.changed) == ("identical", ())


def test_pictures_of_a_mix_are_looked_for(
    tiny_kandinsky_folder: Path, tiny_prior_folder: Path, shelf: Shelf, picture: Image.Image, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    picture.save(tmp_path / "in" / "start.png")
    prior = PriorOptions(model=str(tiny_prior_folder), steps=2, mix=(Ingredient(image="start.png"),))
    stage = TextToImage(model=str(tiny_kandinsky_folder), steps=2, prior=prior)
    (file,) = run(Chain(stages=(stage,), folder=tmp_path / "in"), shelf, tmp_path / "out").files
    with pytest.raises(BadInput, match=r"was made from start.png, not to be found in .*--inputs"):
        replay(file)
    assert replay(file, inputs=tmp_path / "in").same
    picture.rotate(180).save(tmp_path / "in" / "start.png")
    assert replay(file, inputs=tmp_path / "in").changed == ("the input start.png is another picture",)


def test_files_that_do_not_say_how_they_were_made(chain: Chain, shelf: Shelf, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="There is no picture at"):
        replay(tmp_path / "nothing.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    with pytest.raises(BadInput, match="does not say what made it: give a picture that `unrolled run` wrote"):
        replay(tmp_path / "plain.png")
    (tmp_path / "plain.json").write_text("{")
    with pytest.raises(BadInput, match="cannot be read as a picture or a manifest"):
        replay(tmp_path / "plain.json")
    (file, _) = run(chain, shelf, tmp_path).files
    with pytest.raises(BadInput, match=r"cannot be used .* it is of another version"):
        replay(changed(file, chain={"stages": []}))
    with pytest.raises(BadInput, match=r"cannot be used \(load is no dtype\)"):
        replay(changed(file, chain=chain.model_dump(mode="json"), dtype="load"))
    with pytest.raises(BadInput, match=r"cannot be used \(picture 2 of 2\)"):
        replay(changed(file, dtype="float32", made_in={"seed": 3, "batch": 2, "index": 2}))


def test_a_strangers_picture_is_not_enough_to_read_pickles(chain: Chain, shelf: Shelf, tmp_path: Path) -> None:
    (file, _) = run(chain, shelf, tmp_path).files
    facts = read_manifest(file)
    facts["chain"]["stages"][1]["allow_pickle"] = True
    changed(file, chain=facts["chain"])
    with pytest.raises(BadInput, match="names pickled weights, and it may be a stranger's: say --allow-pickle"):
        replay(file)
    assert replay(file, allow_pickle=True).same


def test_a_distance_is_of_the_right_size() -> None:
    x = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    near = x + 1e-3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    for a, b in zip(marks(near, 0, 1.0), marks(x, 0, 1.0), strict=True):
        assert distance(b, b) == 0.0
        assert 3e-4 < distance(a, b) < 3e-3


def test_a_manifest_does_not_say_where_anything_lies(chain: Chain, shelf: Shelf, tmp_path: Path) -> None:
    chain = chain.model_copy(update={"folder": tmp_path})
    result = run(chain, shelf)
    facts = manifest(chain, 0, result, Machine.of(shelf))
    for stage in facts["chain"]["stages"]:
        del stage["model"]  # a model folder that was given as a path is
    assert str(tmp_path) not in json.dumps(facts)


# --- two runs


def test_two_runs_side_by_side(chain: Chain, shelf: Shelf, tmp_path: Path) -> None:
    other = chain.stages[1].model_copy(update={"guidance_scale": 2.0})
    one, _ = run(chain, shelf, tmp_path).files
    two, _ = run(chain.model_copy(update={"stages": (chain.stages[0], other)}), shelf, tmp_path).files
    found = compare(one, two)
    assert [(s.name, s.one, s.other) for s in found.settings] == [("again.guidance_scale", 7.5, 2.0)]
    assert found.circumstances == ()
    text, again = ([d.far for d in found.steps if d.stage == name] for name in ("text", "again"))
    assert text == [0.0] * 4
    assert len(again) == 2
    assert min(again) > 1e-4
    assert found.pixels is not None
    assert found.pixels[1] > 0
    assert found.picture.width > 3 * 64
    same = compare(one, one)
    assert (same.settings, same.pixels) == ((), (0.0, 0.0))


def test_only_steps_that_end_at_one_level_are_compared(chain: Chain, shelf: Shelf, tmp_path: Path) -> None:
    one, _ = run(chain, shelf, tmp_path).files
    shorter = chain.stages[0].model_copy(update={"steps": 3})
    two, _ = run(chain.model_copy(update={"stages": (shorter,)}), shelf, tmp_path).files
    found = compare(one, two)
    assert found.steps == ()
    assert ("stage again", "there", None) in found.settings
    assert not any("again" in what for what in found.circumstances)


def test_pictures_that_cannot_be_compared(chain: Chain, shelf: Shelf, tmp_path: Path) -> None:
    one, _ = run(chain, shelf, tmp_path).files
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    with pytest.raises(BadInput, match=r"plain.png does not say what made it"):
        compare(one, tmp_path / "plain.png")
    with pytest.raises(BadInput, match=r"cannot be compared .* one is of another version"):
        compare(one, changed(tmp_path / "output_001.png", trail={"text": [1]}))
    with pytest.raises(BadInput, match=r"cannot be compared .* one is of another version"):
        compare(one, changed(tmp_path / "output_001.png", trail={}, chain={"stages": ["text"]}))
    one.unlink()
    with pytest.raises(BadInput, match="There is no picture to see at"):
        compare(one.with_suffix(".json"), one.with_suffix(".json"))
