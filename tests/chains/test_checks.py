"""Every finding of a plan: the chain that has it, what is said, and a chain beside it of which it must not be said."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from unrolled.chains.chain import Chain, ImageToImage, TextToImage
from unrolled.chains.checks import Finding, findings
from unrolled.chains.plan import plan
from unrolled.chains.read import packaged_chains, read_chain
from unrolled.chains.run import run
from unrolled.core.errors import BadChain
from unrolled.core.loading import Shelf


@pytest.fixture(scope="module")
def shelf() -> Shelf:
    return Shelf(device="cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Image.new("RGB", (64, 64)).save(tmp_path / "in.png")
    Image.new("RGB", (64, 64), "white").save(tmp_path / "mask.png")
    return tmp_path


def found(folder: Path, text: str, shelf: Shelf) -> list[Finding]:
    (folder / "chain.toml").write_text(text)
    chain = read_chain(folder / "chain.toml")
    return findings(chain, plan(chain, shelf))


def split(base: str = "", rest: str = "", shared: str = "", stop: str = "{ step = 4 }") -> str:
    """One run of Stable Diffusion in two parts."""
    shared = shared if "steps" in shared else f"steps = 10\n{shared}"
    return f"""
    {shared}
    [[stage]]
    name = "base"
    do = "text-to-image"
    stop = {stop}
    {base}
    [[stage]]
    name = "rest"
    do = "image-to-image"
    {rest}
    start = "handoff"
    """


def paint(*lines: str) -> str:
    return "\n".join(["[[stage]]", 'do = "text-to-image"', *lines])


def change(*lines: str) -> str:
    return "\n".join(
        ["[[stage]]", 'do = "image-to-image"', *(() if "start" in str(lines) else ('image = "in.png"',)), *lines]
    )


EULER = 'solver = "euler"'
ZERO_SNR = 'scheduler = { rescale_betas_zero_snr = true, timestep_spacing = "trailing" }'
TWO_M = 'solver = "dpm++2m"'
KANDINSKY = 'model = "kandinsky-2.2-decoder"\nfaithful = true\nsteps = 5'
REFINER = 'model = "sdxl-refiner"\nsolver = "euler"'

HANDOFFS = {
    "between its own levels": (
        split(rest="steps = 7", shared=EULER),
        "note", r"starts at sigma 1\.95\d* \(timestep .*\), between its own levels 2\.\d+ and 1\.\d+: .*, \d\d% of it",
        split(shared=EULER),
    ),
    "above its own levels": (
        split(rest="sigmas = [1.5, 0.7, 0.3, 0]", base="steps = 10", shared='solver = "euler"\n# steps'),
        "note", r"starts at sigma 1\.95\d*, above its own first level, 1\.5: one more step brings it there",
        split(rest="sigmas = [3, 1.5, 0.7, 0]", base="steps = 10", shared='solver = "euler"\n# steps'),
    ),
    "above what it was trained on": (
        split(base=ZERO_SNR, shared=EULER, stop="{ step = 1 }"),
        "warning", r"handed latents at sigma .*, above 14\.61, the highest level .* let 'base' stop later",
        split(base=ZERO_SNR, shared=EULER),
    ),
    "trained otherwise": (
        split(rest="scheduler = { beta_end = 0.02 }", shared=EULER),
        "note", r"trained on other noise levels than 'base': sigma 1\.95 is timestep \d+\.?\d* here and 555 there",
        split(rest="steps = 7", shared=EULER),
    ),
    "history, another run": (
        split(rest="steps = 9", shared=TWO_M),
        "warning", r"dpm\+\+2m starts afresh.*: the 1 point remembered by dpm\+\+2m in 'base' .* the same steps to",
        split(shared=TWO_M),
    ),
    "history of several points": (
        split(rest='solver = "lms"', shared='solver = "pndm"'),
        "warning", r"lms starts afresh.*: the 3 points remembered by pndm in 'base' .* give both stages the same solver to",
        split(rest="steps = 9", shared='solver = "heun"'),
    ),
    "history, another model": (
        split(rest='model = "comic-diffusion"', shared=TWO_M),
        "note", r"the 1 point remembered by dpm\+\+2m in 'base' cannot be used by another model",
        split(rest='model = "comic-diffusion"', shared=EULER),
    ),
    "nearly the same level twice": (
        split(rest="sigmas = [14, 1.93, 1, 0.5, 0]", base="steps = 10", shared='solver = "euler"\n# steps'),
        "warning", r"the same level twice where 'base' stops: its step from sigma 1\.95\d* to 1\.93 is [\d.]+% as",
        split(rest="sigmas = [14, 1.5, 1, 0.5, 0]", base="steps = 10", shared='solver = "euler"\n# steps'),
    ),
    "nearly the same level twice, in one stage": (
        paint(EULER, "sigmas = [14, 5, 4.98, 2, 0]"),
        "warning", r"nearly the same level twice: its step from sigma 5 to 4\.98 is 0\.44% as long as the shorter",
        paint(EULER, "sigmas = [14, 5, 4, 2, 0]"),
    ),
    "levels that print alike": (
        paint(EULER, "sigmas = [14, 5, 4.9999, 2, 0]"),
        "warning", r"its step from sigma 5 to 4\.9999 is 0\.0022% as long",
        paint(EULER, "sigmas = [14, 5, 4, 2, 0]"),
    ),
    "a solver of distilled models": (
        paint('solver = "lcm"', "steps = 4"),
        "note", r"lcm is for models that were distilled for it, and nothing says that sd-1\.5 was",
        paint(EULER, "steps = 4"),
    ),
    "half steps": (
        split(shared='solver = "heun"\nfaithful = true'),
        "note", r"does not repeat .* where it runs the last step of heun in 'base' once too often: the 2 eval",
        split(shared='solver = "heun"'),
    ),
}  # fmt: skip

ONE_STAGE = {
    "inputs not scaled": (
        paint(KANDINSKY, EULER),
        "warning", r"faithful with euler leaves the input of Kandinsky's UNet unscaled.* deviation of \d+(\.\d)? instead",
        paint(KANDINSKY, 'solver = "ddpm"'),
    ),
    "no variance": (
        paint('solver = "ddpm"', 'scheduler = { variance_type = "learned_range" }'),
        "error", r'"learned_range" takes the variance from the network, and sd-1\.5 has none to give: leave it',
        paint('solver = "ddpm"', 'model = "kandinsky-2.2-decoder"'),
    ),
    "zero SNR": (
        paint('solver = "ddim"', ZERO_SNR),
        "warning", r"at sigma .* a model that predicts noise cannot say .* leave rescale_betas_zero_snr out",
        paint('solver = "ddim"', ZERO_SNR.replace(" }", ', prediction_type = "v_prediction" }')),
    ),
    "starts above training": (
        paint(EULER, "sigmas = [50, 10, 1, 0]"),
        "warning", r"starts at sigma 50, above 14\.61, the highest level its model was trained on",
        paint(EULER, "sigmas = [14, 10, 1, 0]"),
    ),
    "starts low": (
        paint(EULER, "steps = 2", 'scheduler = { timestep_spacing = "leading" }'),
        "warning", r"starts from pure noise at sigma 1\.62\d* where training goes to 14\.61.* start higher, by more steps",
        paint(EULER, "steps = 2", 'scheduler = { timestep_spacing = "trailing" }'),
    ),
    "starts a little low": (
        paint(EULER, "steps = 4", 'scheduler = { timestep_spacing = "leading" }'),
        "note", r"starts from pure noise at sigma 4\.117",
        change(EULER, "steps = 4", "strength = 1.0", 'scheduler = { timestep_spacing = "leading" }'),
    ),
    "lost to floats": (
        change("steps = 50", "strength = 0.58"),
        "note", r"strength 0\.58 of 50 steps is 29, but float rounding makes it 28 in diffusers; faithful = true re",
        change("steps = 50", "strength = 0.6"),
    ),
    "lost to floats, faithfully": (
        change("steps = 50", "strength = 0.58", "faithful = true"),
        "warning", r"is 29, but .* 28 in diffusers, and here with faithful: leave faithful out, or say first_step = 21",
        change("steps = 50", "first_step = 21", "faithful = true"),
    ),
    "a part of a step": (
        change("steps = 10", "strength = 0.58"),
        "note", r"strength 0\.5\d of 10 steps is 5\.\d of them.* it works as 0\.5, with 5 steps; 0\.6 runs 6",
        change("steps = 10", "strength = 0.54"),
    ),
    "a part of a step, of the usual strength": (
        change(REFINER, "steps = 12", "strength = 0.3"),
        "note", r"strength 0\.3 of 12 steps is 3\.6",
        change(REFINER, "steps = 12"),
    ),
    "scales of steps not run": (
        change("steps = 4", "strength = 0.5", "guidance_scale = [9, 8, 7, 6]"),
        "note", r"2 of its 4 guidance scales are not used: of the 4 steps, counted from 0, only 2 to 3 are run",
        paint("steps = 4", "guidance_scale = [9, 8, 7, 6]"),
    ),
    "an interval of steps not run": (
        change("steps = 10", "strength = 0.5", "guidance_interval = [0, 5]"),
        "warning", r"guidance_interval = \[\d, \d+\] guides nothing: of the 10 steps, counted from 0, only 5 to 9 are run",
        change("steps = 10", "strength = 0.5", "guidance_interval = [9, 10]"),
    ),
    "guidance off": (
        paint("steps = 2", "guidance_scale = [1.0, 0.5]"),
        "note", r"guidance is off, as no scale is above 1",
        paint("steps = 2", "guidance_scale = [1.0, 1.5]"),
    ),
    "work for nobody": (
        f'{paint()}\n[[stage]]\nname = "other"\ndo = "image-to-image"\nimage = "in.png"',
        "warning", r"no stage takes what it makes and no picture of it is written: .* or say grid = true",
        f'grid = true\n{paint()}\n[[stage]]\nname = "other"\ndo = "image-to-image"\nimage = "in.png"',
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", [*HANDOFFS, *ONE_STAGE])
def test_what_is_found_and_where_not(case: str, folder: Path, shelf: Shelf) -> None:
    wrong, severity, sentence, right = (HANDOFFS | ONE_STAGE)[case]
    said = found(folder, wrong, shelf)
    assert [f.severity for f in said if re.search(sentence, f.sentence)] == [severity], said
    assert not [f for f in found(folder, right, shelf) if re.search(sentence, f.sentence) or f.severity == "error"]


def test_latents_are_not_clipped_to_a_pictures_range_unawares(folder: Path, tiny_folder: Path, shelf: Shelf) -> None:
    """DDIM clips by default, and a checkpoint made with another scheduler may not say that it must not."""
    model = shutil.copytree(tiny_folder, folder / "silent")
    config = model / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k != "clip_sample"}))
    message = "ddim clips x0 to a picture's range unless told otherwise"
    for lines, warned in ((("steps = 4",), True), (("scheduler = { clip_sample = false }",), False)):
        said = found(folder, paint('solver = "ddim"', f'model = "{model}"', *lines), shelf)
        assert any(message in f.sentence and f.severity == "warning" for f in said) == warned


def test_brackets_are_pointed_out_once(folder: Path, shelf: Shelf) -> None:
    message = "the brackets of its prompt are encoded as they stand, as diffusers does: prompt_weights = true reads"
    two = f'prompt = "a (castle:1.3)"\nnegative_prompt = "[people]"\n{paint()}\n{change()}'
    kandinsky = two.replace('do = "text', 'model = "kandinsky-2.2-decoder"\ndo = "text')
    for text, stages in (
        (two, ["text-to-image"]),
        (kandinsky, ["image-to-image"]),
        (f"prompt_weights = true\n{two}", []),
        (two.replace("(", "").replace("[people]", "people"), []),
    ):
        said = [f for f in found(folder, text, shelf) if f.sentence.startswith(message)]
        assert [(f.severity, f.stage) for f in said] == [("note", stage) for stage in stages]


@pytest.mark.parametrize("name", packaged_chains())
def test_the_packaged_chains_have_notes_at_most(name: str, shelf: Shelf) -> None:
    chain = read_chain(name)
    assert {f.severity for f in findings(chain, plan(chain, shelf))} <= {"note"}


def test_a_split_of_one_run_has_nothing_to_say(folder: Path, shelf: Shelf) -> None:
    for solver in ("ddim", "euler-ancestral", "heun", "dpm++2m", "unipc", "pndm", "dpm2", "dpm++2s", "dpm++2m-sde"):
        assert found(folder, split(shared=f'solver = "{solver}"'), shelf) == [], solver


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            split(rest="stop = { step = 3 }"),
            "Stage 'rest': it has no step to run: it would start where it is to stop, or below",
        ),
        (split().replace('"handoff"', "{ step = 5 }"), "is handed latents at sigma .* but starts at"),
        (paint("eta = 0.5", EULER), "this solver is euler: leave"),
        (
            '[[stage]]\ndo = "upscale"\nimage = "in.png"\nnoise_level = 9',
            "noise_level has no effect with x2-latent-upscaler",
        ),
        (change("steps = 20", "strength = 0.04"), "Strength 0.04 of 20 steps leaves no step to run"),
    ],
)
def test_what_the_plan_itself_refuses(text: str, message: str, folder: Path, shelf: Shelf) -> None:
    with pytest.raises(BadChain, match=message):
        found(folder, text, shelf)


def test_the_step_to_nothing_is_not_a_long_one(folder: Path, shelf: Shelf) -> None:
    """It has no length in log sigma, so that no other is short beside it."""
    said = found(folder, paint(EULER, "sigmas = [14, 2, 0]"), shelf)
    assert said == []


def test_a_level_that_the_loop_would_refuse(folder: Path, shelf: Shelf) -> None:
    cut = split(shared=EULER).replace('"handoff"', "{ step = 4 }")
    assert found(folder, cut, shelf) == []
    (folder / "chain.toml").write_text(cut)
    chain = read_chain(folder / "chain.toml")
    base, rest = plan(chain, shelf)
    assert base.run is not None
    levels = (*base.run.schedule.sigmas[:-1], base.end * 1.0005)
    base = replace(base, run=replace(base.run, schedule=replace(base.run.schedule, sigmas=levels)))
    said = [f for f in findings(chain, [base, rest]) if f.severity == "error"]
    assert len(said) == 1
    assert re.search(
        r'starts at sigma 1\.9\d+ but is handed latents at 1\.95\d+, .* say start = "handoff"', said[0].sentence
    )


def test_levels_that_end_in_noise(folder: Path, shelf: Shelf) -> None:
    text = paint(EULER, "sigmas = [14, 5, 1, 0]")
    (folder / "chain.toml").write_text(text)
    chain = read_chain(folder / "chain.toml")
    (item,) = plan(chain, shelf)
    assert item.run is not None
    cut = replace(item.run.whole, sigmas=(14.0, 5.0, 1.0, 0.5))
    assert findings(chain, [item]) == []
    said = findings(chain, [replace(item, run=replace(item.run, whole=cut, schedule=cut))])
    assert [f.severity for f in said] == ["error"]
    assert said[0].sentence.startswith(
        "it ends at sigma 0.5, which is still noise and cannot be decoded: let its levels end with"
    )


def test_a_latents_file(folder: Path, shelf: Shelf) -> None:
    """What its solver remembers is not used by a chain, and a batch of a deterministic solver is of one image."""
    base = TextToImage(name="base", steps=10, solver="dpm++2m", stop={"step": 4})
    chain = Chain(stages=(base, ImageToImage(name="rest", steps=10, solver="dpm++2m", start="handoff")), folder=folder)
    noisy = run(chain, shelf).outputs["base"].latents
    assert noisy is not None
    assert noisy.history
    noisy.save(folder / "kept.safetensors")
    replace(noisy, history=()).save(folder / "plain.safetensors")

    def said(file: str, solver: str, batch: int = 1) -> list[Finding]:
        rest = ImageToImage(name="rest", steps=10, solver=solver, start="handoff", latents=file)
        chain = Chain(stages=(rest,), folder=folder, batch=batch)
        return findings(chain, plan(chain, shelf))

    assert said("plain.safetensors", "dpm++2m") == []
    (lost,) = said("kept.safetensors", "dpm++2m")
    assert lost.severity == "warning"
    assert (
        "the 1 point remembered in kept.safetensors cannot be used, as a chain cannot tell what run it is of"
        in lost.sentence
    )
    assert {f.severity for f in said("plain.safetensors", "euler-ancestral", batch=2)} <= {"note"}
    (same,) = said("plain.safetensors", "dpm++2m", batch=2)
    assert same.sentence.startswith("its 2 images are the same, as plain.safetensors holds one and dpm++2m draws no noise")
    assert same.severity == "warning"
