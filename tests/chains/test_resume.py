"""A run that was stopped anywhere goes on to the very pictures it would have made."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from unrolled import Latents
from unrolled import __main__ as command
from unrolled.chains import outputs, runner
from unrolled.chains.chain import Chain, Cut, ImageToImage, Inpaint, Resize, Stage, TextToImage, Upscale
from unrolled.chains.outputs import Result
from unrolled.chains.run import resume, run
from unrolled.chains.saved import Saved
from unrolled.core.errors import BadInput, BadModel
from unrolled.core.files import write_atomically
from unrolled.core.loading import Shelf
from unrolled.core.loop import Step

SOLVERS = ["euler", "euler-ancestral", "dpm++2m-sde", "pndm", "heun", "unipc", "dpm++sde"]


@pytest.fixture(scope="module")
def shelf() -> Shelf:
    return Shelf(device="cpu")


@pytest.fixture
def chain(tiny_folder: Path, tiny_inpaint_folder: Path, tiny_x4_folder: Path, mask: Image.Image, tmp_path: Path) -> Chain:
    """Four stages of different kinds, and one that only resizes."""
    mask.resize((64, 64)).save(tmp_path / "mask.png")
    common: dict[str, Any] = {"prompt": "a castle", "steps": 4}
    return Chain(
        stages=(
            TextToImage(name="text", model=str(tiny_folder), **common),
            ImageToImage(name="again", model=str(tiny_folder), strength=0.8, **common),
            Inpaint(name="paint", model=str(tiny_inpaint_folder), mask="mask.png", **common),
            Upscale(name="larger", model=str(tiny_x4_folder), **common),
            Resize(factor=0.5),
        ),
        batch=2,
        folder=tmp_path,
    )


class Stopped(Exception):
    pass


def stopping_at(name: str, index: int) -> Callable[[Stage, Step], None]:
    def watch(stage: Stage, step: Step) -> None:
        if stage.name == name and step.index >= index:
            raise Stopped

    return watch


def solved_by(chain: Chain, solver: str) -> Chain:
    stages = tuple(s.model_copy(update={"solver": solver}) if hasattr(s, "solver") else s for s in chain.stages)
    return chain.model_copy(update={"stages": stages})


def pixels(result: Result) -> list[bytes]:
    return [picture.tobytes() for picture in result.pictures]


@pytest.mark.parametrize("solver", ["dpm++2m", *(pytest.param(name, marks=pytest.mark.slow) for name in SOLVERS)])
def test_stopped_in_every_stage_and_gone_on_with(solver: str, chain: Chain, shelf: Shelf, tmp_path: Path) -> None:
    chain = solved_by(chain, solver)
    whole = run(chain, shelf)
    with pytest.raises(Stopped):
        run(chain, shelf, tmp_path / "out", stopping_at("text", 1))
    for name, index in (("again", 2), ("paint", 2), ("larger", 1)):
        with pytest.raises(Stopped):
            resume(tmp_path / "out", Shelf(device="cpu"), stopping_at(name, index))
    seen: list[tuple[str, int]] = []
    result = resume(tmp_path / "out", watch=lambda stage, step: seen.append((stage.name, step.index)))
    assert seen[0] == ("larger", 1)
    assert pixels(result) == pixels(whole)
    left = sorted(path.name for path in (tmp_path / "out").iterdir() if not path.name.startswith("unfinished"))
    assert left == ["output_000.json", "output_000.png", "output_001.json", "output_001.png"]


def test_saved_after_every_other_step_it_is_a_file_of_latents_too(chain: Chain, shelf: Shelf, tmp_path: Path) -> None:
    """And gone when the pictures are there."""
    path, known = tmp_path / "out" / "interrupted_000.safetensors", list[int]()

    def watch(stage: Stage, step: Step) -> None:
        saved = Saved.load(path)
        known.append(0 if saved.point is None else saved.point.step)
        if saved.point is not None:
            torch.testing.assert_close(Latents.load(path).x, saved.point.latents.x, rtol=0, atol=0)

    run(chain.model_copy(update={"stages": chain.stages[:1]}), shelf, path.parent, watch, save_every=2)
    assert known == [0, 0, 2, 2]
    assert not path.exists()


@pytest.mark.parametrize("solver", ["dpm++2m", "euler-ancestral"])
def test_a_run_that_two_stages_share(solver: str, tiny_folder: Path, shelf: Shelf, tmp_path: Path) -> None:
    """Noise and the solver's memory go over the cut."""
    common: dict[str, Any] = {"model": str(tiny_folder), "prompt": "a castle", "steps": 6, "solver": solver}
    chain = Chain(
        stages=(
            TextToImage(name="first", stop=Cut(step=3), **common),
            ImageToImage(name="rest", start="handoff", **common),
        )
    )
    whole = run(chain, shelf)
    for name, index in (("first", 2), ("rest", 4)):
        with pytest.raises(Stopped):
            run(chain, shelf, tmp_path / name, stopping_at(name, index))
        assert pixels(resume(tmp_path / name)) == pixels(whole)


def test_within_a_repetition_with_an_animation_and_a_grid(tiny_folder: Path, shelf: Shelf, tmp_path: Path) -> None:
    common: dict[str, Any] = {"model": str(tiny_folder), "prompt": "a castle", "steps": 3, "solver": "euler"}
    stages = (TextToImage(name="text", **common), ImageToImage(name="again", strength=1.0, repeat=3, **common))
    chain = Chain(stages=stages, gif=True, grid=True)
    whole, seen = run(chain, shelf), list[int]()

    def stop_in_the_second(stage: Stage, step: Step) -> None:
        seen.append(step.index)
        if len(seen) == 3 + 3 + 2:
            raise Stopped

    with pytest.raises(Stopped):
        run(chain, shelf, tmp_path, stop_in_the_second, save_every=1)
    result = resume(tmp_path)
    assert pixels(result) == pixels(whole)
    assert [f.tobytes() for f in result.frames] == [f.tobytes() for f in whole.frames]
    assert (tmp_path / "output_000-grid.png").is_file()


def test_a_decoder_and_its_prior(tiny_kandinsky_folder: Path, tiny_prior_folder: Path, shelf: Shelf, tmp_path: Path) -> None:
    prior = {"model": str(tiny_prior_folder), "steps": 2}
    stage = TextToImage(model=str(tiny_kandinsky_folder), prompt="a castle", steps=4, prior=prior, height=64, width=64)
    chain = Chain(stages=(stage,))
    whole = run(chain, shelf)
    with pytest.raises(Stopped):
        run(chain, shelf, tmp_path, stopping_at("text-to-image", 2))
    assert pixels(resume(tmp_path)) == pixels(whole)


# --- killed


def ends(work: Callable[[], object], after: float | None = None) -> bool:
    """Do it in a process of its own, killed after so many seconds; whether it came to its end."""
    child = os.fork()
    if not child:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert not os.WIFEXITED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFEXITED(status)


def killed_and_resumed(chain: Chain, folder: Path, seconds: float, draw: random.Random) -> tuple[Path, int]:
    """The picture of a run that was killed at random places, often twice; and how often it was."""
    kills = 0
    if not ends(lambda: run(chain, Shelf(device="cpu"), folder, save_every=1), draw.uniform(0, seconds)):
        kills += 1
        while list(folder.glob("interrupted*")):
            again = draw.uniform(0, seconds) if draw.random() < 0.5 else None
            try:
                kills += not ends(lambda: resume(folder, save_every=1), again)
            except BadInput:
                break
            except AssertionError:
                assert not any(file.stat().st_size for file in folder.glob("interrupted*"))
                break
        if not list(folder.glob("output*.json")):  # killed before there was anything to go on from
            ends(lambda: run(chain, Shelf(device="cpu"), folder))
    return folder / "output_000.png", kills


@pytest.mark.parametrize(
    ("solvers", "times"),
    [(["dpm++2m"], 4), pytest.param(["dpm++2m", *SOLVERS[:5]], 34, marks=pytest.mark.slow)],
    ids=["few", "200 kills"],
)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a process that was forked")
def test_killed_at_any_moment(solvers: list[str], times: int, chain: Chain, shelf: Shelf, tmp_path: Path) -> None:
    draw, kills = random.Random(0), 0
    torch.set_num_threads(1)  # a forked process has no other threads
    for solver in solvers:
        job = solved_by(chain.model_copy(update={"batch": 1}), solver)
        began = time.perf_counter()
        assert ends(lambda job=job, solver=solver: run(job, Shelf(device="cpu"), tmp_path / solver))  # type: ignore[misc]
        seconds = time.perf_counter() - began
        whole = np.asarray(Image.open(tmp_path / solver / "output_000.png"))
        for i in range(times):
            folder = tmp_path / f"{solver} {i}"
            path, times_killed = killed_and_resumed(job, folder, seconds, draw)
            kills += times_killed
            assert np.array_equal(np.asarray(Image.open(path)), whole)
            assert sorted(file.name for file in folder.iterdir()) == ["output_000.json", "output_000.png"]
            assert all(file.stat().st_size for file in folder.iterdir())
    assert kills >= len(solvers) * times // 2


@pytest.mark.parametrize("killed", [True, False])
@pytest.mark.parametrize("at", [3, 4])
@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a process that was forked")
def test_images_that_are_written_already_are_not_written_again(
    at: int, killed: bool, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = Chain(stages=(TextToImage(model=str(tiny_folder), prompt="a castle", steps=2),), batch=3)
    torch.set_num_threads(1)
    written: list[object] = []

    def write(path: str | Path, data: bytes) -> Path:
        written.append(path)
        if len(written) > at:  # the second image is at its picture, or at its .json
            if killed:
                os.kill(os.getpid(), signal.SIGKILL)
            raise KeyboardInterrupt
        return write_atomically(path, data)

    def die() -> None:
        monkeypatch.setattr(outputs, "write_atomically", write)
        monkeypatch.setattr(runner, "rescue", lambda *_: None)
        with contextlib.suppress(KeyboardInterrupt):
            run(chain, Shelf(device="cpu"), tmp_path, save_every=1)

    assert ends(die) is not killed
    resumed = resume(tmp_path)
    assert [file.name for file in resumed.files][:1] == ["output_000.png"]
    assert len(resumed.files) == 3
    assert [Image.open(file).tobytes() for file in resumed.files] == pixels(resumed)
    assert sorted(file.suffix for file in tmp_path.iterdir()) == [".json"] * 3 + [".png"] * 3


# --- what cannot be gone on with


def test_a_run_that_is_still_under_way_is_left_alone(tiny_folder: Path, shelf: Shelf, tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    chain = Chain(stages=(TextToImage(model=str(tiny_folder), steps=3, solver="euler"),))
    tried: list[str] = []

    def meddle(stage: Stage, step: Step) -> None:
        for where in (tmp_path, *tmp_path.glob("interrupted*")):
            with pytest.raises(BadInput, match="is still under way: wait for it, or stop it first") as error:
                resume(where)
            tried.append(str(error.value))

    with pytest.raises(Stopped):
        run(chain, shelf, tmp_path / "left", stopping_at("text-to-image", 2), save_every=1)
    run(chain, shelf, tmp_path, meddle, save_every=1)
    assert len(tried) == 6
    left = (tmp_path / "left" / "interrupted_000.safetensors").rename(tmp_path / "interrupted_000.safetensors")

    def another(stage: Stage, step: Step) -> None:
        if left.is_file():
            resume(tmp_path)  # the one that was left, though this one's file is newer
            assert not left.is_file()

    run(chain, shelf, tmp_path, another, save_every=1)
    assert sorted(file.name for file in tmp_path.glob("*.png")) == [f"output_00{i}.png" for i in range(3)]


def test_no_saved_run(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"There is no saved run in .*--save-every 1"):
        resume(tmp_path)
    with pytest.raises(BadInput, match="There is no saved run at"):
        resume(tmp_path / "nothing.safetensors")


def test_a_file_without_a_run_and_a_damaged_one(tiny_folder: Path, shelf: Shelf, tmp_path: Path) -> None:
    path = tmp_path / "interrupted_000.safetensors"
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(BadInput, match="holds no run: give a file that `unrolled run` saved"):
        resume(tmp_path)
    save_file({"x": torch.zeros(1)}, path, {"run": '{"step": 2}'})
    with pytest.raises(BadInput, match="is damaged and cannot be gone on from"):
        resume(path)
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(BadInput, match="is damaged and cannot be gone on from"):
        resume(path)


def test_other_weights(
    tiny_folder: Path, tiny_inpaint_folder: Path, shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = Chain(stages=(TextToImage(model=str(tiny_folder), steps=3, solver="euler"),))
    with pytest.raises(Stopped):
        run(chain, shelf, tmp_path, stopping_at("text-to-image", 2))
    saved = Saved.load(tmp_path / "interrupted_000.safetensors")
    saved.result.models["text-to-image"] = dict(saved.result.models["text-to-image"]) | {"unet": "0"}
    saved.save(tmp_path / "interrupted_000.safetensors")
    with pytest.raises(BadModel, match="the weights of unet are not those that the saved run was begun with"):
        resume(tmp_path)


def test_an_interrupt_before_the_first_step_promises_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("unrolled.chains.run.run", interrupted)
    monkeypatch.setattr("sys.argv", ["unrolled", "run", "text-to-image", "--output", str(tmp_path)])
    with pytest.raises(SystemExit, match="130"):
        command.main()
    assert "Interrupted before there was anything to keep." in " ".join(capsys.readouterr().err.split())


def test_of_several_runs_the_others_are_named(tiny_folder: Path, shelf: Shelf, tmp_path: Path) -> None:
    chain = Chain(stages=(TextToImage(model=str(tiny_folder), steps=3, solver="euler"),))
    for _ in "ab":
        with pytest.raises(Stopped):
            run(chain, shelf, tmp_path, stopping_at("text-to-image", 1))
    assert resume(tmp_path).notes == [
        "This was interrupted_001.safetensors; interrupted_000.safetensors can be gone on with too."
    ]


def test_saving_never_or_every_so_many_steps(chain: Chain, shelf: Shelf) -> None:
    with pytest.raises(BadInput, match="every so many steps, 0 for never, not every -1"):
        run(chain, shelf, save_every=-1)
    with pytest.raises(BadInput, match="A run is saved in the folder that it writes into: give one"):
        run(chain, shelf, save_every=1)


@pytest.mark.parametrize(
    "lie", [{"claimed": ["../output_000"]}, {"claimed": [1]}, {"machine": {"device": "toaster"}}], ids=str
)
def test_a_run_that_says_what_cannot_be(lie: dict[str, Any], tiny_folder: Path, shelf: Shelf, tmp_path: Path) -> None:
    chain = Chain(stages=(TextToImage(model=str(tiny_folder), steps=2, solver="euler"),))
    with pytest.raises(Stopped):
        run(chain, shelf, tmp_path, stopping_at("text-to-image", 1))
    (path,) = tmp_path.iterdir()
    with safe_open(path, framework="pt") as file:
        told, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    facts = json.loads(told["run"])
    facts |= {key: facts[key] | value if isinstance(value, dict) else value for key, value in lie.items()}
    save_file(tensors, path, told | {"run": json.dumps(facts)})
    with pytest.raises(BadInput, match="is damaged and cannot be gone on from"):
        resume(tmp_path)
