"""Chains over every system: splits, upscalers, Kandinsky's prior, shared components, files as inputs, freed models."""

import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from unrolled.chains import jobs
from unrolled.chains.chain import (
    Chain,
    Cut,
    Denoising,
    ImageToImage,
    Ingredient,
    Inpaint,
    PriorOptions,
    Resize,
    SizeConditioning,
    TextToImage,
    Upscale,
)
from unrolled.chains.plan import plan
from unrolled.chains.prompts import encode_prompts
from unrolled.chains.run import run
from unrolled.core.errors import BadChain, OutOfMemory
from unrolled.core.latents import Latents
from unrolled.core.loading import Model, Shelf
from unrolled.core.loop import Step
from unrolled.stages.decode import decode
from unrolled.stages.image import encode_image


@pytest.fixture
def shelf() -> Shelf:
    return Shelf(device="cpu")


@pytest.fixture
def base(tiny_sdxl_folder: Path) -> TextToImage:
    return TextToImage(name="base", model=str(tiny_sdxl_folder), prompt="a castle", steps=10, stop=Cut(training_time=0.8))


@pytest.fixture
def refiner(tiny_refiner_folder: Path) -> ImageToImage:
    return ImageToImage(name="refiner", model=str(tiny_refiner_folder), prompt="a castle", steps=10, start="handoff")


@pytest.fixture
def first(tiny_folder: Path) -> TextToImage:
    return TextToImage(name="first", model=str(tiny_folder), prompt="a castle", steps=2, solver="euler")


@pytest.fixture
def kandinsky(tiny_kandinsky_folder: Path, tiny_prior_folder: Path) -> TextToImage:
    prior = PriorOptions(model=str(tiny_prior_folder), steps=3)
    return TextToImage(name="kandinsky", model=str(tiny_kandinsky_folder), prompt="a castle", steps=3, prior=prior)


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture).astype(int)


# --- the split


@pytest.mark.parametrize(
    "stop", [Cut(training_time=0.8), Cut(steps_fraction=0.8), Cut(step=8), Cut(sigma=0.5)], ids=lambda cut: str(cut.given())
)
def test_a_split_by_any_way_to_say_where(shelf: Shelf, base: TextToImage, refiner: ImageToImage, stop: Cut) -> None:
    chain = Chain(stages=(base.model_copy(update={"stop": stop}), refiner))
    one, two = (item.run for item in plan(chain, shelf))
    assert one is not None
    assert two is not None
    assert one.schedule.sigmas + two.schedule.sigmas[1:] == one.whole.sigmas
    assert run(chain, shelf).pictures[0].size == (64, 64)


@pytest.mark.parametrize(
    "other", [{"solver": "heun"}, {"steps": 7}, {"solver": "dpm++2m", "scheduler": {"use_karras_sigmas": True}}], ids=str
)
def test_the_refiner_may_have_another_solver_and_schedule(
    shelf: Shelf, base: TextToImage, refiner: ImageToImage, other: dict[str, object]
) -> None:
    refiner = ImageToImage(**refiner.model_dump() | other)
    one, two = plan(Chain(stages=(base, refiner)), shelf)
    assert one.run is not None
    assert two.run is not None
    assert one.run.schedule.sigmas[-1] == pytest.approx(two.run.schedule.sigmas[0], rel=1e-4)
    assert two.run.schedule.sigmas[-1] == 0
    assert (two.takes, two.continues) == ("noisy latents", False)
    assert run(Chain(stages=(base, refiner)), shelf).outputs["refiner"].is_picture


def test_the_same_model_goes_on_as_if_it_had_not_been_split(shelf: Shelf, base: TextToImage) -> None:
    base = base.model_copy(update={"solver": "dpm++2m"})
    keys = {"model", "prompt", "steps", "solver"}
    rest = ImageToImage(name="rest", start="handoff", **base.model_dump(include=keys))
    whole = run(Chain(stages=(base.model_copy(update={"stop": None}),)), shelf).outputs["base"].latents
    chain = Chain(stages=(base, rest))
    assert plan(chain, shelf)[1].continues
    split = run(chain, shelf).outputs["rest"].latents
    assert whole is not None
    assert split is not None
    assert torch.equal(whole.x, split.x)


def test_a_start_at_a_cut_must_meet_what_is_handed(shelf: Shelf, base: TextToImage, refiner: ImageToImage) -> None:
    meets = refiner.model_copy(update={"start": Cut(training_time=0.8)})
    assert run(Chain(stages=(base, meets)), shelf).outputs["refiner"].is_picture
    gap = refiner.model_copy(update={"start": Cut(training_time=0.9)})
    with pytest.raises(BadChain, match=r"Stage 'refiner': it is handed latents at sigma .* but starts at"):
        plan(Chain(stages=(base, gap)), shelf)


def test_size_conditioning_changes_the_picture(shelf: Shelf, base: TextToImage) -> None:
    base = base.model_copy(update={"stop": None, "steps": 3})
    small = base.model_copy(update={"size": SizeConditioning(original=(16, 16), crop=(4, 4))})
    a, b = (run(Chain(stages=(stage,)), shelf).outputs["base"].latents for stage in (base, small))
    assert a is not None
    assert b is not None
    assert not torch.equal(a.x, b.x)


def test_a_score_for_the_prompt_is_not_the_negatives(tiny_refiner: Model) -> None:
    told = SizeConditioning(aesthetic_score=8.0)
    cond, uncond = encode_prompts(tiny_refiner, TextToImage(prompt="a castle", size=told), (64, 64))
    assert cond.time_ids is not None
    assert uncond.time_ids is not None
    assert (cond.time_ids[0, -1].item(), uncond.time_ids[0, -1].item()) == (8.0, 2.5)


# --- upscalers


def test_latents_are_enlarged_twice_then_pixels_four_times(
    shelf: Shelf, first: TextToImage, tiny_x2_folder: Path, tiny_x4_folder: Path
) -> None:
    x2 = Upscale(name="x2", model=str(tiny_x2_folder), vae=first.model, prompt="a castle", steps=2)
    x4 = Upscale(name="x4", model=str(tiny_x4_folder), prompt="a castle", steps=2, noise_level=30)
    plans = plan(Chain(stages=(first, x2, x4)), shelf)
    assert [(item.takes, item.size) for item in plans] == [
        ("noise", (64, 64)),
        ("latents", (128, 128)),
        ("pixels", (512, 512)),
    ]
    result = run(Chain(stages=(first, x2, x4), batch=2), shelf)
    assert [picture.size for picture in result.pictures] == [(512, 512)] * 2
    assert not result.outputs["first"].made, "nobody looked at the first picture, so it was not decoded"


def test_the_x2_upscaler_takes_another_vaes_picture_through_pixels(
    shelf: Shelf, first: TextToImage, tiny_x2_folder: Path
) -> None:
    x2 = Upscale(name="x2", model=str(tiny_x2_folder), steps=2)
    with pytest.raises(BadChain, match=r'different VAEs, so latents cannot be handed on: say via = "pixels"'):
        plan(Chain(stages=(first, x2)), shelf)
    through = x2.model_copy(update={"via": "pixels"})
    assert run(Chain(stages=(first, through)), shelf).pictures[0].size == (128, 128)


# --- Kandinsky


def test_the_prior_runs_and_is_gone_before_the_decoder_comes(shelf: Shelf, kandinsky: TextToImage) -> None:
    parts = set[str]()

    def look(stage: object, step: Step) -> None:
        parts.update(name for name, _ in shelf._components)

    result = run(Chain(stages=(kandinsky,), batch=2), shelf, watch=look, free=True)
    assert parts == {"unet", "movq"}
    assert set(result.models) == {"kandinsky", "kandinsky, prior"}
    assert (pixels(result.pictures[0]) != pixels(result.pictures[1])).any()


def test_prompts_and_pictures_are_blended(
    shelf: Shelf, kandinsky: TextToImage, tmp_path: Path, picture: Image.Image
) -> None:
    picture.save(tmp_path / "in.png")
    assert kandinsky.prior is not None

    def latents(*mix: Ingredient) -> torch.Tensor:
        options = kandinsky.prior.model_copy(update={"mix": mix}) if kandinsky.prior else None
        chain = Chain(stages=(kandinsky.model_copy(update={"prior": options}),), folder=tmp_path)
        made = run(chain, shelf).outputs["kandinsky"].latents
        assert made is not None
        return made.x

    text, image = Ingredient(prompt="a castle", weight=1.0), Ingredient(image="in.png", weight=1.0)
    assert torch.equal(latents(), latents(text))
    blended = latents(Ingredient(prompt="a castle", weight=0.5), Ingredient(image="in.png", weight=0.5))
    assert not torch.equal(blended, latents(text))
    assert not torch.equal(blended, latents(image))


def test_kandinsky_repaints_another_models_picture(
    shelf: Shelf, first: TextToImage, tiny_kandinsky_inpaint_folder: Path, tiny_prior_folder: Path, tmp_path: Path,
    mask: Image.Image,
) -> None:  # fmt: skip
    mask.save(tmp_path / "mask.png")
    prior = PriorOptions(model=str(tiny_prior_folder), steps=2)
    repaint = Inpaint(name="in", model=str(tiny_kandinsky_inpaint_folder), mask="mask.png", fit=True, steps=3, prior=prior)
    result = run(Chain(stages=(first, repaint), folder=tmp_path, grid=True), shelf, tmp_path / "out")
    black = np.asarray(mask.resize((64, 64))) < 128
    assert (pixels(result.pictures[0])[black] == pixels(result.outputs["first"].pictures()[0])[black]).all()


# --- what goes in


def test_a_latents_file_goes_in(shelf: Shelf, first: TextToImage, tmp_path: Path) -> None:
    made = run(Chain(stages=(first,)), shelf).outputs["first"].latents
    assert made is not None
    made.save(tmp_path / "first.safetensors")
    again = ImageToImage(name="again", model=first.model, latents="first.safetensors", steps=4, strength=0.5)
    from_file = run(Chain(stages=(again,), folder=tmp_path), shelf).outputs["again"].latents
    handed_on = again.model_copy(update={"latents": None})
    chained = run(Chain(stages=(first, handed_on)), shelf).outputs["again"].latents
    assert from_file is not None
    assert chained is not None
    assert from_file.x.shape == chained.x.shape
    assert run(Chain(stages=(again,), folder=tmp_path, batch=3), shelf).pictures[2].size == (64, 64), "one for all seeds"
    two = run(Chain(stages=(first,), batch=2), shelf).outputs["first"].latents
    assert two is not None
    two.save(tmp_path / "first.safetensors")
    with pytest.raises(Exception, match=r"first\.safetensors holds 2 images, but the chain makes 3: set its batch"):
        run(Chain(stages=(again,), folder=tmp_path, batch=3), shelf)


def test_a_stopped_run_goes_on_from_its_file(shelf: Shelf, first: TextToImage, tmp_path: Path) -> None:
    stopped = first.model_copy(update={"steps": 4, "stop": Cut(step=2)})
    rest = ImageToImage(name="rest", model=first.model, prompt=first.prompt, steps=4, solver="euler", start="handoff")
    chain = Chain(stages=(stopped, rest))
    whole = run(chain, shelf)
    whole.outputs["first"].latents.save(tmp_path / "half.safetensors")  # type: ignore[union-attr]
    from_file = rest.model_copy(update={"latents": "half.safetensors"})
    result = run(Chain(stages=(from_file,), folder=tmp_path), shelf)
    assert result.pictures[0].tobytes() == whole.pictures[0].tobytes()


def test_a_stage_is_repeated_on_what_it_made(shelf: Shelf, first: TextToImage, tmp_path: Path) -> None:
    again = ImageToImage(name="again", model=first.model, solver="euler", steps=4, strength=0.5, repeat=3)
    chain = Chain(stages=(first, again), gif="stages")
    assert plan(chain, shelf)[1].evaluations == 6
    result = run(chain, shelf, tmp_path)
    frames = Image.open(tmp_path / "output_000.gif").n_frames  # type: ignore[attr-defined]
    assert (len(result.frames), frames) == (3, 4)
    once = again.model_copy(update={"repeat": 1})
    assert run(Chain(stages=(first, once)), shelf).pictures[0].tobytes() == result.frames[1].tobytes()


# --- what does not fit


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (Upscale(model="sd-1.5", image="in.png"), "sd-1.5 is no upscaler: use x2-latent-upscaler or x4-upscaler"),
        (TextToImage(model="X2"), 'is an upscaler, which cannot do text-to-image: say do = "upscale"'),
        (TextToImage(model="PRIOR"), "is a prior, which makes no picture"),
        (TextToImage(model="sd-1.5-inpainting"), 'is an inpainting model: say do = "inpaint", or take another one'),
        (TextToImage(prior=PriorOptions()), "prior has no effect with sd-1.5: leave it out"),
        (TextToImage(size=SizeConditioning()), "size has no effect with sd-1.5"),
        (TextToImage(prompt_2="x"), "prompt_2 has no effect with sd-1.5"),
        (TextToImage(model="KANDINSKY", clip_skip=1), "clip_skip has no effect with"),
        (TextToImage(model="KANDINSKY", prompt_weights=True), "prompt_weights has no effect with .*: leave it out, or"),
        (TextToImage(prompt_weights=True, negative_prompt=f"(a:{'9' * 400})"), "The weight of 'a.*' is inf: give a finite"),
        (TextToImage(model="KANDINSKY", prior=PriorOptions(model="sd-1.5")), "sd-1.5 is no prior: use kandinsky-2.2-prior"),
        (TextToImage(model="KANDINSKY", width=72), "sides must be multiples of 64: the nearest sizes are 64x64 and 128x64"),
        (TextToImage(vae="KANDINSKY"), "has no vae to share"),
        (TextToImage(clip_skip=9), "clip_skip goes from 0 to 1 with the text encoder of sd-1.5, got 9"),
        (Upscale(model="X4", image="in.png", noise_level=900), "noise_level goes from 0 to 350 with .*, got 900"),
        (TextToImage(model="KANDINSKY", prior=PriorOptions(model="PRIOR", steps=1)), "The steps of unclip begin and end"),
        (
            TextToImage(model="KANDINSKY", prior=PriorOptions(model="PRIOR", mix=(Ingredient(image="no.png"),))),
            "There is no picture at .*no.png",
        ),
        (ImageToImage(latents="l.safetensors"), "holds latents of another VAE than that of sd-1.5"),
    ],
)
def test_what_does_not_fit_is_found_before_anything_is_loaded(
    stage: Denoising, message: str, shelf: Shelf, tmp_path: Path, picture: Image.Image, tiny_x2_folder: Path,
    tiny_prior_folder: Path, tiny_kandinsky_folder: Path, tiny_x4_folder: Path, tiny: Model,
) -> None:  # fmt: skip
    picture.save(tmp_path / "in.png")
    encode_image(tiny, picture).save(tmp_path / "l.safetensors")
    folders = {"X2": tiny_x2_folder, "PRIOR": tiny_prior_folder, "KANDINSKY": tiny_kandinsky_folder, "X4": tiny_x4_folder}
    named: dict[str, object] = {
        key: str(folders[getattr(stage, key)]) for key in ("model", "vae") if getattr(stage, key) in folders
    }
    if stage.prior is not None and stage.prior.model in folders:
        named["prior"] = stage.prior.model_copy(update={"model": str(folders[stage.prior.model])})
    chain = Chain(stages=(stage.model_copy(update=named),), folder=tmp_path)
    with pytest.raises(Exception, match=message):
        plan(chain, shelf)
    assert not shelf._components


def test_a_files_history_goes_on_in_no_other_run(shelf: Shelf, first: TextToImage, tmp_path: Path) -> None:
    stopped = first.model_copy(update={"steps": 4, "stop": Cut(step=2), "solver": "dpm++2m"})
    rest = ImageToImage(name="rest", model=first.model, steps=4, solver="dpm++2m", start="handoff")
    run(Chain(stages=(stopped, rest)), shelf).outputs["first"].latents.save(tmp_path / "mid.safetensors")  # type: ignore[union-attr]
    from_file = rest.model_copy(update={"latents": "mid.safetensors"})
    alone = Chain(stages=(from_file,), folder=tmp_path)
    after_another = Chain(stages=(stopped.model_copy(update={"stop": None}), from_file), folder=tmp_path)
    assert not plan(alone, shelf)[0].continues
    assert not plan(after_another, shelf)[1].continues


# --- faults


def test_a_batch_run_in_parts_is_joined(shelf: Shelf, first: TextToImage, monkeypatch: pytest.MonkeyPatch) -> None:
    again = ImageToImage(name="again", model=first.model, steps=2, strength=1.0)
    whole = run(Chain(stages=(first, again), batch=3), shelf)
    real, decoded = jobs.text_to_image, list[int]()

    def small(model: Model, spec: TextToImage, seeds: tuple[int, ...], *rest: Any, **more: Any) -> Latents:
        if len(seeds) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(model, spec, seeds, *rest, **more)

    def counted(model: Model, latents: Latents, **options: Any) -> list[Image.Image]:
        decoded.append(len(latents))
        return decode(model, latents, **options)

    monkeypatch.setattr(jobs, "text_to_image", small)
    monkeypatch.setattr("unrolled.chains.runner.decode", counted)
    parts = run(Chain(stages=(first, again), batch=3), shelf)
    assert decoded == [1, 2], "nobody asked for the first stage's pictures"
    for name in ("first", "again"):
        ours, theirs = parts.outputs[name].latents, whole.outputs[name].latents
        assert ours is not None
        assert theirs is not None
        torch.testing.assert_close(ours.x, theirs.x, rtol=0, atol=1e-4 * float(theirs.x.abs().max()))


@pytest.mark.parametrize("fault", [RuntimeError("device-side assert"), torch.OutOfMemoryError("again")])
def test_any_fault_leaves_what_was_finished_and_is_not_hidden(
    shelf: Shelf, first: TextToImage, tmp_path: Path, fault: Exception
) -> None:
    again = ImageToImage(name="again", model=first.model, steps=2, strength=1.0)

    def fail(stage: Denoising, step: Step) -> None:
        if stage.name == "again":
            raise fault

    with pytest.raises((RuntimeError, OutOfMemory)):
        run(Chain(stages=(first, again)), shelf, tmp_path, fail)  # type: ignore[arg-type]
    assert (tmp_path / "unfinished_000.png").is_file()
    assert (tmp_path / "interrupted_000.safetensors").is_file()


# --- memory


def test_models_no_longer_needed_are_freed_and_shared_parts_stay(
    shelf: Shelf, first: TextToImage, base: TextToImage, refiner: ImageToImage
) -> None:
    held: list[weakref.ref[object]] = []

    def look(stage: Denoising, step: Step) -> None:
        if not held:
            held.append(weakref.ref(shelf.load(base.model).unet))
            held.append(weakref.ref(shelf.load(base.model).vae))

    run(Chain(stages=(base, refiner)), shelf, watch=look, free=True)  # type: ignore[arg-type]
    gc.collect()
    assert held[0]() is None, "the base's UNet is gone"
    assert held[1]() is not None, "the VAE is the refiner's too"


def test_models_can_be_kept(shelf: Shelf, first: TextToImage, base: TextToImage, refiner: ImageToImage) -> None:
    run(Chain(stages=(base, refiner)), shelf)
    assert sum(name == "unet" for name, _ in shelf._components) == 2


def test_a_picture_nobody_asked_for_can_still_be_had(shelf: Shelf, first: TextToImage, base: TextToImage) -> None:
    again = ImageToImage(name="again", model=first.model, steps=2)
    result = run(Chain(stages=(first, again, Resize())), shelf)
    assert not result.outputs["first"].made
    assert result.outputs["first"].pictures()[0].size == (64, 64)
