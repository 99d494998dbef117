"""A branch is what the changed chain makes of the latents at the fork, and what lies before is run once."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from unrolled import __main__ as command
from unrolled.chains.chain import Chain, ImageToImage, Stage, TextToImage
from unrolled.chains.film.values import Film
from unrolled.chains.fork import fork
from unrolled.chains.outputs import Result
from unrolled.chains.read import changed
from unrolled.chains.replay import replay
from unrolled.chains.run import run
from unrolled.core.errors import BadChain, BadInput
from unrolled.core.latents import Latents
from unrolled.core.loading import Shelf
from unrolled.core.loop import Step


@pytest.fixture(scope="module")
def shelf() -> Shelf:
    return Shelf(device="cpu")


@pytest.fixture
def chain(tiny_folder: Path) -> Chain:
    common: dict[str, Any] = {"model": str(tiny_folder), "prompt": "a castle", "steps": 5, "solver": "dpm++2m"}
    return Chain(stages=(TextToImage(name="text", **common), ImageToImage(name="again", strength=0.8, **common)), batch=2)


def pixels(result: Result) -> list[bytes]:
    return [picture.tobytes() for picture in result.pictures]


@pytest.mark.parametrize("solver", ["euler", "dpm++2m-sde"])
def test_without_a_change_both_are_the_run_itself(solver: str, chain: Chain, shelf: Shelf) -> None:
    chain = changed(chain, [f"solver={solver}"])
    whole = pixels(run(chain, shelf))
    for stage, step in (("text", 2), ("again", 3)):
        made = fork(chain, chain, shelf, step, stage)
        assert pixels(made.parent) == pixels(made.branch) == whole
        assert made.branch.trail == made.parent.trail


def test_the_prefix_is_run_once(chain: Chain, shelf: Shelf) -> None:
    seen: list[tuple[str, int]] = []

    def watch(stage: Stage, step: Step) -> None:
        seen.append((stage.name, step.index))

    made = fork(chain, changed(chain, ["again.prompt=a house"]), shelf, 3, "again", watch=watch)
    text, again = [("text", i) for i in range(5)], [("again", i) for i in range(1, 5)]
    assert seen == text + again + again[2:]
    assert made.branch.trail["again"][:2] == made.parent.trail["again"][:2]
    assert made.branch.trail["again"][2:] != made.parent.trail["again"][2:]
    assert made.sheet().width > 2 * 64


def test_guidance_from_a_step_on_is_guidance_per_step(chain: Chain, shelf: Shelf) -> None:
    """A fork by hand is what a list of scales does."""
    chain = chain.model_copy(update={"stages": chain.stages[:1]})
    made = fork(changed(chain, ["guidance_scale=5.0"]), changed(chain, ["guidance_scale=2.0"]), shelf, 3)
    listed = run(changed(chain, ["guidance_scale=[5.0, 5.0, 5.0, 2.0, 2.0]"]), shelf)
    assert pixels(made.branch) == pixels(listed)


def test_noise_from_a_step_on(chain: Chain, shelf: Shelf) -> None:
    chain = changed(chain.model_copy(update={"stages": chain.stages[:1]}), ["solver=euler-ancestral"])
    made = fork(chain, changed(chain, (), seed=7), shelf, 2)
    assert made.branch.trail["text"][:2] == made.parent.trail["text"][:2]
    assert pixels(made.branch) != pixels(made.parent)
    plain = changed(chain, ["solver=euler"])
    same = fork(plain, changed(plain, (), seed=7), shelf, 2)
    assert pixels(same.branch) == pixels(same.parent), "a solver that draws nothing does not mind"


def test_another_solver_goes_on_below_the_same_level(chain: Chain, shelf: Shelf) -> None:
    """On its own levels, without the other one's memory."""
    chain = chain.model_copy(update={"stages": chain.stages[:1]})
    made = fork(chain, changed(chain, ["solver=heun", "spacing=karras"]), shelf, 2)
    marks = [images[0] for images in made.branch.trail["text"]]
    assert [mark.sigma for mark in marks[:2]] == [images[0].sigma for images in made.parent.trail["text"][:2]]
    assert all(a.sigma > b.sigma for a, b in pairwise(marks))
    assert pixels(made.branch) != pixels(made.parent)


def test_edited_latents(chain: Chain, shelf: Shelf) -> None:
    chain = chain.model_copy(update={"stages": chain.stages[:1]})

    def mirrored(latents: Latents) -> Latents:
        return replace(latents, x=latents.x.flip(-1), history=())

    made = fork(chain, chain, shelf, 3, edit=mirrored)
    assert pixels(made.branch) != pixels(made.parent)
    assert made.branch.forked is not None
    assert made.branch.forked["edited"]


def test_a_branch_can_be_replayed(chain: Chain, shelf: Shelf, tmp_path: Path) -> None:
    made = fork(chain, changed(chain, ["again.prompt=a house"], seed=9), shelf, 3, "again", tmp_path)
    for file in (*made.parent.files, *made.branch.files):
        assert str(replay(file)) == "identical"
    edited = fork(chain, chain, shelf, 3, "again", tmp_path, edit=lambda latents: latents)
    with pytest.raises(BadInput, match="edited after step 3 of 'again': it cannot be made again"):
        replay(edited.branch.files[0])


def test_what_cannot_be_forked(chain: Chain, shelf: Shelf) -> None:
    with pytest.raises(BadInput, match="A fork is in a stage that denoises, text or again, not 'agian'"):
        fork(chain, chain, shelf, 1, "agian")
    with pytest.raises(BadInput, match="Stage 'again' can be forked after its steps 2 to 5, not after 1"):
        fork(chain, chain, shelf, 1, "again", watch=lambda *_: pytest.fail("it is known before anything runs"))
    with pytest.raises(BadInput, match="Stage 'text' is changed too, which lies before the fork in 'again'"):
        fork(chain, changed(chain, ["text.prompt=a house"]), shelf, 3, "again")
    with pytest.raises(BadInput, match="needs a stage 'again' at the same place, and a batch of 2"):
        fork(chain, changed(chain, (), batch=1), shelf, 3, "again")


def test_a_change_that_is_none(chain: Chain) -> None:
    assert changed(chain, ()) == chain
    with pytest.raises(BadChain, match=r"Given for a chain: unknown key 'promt'; did you mean 'prompt'\?"):
        changed(chain, ["text.promt=a house"])
    with pytest.raises(BadChain, match="names no stage of this chain; its stages are text, again"):
        changed(chain, ["txt.prompt=a house"])


def test_the_command(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unrolled(*arguments: str) -> str:
        job = ("fork", "text-to-image", "--steps", "4", "--set", f"model={tiny_folder}", "--output", str(tmp_path))
        monkeypatch.setattr(sys, "argv", ["unrolled", *job, *arguments])
        with contextlib.suppress(SystemExit):
            command.main()
        said = capsys.readouterr()
        return said.out + said.err

    page = tmp_path / "both.html"
    said = unrolled("--at", "2", "--change", "prompt=a house", "--film", str(page))
    assert [Path(line).name for line in said.split()] == ["output_000.png", "output_001.png", "fork_000.png", "both.html"]
    (scene,) = Film.load(page).scenes
    assert [frame.index for frame in scene.frames] == [2, 3]
    assert Image.open(tmp_path / "fork_000.png").width > 2 * 64
    assert "Nothing is different after the fork: say what with --change" in unrolled("--at", "2")
    assert "--at 'half' is not of the form STEP or STAGE.STEP, e.g. 12 or text-to-image.12." in unrolled("--at", "half")
    latents = (
        fork(
            Chain(stages=(TextToImage(model=str(tiny_folder), steps=4),)),
            Chain(stages=(TextToImage(model=str(tiny_folder), steps=4),)),
            Shelf(device="cpu"),
            2,
        )
        .parent.outputs["text-to-image"]
        .latents
    )
    assert latents is not None
    replace(latents, x=torch.randn_like(latents.x), sigma=1.0).save(tmp_path / "mine.safetensors")
    assert "fork_001.png" in unrolled("--at", "2", "--latents", str(tmp_path / "mine.safetensors"))
