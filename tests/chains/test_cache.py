"""What was made before is reused, to the byte; what is damaged is made again."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors.torch import load_file
from unrolled import __main__ as command
from unrolled.chains import keys
from unrolled.chains.cache import Cache, foreseen
from unrolled.chains.chain import Chain, Cut, ImageToImage, Ingredient, Inpaint, PriorOptions, Resize, Stage, TextToImage
from unrolled.chains.outputs import Result
from unrolled.chains.plan import plan
from unrolled.chains.replay import replay
from unrolled.chains.run import run
from unrolled.core.loading import Shelf
from unrolled.core.loop import Step

Watched = list[tuple[str, int]]


@pytest.fixture(scope="module")
def shelf() -> Shelf:
    return Shelf(device="cpu")


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


@pytest.fixture
def chain(tiny_folder: Path) -> Chain:
    common: dict[str, Any] = {"model": str(tiny_folder), "prompt": "a castle", "steps": 5, "solver": "dpm++2m-sde"}
    return Chain(
        stages=(
            TextToImage(name="text", guidance_scale=[5.0] * 5, **common),
            ImageToImage(name="again", strength=0.8, guidance_scale=[5.0] * 5, **common),
        )
    )


def changed(chain: Chain, name: str, **options: object) -> Chain:
    """The same chain with a stage told something else."""
    stages = tuple(s.model_copy(update=options) if s.name == name else s for s in chain.stages)
    return chain.model_copy(update={"stages": stages})


def pixels(result: Result) -> list[bytes]:
    return [picture.tobytes() for picture in result.pictures]


@pytest.fixture
def made(shelf: Shelf, cache: Cache) -> Callable[[Chain], tuple[Watched, Result]]:
    """Runs a chain with the cache, sees that the pictures are those without it, and says which steps were run."""

    def make(chain: Chain) -> tuple[Watched, Result]:
        seen: Watched = []

        def watch(stage: Stage, step: Step) -> None:
            seen.append((stage.name, step.index))

        result = run(chain, shelf, cache=cache, watch=watch)
        plain = run(chain, shelf)
        assert pixels(result) == pixels(plain)
        assert result.trail == plain.trail
        assert result.models == plain.models
        assert result.inputs.keys() == plain.inputs.keys()
        assert {*plain.notes} <= {*result.notes}
        assert [o.is_picture for o in result.outputs.values()] == [o.is_picture for o in plain.outputs.values()]
        return seen, result

    return make


TEXT = [("text", i) for i in range(5)]
AGAIN = [("again", i) for i in range(1, 5)]


def test_the_same_again_runs_nothing(chain: Chain, made: Callable[[Chain], tuple[Watched, Result]]) -> None:
    assert made(chain)[0] == TEXT + AGAIN
    seen, result = made(chain)
    assert seen == []
    assert "Stage 'again': 4 of 4 steps were made before and reused." in result.notes


def test_no_model_is_loaded_for_what_is_known(
    chain: Chain, shelf: Shelf, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(chain, shelf, cache=cache)
    monkeypatch.setattr(Shelf, "load", None)
    assert pixels(run(chain, Shelf(device="cpu"), cache=cache)) == pixels(whole)


def test_a_change_in_the_second_stage_reuses_the_first(
    chain: Chain, made: Callable[[Chain], tuple[Watched, Result]]
) -> None:
    made(chain)
    assert made(changed(chain, "again", prompt="a house"))[0] == AGAIN
    assert made(changed(chain, "text", prompt="a house"))[0] == TEXT + AGAIN


def test_a_change_in_the_fourth_step_reuses_the_first_three(
    chain: Chain, made: Callable[[Chain], tuple[Watched, Result]]
) -> None:
    made(chain)
    assert made(changed(chain, "text", guidance_scale=[5.0, 5.0, 5.0, 2.0, 5.0]))[0] == TEXT[3:] + AGAIN
    # and on from what that run added to what it had reused
    assert made(changed(chain, "text", guidance_scale=[5.0, 5.0, 5.0, 2.0, 1.0]))[0] == TEXT[4:] + AGAIN


def test_a_run_that_stops_earlier_is_known(chain: Chain, made: Callable[[Chain], tuple[Watched, Result]]) -> None:
    made(chain)
    rest = changed(changed(chain, "text", stop=Cut(step=3)), "again", start="handoff", strength=None)
    assert made(rest)[0] == [("again", 3), ("again", 4)]
    assert made(rest)[0] == []


@pytest.mark.parametrize("solver", ["heun", "pndm", "unipc", "lcm"])
def test_prefixes_of_every_kind_of_solver(
    solver: str, chain: Chain, made: Callable[[Chain], tuple[Watched, Result]]
) -> None:
    stage = chain.stages[0].model_copy(update={"solver": solver, "steps": 8, "guidance_scale": [5.0] * 8})
    job = chain.model_copy(update={"stages": (stage,)})
    count = len(made(job)[0])
    scales = [5.0] * 8
    scales[-1] = 2.0
    assert 0 < len(made(changed(job, "text", guidance_scale=scales))[0]) < count


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"batch": 2},
        {"prompt": "a house"},
        {"steps": 4, "guidance_scale": 5.0},
        {"negative_prompt": "grey"},
        {"eta": 0.5, "solver": "ddim"},
        {"tiled": True},
    ],
    ids=str,
)
def test_what_makes_other_latents_is_not_taken_for_the_same(
    change: dict[str, Any], chain: Chain, made: Callable[[Chain], tuple[Watched, Result]]
) -> None:
    job = chain.model_copy(update={"stages": chain.stages[:1]})
    made(job)
    other = job.model_copy(update=change) if {"seed", "batch"} & change.keys() else changed(job, "text", **change)
    assert len(made(other)[0]) >= 4


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("scheduler/scheduler_config.json", "prediction_type", "v_prediction"),
        ("model_index.json", "force_zeros_for_empty_prompt", False),
    ],
)
def test_the_configs_of_a_checkpoint_are_part_of_it(
    file: str, key: str, value: object, chain: Chain, shelf: Shelf, cache: Cache, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(chain.stages[0].model, tmp_path / "model")) / file  # type: ignore[union-attr]
    job = changed(chain.model_copy(update={"stages": chain.stages[:1]}), "text", model=str(tmp_path / "model"))
    run(job, shelf, cache=cache)
    assert foreseen(cache, job, plan(job, shelf), shelf)
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    other = Shelf(device="cpu")
    assert not foreseen(cache, job, plan(job, other), other)


def test_other_code_makes_other_latents(chain: Chain, shelf: Shelf, cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    run(chain, shelf, cache=cache)
    assert keys._code() != ""
    monkeypatch.setattr(keys, "_code", lambda: "edited")
    assert not foreseen(cache, chain, plan(chain, shelf), shelf)


def test_what_is_said_is_said_again(chain: Chain, made: Callable[[Chain], tuple[Watched, Result]]) -> None:
    job = changed(chain, "text", prompt="a castle " * 60)
    made(job)
    seen, result = made(job)
    assert seen == []
    assert any("tokens of the prompt fit; dropped" in note for note in result.notes)


def test_a_mix_of_a_long_prompt_and_a_picture(
    tiny_kandinsky_folder: Path,
    tiny_prior_folder: Path,
    picture: Image.Image,
    tmp_path: Path,
    made: Callable[[Chain], tuple[Watched, Result]],
) -> None:
    picture.save(tmp_path / "start.png")
    mix = (Ingredient(prompt="a castle " * 60, weight=0.5), Ingredient(image="start.png", weight=0.5))
    prior = PriorOptions(model=str(tiny_prior_folder), steps=2, mix=mix)
    chain = Chain(stages=(TextToImage(model=str(tiny_kandinsky_folder), steps=2, prior=prior),), folder=tmp_path)
    assert len(made(chain)[0]) == 2
    seen, result = made(chain)
    assert seen == []
    assert result.inputs.keys() == {"start.png"}


def test_repetitions_pictures_and_masks(
    tiny_folder: Path,
    picture: Image.Image,
    mask: Image.Image,
    tmp_path: Path,
    made: Callable[[Chain], tuple[Watched, Result]],
) -> None:
    picture.save(tmp_path / "start.png")
    mask.save(tmp_path / "mask.png")
    common: dict[str, Any] = {"model": str(tiny_folder), "prompt": "a castle", "steps": 3, "solver": "euler"}
    stages = (
        ImageToImage(name="thrice", image="start.png", fit=True, strength=1.0, repeat=3, **common),
        Inpaint(name="paint", mask="mask.png", fit=True, **common),
        Resize(factor=2),
    )
    chain = Chain(stages=stages, folder=tmp_path, grid=True)
    assert len(made(chain)[0]) == 12
    assert made(chain)[0] == []
    picture.rotate(180).save(tmp_path / "start.png")
    assert len(made(chain)[0]) == 12


def test_pictures_from_the_cache_can_be_replayed(chain: Chain, shelf: Shelf, cache: Cache, tmp_path: Path) -> None:
    run(chain, shelf, cache=cache)
    (file,) = run(chain, shelf, tmp_path / "out", cache=cache).files
    again = replay(file)
    assert (str(again), again.changed) == ("identical", ())


def test_the_plan_and_the_command_say_what_is_reused(
    chain: Chain,
    tiny_folder: Path,
    shelf: Shelf,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def unrolled(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["unrolled", *arguments])
        with contextlib.suppress(SystemExit):
            command.main()
        said = capsys.readouterr()
        return said.out + said.err

    job = ("text-to-image", "--steps", "4", "--set", f"model={tiny_folder}", "--device", "cpu")
    to = ("--output", str(tmp_path / "out"))
    assert "reused" not in unrolled("plan", *job)
    assert "reused" not in unrolled("run", *job, *to)
    assert "text-to-image: 4 of 4 steps were made before and will be reused" in unrolled("plan", *job)
    assert "4 of 4 steps were made before and reused" in unrolled("run", *job, *to)
    assert "reused" not in unrolled("run", *job, *to, "--no-cache")
    assert "reused" not in unrolled("plan", *job, "--seed", "1")


def test_what_a_plan_foresees(chain: Chain, shelf: Shelf, cache: Cache) -> None:
    run(chain, shelf, cache=cache)
    assert foreseen(cache, chain, plan(chain, shelf), shelf) == {"text": (5, 5), "again": (4, 4)}
    later = changed(chain, "again", guidance_scale=[5.0, 5.0, 5.0, 5.0, 1.0])
    assert foreseen(cache, later, plan(later, shelf), shelf) == {"text": (5, 5), "again": (3, 4)}
    other = changed(chain, "text", prompt="a house")
    assert foreseen(cache, other, plan(other, shelf), shelf) == {}


# --- the folder


def files(cache: Cache) -> list[Path]:
    return sorted(cache.folder.glob("*/*.safetensors"))


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def poisoned(path: Path) -> None:
    data = path.read_bytes()
    numbers = 8 + int.from_bytes(data[:8], "little")
    path.write_bytes(data[:numbers] + bytes(byte ^ 1 for byte in data[numbers:]))


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def of_another_seed(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'\\"seeds\\": [0]', b'\\"seeds\\": [7]'))


def lying(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'\\"sigma\\": ', b'\\"sigmo\\": '))


@pytest.mark.parametrize("damage", [truncated, poisoned, emptied, lying, of_another_seed])
def test_damaged_files_are_made_again(
    damage: Callable[[Path], None], chain: Chain, cache: Cache, made: Callable[[Chain], tuple[Watched, Result]]
) -> None:
    made(chain)
    whole = {path: load_file(path).keys() for path in files(cache)}
    for path in whole:
        damage(path)
    assert made(chain)[0] == TEXT + AGAIN
    assert {path: load_file(path).keys() for path in files(cache)} == whole, "the names are digests"
    assert made(chain)[0] == []


def test_damaged_files_that_may_not_be_removed_are_no_fault(
    chain: Chain, shelf: Shelf, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(chain, shelf, cache=cache)
    for path in files(cache):
        truncated(path)
    before, tried = Path.unlink, list[Path]()

    def unlink(path: Path, missing_ok: bool = False) -> None:
        if path.suffix == ".safetensors":
            tried.append(path)
            raise PermissionError(path)
        before(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink)
    assert pixels(run(chain, shelf, cache=cache)) == pixels(whole)
    assert tried


def test_it_keeps_to_its_size(chain: Chain, shelf: Shelf, tmp_path: Path) -> None:
    job = chain.model_copy(update={"stages": chain.stages[:1]})
    one = Cache(tmp_path / "one")
    run(job, shelf, cache=one)
    (entry,) = files(one)
    small = Cache(tmp_path / "small", limit=int(2.5 * entry.stat().st_size))
    for seed in range(4):
        run(job.model_copy(update={"seed": seed}), shelf, cache=small)
        if seed == 1:  # the first is used again, so the second is the one to go
            run(job, shelf, cache=small)
    assert sum(path.stat().st_size for path in files(small)) <= small.limit
    assert len(files(small)) == 2
    none = Cache(tmp_path / "none", limit=10)
    run(job, shelf, cache=none)
    assert files(none) == []


def test_what_a_killed_process_left_is_counted(chain: Chain, shelf: Shelf, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "small", limit=200_000)
    (cache.folder / "other").mkdir(parents=True)
    left = cache.folder / "other" / ".entry.safetensors.0a1b2c3d"
    left.write_bytes(bytes(cache.limit))
    run(chain, shelf, cache=cache)
    assert not left.exists()


def test_two_runs_at_once_share_it(chain: Chain, cache: Cache) -> None:
    made: list[list[bytes]] = []
    shelves = [Shelf(device="cpu") for _ in "ab"]
    for shelf in shelves:
        run(chain, shelf)  # models are not to be loaded in threads, which transformers does one at a time
    runs = [
        threading.Thread(target=lambda shelf=shelf: made.append(pixels(run(chain, shelf, cache=cache)))) for shelf in shelves
    ]
    for one in runs:
        one.start()
    for one in runs:
        one.join()
    assert made[0] == made[1]
    assert len(files(cache)) == 2
    assert not list(cache.folder.glob("*/.*"))


def test_a_folder_that_cannot_be_written_is_no_fault(chain: Chain, shelf: Shelf, tmp_path: Path) -> None:
    (tmp_path / "blocked").write_text("a file where the folder should be")
    assert pixels(run(chain, shelf, cache=Cache(tmp_path / "blocked"))) == pixels(run(chain, shelf))
    assert (tmp_path / "blocked").read_text() == "a file where the folder should be"


def test_where_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("UNROLLED_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert Cache.usual().folder == tmp_path / "unrolled"
    monkeypatch.setenv("UNROLLED_CACHE", str(tmp_path / "mine"))
    assert Cache.usual().folder == tmp_path / "mine"
    assert not os.listdir(tmp_path)
