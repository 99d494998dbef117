"""Chains run, write what they ask for, and lose nothing that was made."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from unrolled.chains import jobs
from unrolled.chains.chain import Chain, Cut, ImageToImage, Inpaint, Resize, Sharpen, Stage, TextToImage
from unrolled.chains.run import run
from unrolled.core.errors import BadInput, CannotWrite, NonFinite, OutOfMemory
from unrolled.core.latents import Latents
from unrolled.core.loading import Model, Shelf
from unrolled.core.loop import Step
from unrolled.stages.decode import decode


@pytest.fixture(scope="module")
def shelf() -> Shelf:
    return Shelf(device="cpu")


@pytest.fixture
def text(tiny_folder: Path) -> TextToImage:
    return TextToImage(name="text", model=str(tiny_folder), prompt="a castle", steps=4, solver="euler")


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture).astype(int)


def test_everything_a_chain_may_ask_for(shelf: Shelf, text: TextToImage, tmp_path: Path) -> None:
    chain = Chain(
        stages=(text, Sharpen(), Resize(factor=2)), batch=2, seed=5, formats=("png", "jpg", "webp"), grid=True, gif=True
    )
    result = run(chain, shelf, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        [f"output_{i:03d}{end}" for i in range(2) for end in (".png", ".jpg", ".webp", ".json", "-grid.png")]
        + ["output_000.gif"]
    )
    assert [p.size for p in result.pictures] == [(128, 128)] * 2
    film = Image.open(tmp_path / "output_000.gif")
    assert (film.size, film.n_frames) == ((128, 128), 5)  # type: ignore[attr-defined]
    assert Image.open(tmp_path / "output_000-grid.png").width > 3 * 128
    assert json.loads((tmp_path / "output_001.json").read_text())["chain"]["seed"] == 6


def test_nothing_is_overwritten(shelf: Shelf, text: TextToImage, tmp_path: Path) -> None:
    first = run(Chain(stages=(text,)), shelf, tmp_path).files
    second = run(Chain(stages=(text,)), shelf, tmp_path).files
    assert [p.name for p in (*first, *second)] == ["output_000.png", "output_001.png"]
    assert first[0].read_bytes() != b""


def test_an_image_does_not_change_with_the_batch(shelf: Shelf, text: TextToImage) -> None:
    batch = run(Chain(stages=(text,), seed=0, batch=3), shelf).pictures
    alone = run(Chain(stages=(text,), seed=2), shelf).pictures[0]
    assert abs(pixels(batch[2]) - pixels(alone)).max() <= 1, (
        "1e-4 in latents, from the order of sums, is all that may differ"
    )


@pytest.mark.parametrize("solver", ["euler", "euler-ancestral", "dpm++2m", "pndm", "heun", "ddpm"])
def test_a_split_chain_equals_the_unsplit_one_bit_for_bit(shelf: Shelf, text: TextToImage, solver: str) -> None:
    whole = text.model_copy(update={"solver": solver, "steps": 7})
    first = whole.model_copy(update={"stop": Cut(step=3)})
    rest = ImageToImage(**whole.model_dump(include={"model", "prompt", "steps", "solver"}), start="handoff")
    split = run(Chain(stages=(first, rest)), shelf)
    unsplit = run(Chain(stages=(whole,)), shelf)
    ours, theirs = split.outputs["image-to-image"].latents, unsplit.outputs["text"].latents
    assert ours is not None
    assert theirs is not None
    assert torch.equal(ours.x, theirs.x)


def test_a_stopped_stage_is_left_out_of_the_grid(shelf: Shelf, text: TextToImage, tmp_path: Path) -> None:
    first = text.model_copy(update={"stop": Cut(step=2)})
    rest = ImageToImage(**text.model_dump(include={"model", "prompt", "steps", "solver"}), start="handoff")
    run(Chain(stages=(first, rest), grid=True), shelf, tmp_path)
    assert Image.open(tmp_path / "output_000-grid.png").width < 2 * 64


def test_stages_draw_their_own_noise_whatever_stands_between(shelf: Shelf, text: TextToImage) -> None:
    second = text.model_copy(update={"name": "second"})
    plain = run(Chain(stages=(text, second)), shelf).outputs
    between = run(Chain(stages=(text, Sharpen(), second)), shelf).outputs
    (one,), (two,), (three,) = (o.pictures() for o in (plain["text"], plain["second"], between["second"]))
    assert (pixels(one) != pixels(two)).any()
    assert (pixels(two) == pixels(three)).all()


def test_latents_are_handed_on_without_decoding(shelf: Shelf, text: TextToImage, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[Latents] = []

    def counted(model: Model, latents: Latents, *, tiled: bool | None) -> list[Image.Image]:
        decoded.append(latents)
        return decode(model, latents, tiled=tiled)

    monkeypatch.setattr("unrolled.chains.runner.decode", counted)
    second = ImageToImage(model=text.model, prompt="a house", steps=4, strength=0.5)
    run(Chain(stages=(text, second)), shelf)
    assert len(decoded) == 1
    run(Chain(stages=(text, second.model_copy(update={"via": "pixels"}))), shelf)
    assert len(decoded) == 3


@pytest.mark.parametrize("channels", [4, 9])
def test_inpainting_keeps_unmasked_pixels_bit_exact(
    channels: int,
    shelf: Shelf,
    tiny_folder: Path,
    tiny_inpaint_folder: Path,
    picture: Image.Image,
    mask: Image.Image,
    tmp_path: Path,
) -> None:
    picture.save(tmp_path / "in.png")
    mask.save(tmp_path / "mask.png")
    folder = tiny_folder if channels == 4 else tiny_inpaint_folder
    stage = Inpaint(model=str(folder), image="in.png", mask="mask.png", steps=3, solver="heun", mask_blur=3)
    out = run(Chain(stages=(stage,), folder=tmp_path, batch=2), shelf).pictures
    kept = np.asarray(mask) < 128
    for painted in out:
        assert (pixels(painted)[kept] == pixels(picture)[kept]).all()
        assert (pixels(painted)[~kept] != pixels(picture)[~kept]).any()
    loose = stage.model_copy(update={"composite": False, "mask_blur": 0.0})
    again = run(Chain(stages=(loose,), folder=tmp_path), shelf).pictures[0]
    assert (pixels(again)[kept] != pixels(picture)[kept]).any(), "the VAE changes kept pixels without the composite"


def test_the_picture_of_another_stage(shelf: Shelf, text: TextToImage) -> None:
    chain = Chain(stages=(text, Resize(name="large", factor=3), Resize(name="small", factor=0.5, after="text")))
    assert run(chain, shelf).pictures[0].size == (32, 32)


def test_dropped_prompt_text_becomes_a_note(shelf: Shelf, text: TextToImage, tmp_path: Path) -> None:
    long = text.model_copy(update={"prompt": "cat " * 100 + "zebra"})
    result = run(Chain(stages=(long,)), shelf, tmp_path)
    assert any("zebra" in note for note in result.notes)
    assert "zebra" in json.loads((tmp_path / "output_000.json").read_text())["notes"][0]


# What was made is not lost.


def failing_at(stage_name: str, error: BaseException, step: int = 2) -> Callable[[Stage, Step], None]:
    def watch(stage: Stage, at: Step) -> None:
        if stage.name == stage_name and at.index == step:
            raise error

    return watch


@pytest.fixture
def two(text: TextToImage) -> Chain:
    return Chain(stages=(text, ImageToImage(name="second", model=text.model, steps=6, strength=1.0)))


def test_an_interrupted_run_leaves_latents_and_the_stages_before(shelf: Shelf, two: Chain, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(two, shelf, tmp_path, failing_at("second", KeyboardInterrupt()))
    latents = Latents.load(tmp_path / "interrupted_000.safetensors")
    assert not latents.is_clean
    assert (tmp_path / "unfinished_000.png").is_file()


def test_a_fault_in_a_later_stage_names_it_and_keeps_the_first(shelf: Shelf, two: Chain, tmp_path: Path) -> None:
    with pytest.raises(NonFinite, match="Stage 'second': NaN in step 3"):
        run(two, shelf, tmp_path, failing_at("second", NonFinite("NaN in step 3")))
    assert (tmp_path / "unfinished_000.png").is_file()


def test_a_rescue_that_fails_does_not_hide_the_fault(
    shelf: Shelf, two: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise CannotWrite("the disk is full")

    monkeypatch.setattr("unrolled.chains.outputs.claim", full)
    with pytest.raises(NonFinite, match="NaN in step 3"):
        run(two, shelf, tmp_path, failing_at("second", NonFinite("NaN in step 3")))


def test_a_folder_that_cannot_be_written_is_found_before_the_work(shelf: Shelf, text: TextToImage, tmp_path: Path) -> None:
    (tmp_path / "blocked").write_text("a file where the folder should be")
    with pytest.raises(CannotWrite, match="choose another folder with --output"):
        run(Chain(stages=(text,)), shelf, tmp_path / "blocked", failing_at("text", AssertionError("it ran"), step=0))


def test_a_batch_too_large_for_memory_is_run_in_parts(
    shelf: Shelf, text: TextToImage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = jobs.text_to_image

    def small(model: object, spec: object, seeds: tuple[int, ...], *rest: object, **more: object) -> object:
        if len(seeds) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(model, spec, seeds, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(jobs, "text_to_image", small)
    result = run(Chain(stages=(text,), batch=5), shelf, tmp_path)
    assert len(list(tmp_path.glob("output_*.png"))) == len(result.pictures) == 5
    assert not list(tmp_path.glob("un*")), "a batch that was saved by halving leaves nothing unfinished"
    assert any("did not fit into memory" in note for note in result.notes)


def test_one_image_too_large_for_memory(
    shelf: Shelf, text: TextToImage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> object:
        raise MemoryError

    monkeypatch.setattr(jobs, "text_to_image", never)
    with pytest.raises(OutOfMemory, match="Stage 'text' ran out of memory: make the batch or the picture smaller"):
        run(Chain(stages=(text,)), shelf, tmp_path)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk(shelf: Shelf, text: TextToImage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        with open("/dev/full", "wb", buffering=0) as device:
            device.write(b"x")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CannotWrite, match="No space left on device"):
        run(Chain(stages=(text,)), shelf, tmp_path)
    assert list(tmp_path.iterdir()) == [], "no half files"


def test_sizes_are_checked_in_python_too(shelf: Shelf, text: TextToImage) -> None:
    from unrolled.chains.jobs import text_to_image

    with pytest.raises(BadInput, match="the nearest sizes are 64x64 and 72x64"):
        text_to_image(shelf.load(text.model), text.model_copy(update={"width": 70}), [0])
