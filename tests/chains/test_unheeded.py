"""Options that change nothing: what is said of each, and a chain beside it where the same option has an effect."""

import re
from pathlib import Path

import pytest
from PIL import Image
from unrolled.chains.checks import Finding, findings
from unrolled.chains.plan import plan
from unrolled.chains.read import read_chain
from unrolled.core.loading import Shelf


@pytest.fixture(scope="module")
def shelf() -> Shelf:
    return Shelf(device="cpu")


def found(folder: Path, text: str, shelf: Shelf) -> list[Finding]:
    (folder / "chain.toml").write_text(text)
    Image.new("RGB", (64, 64)).save(folder / "in.png")
    Image.new("RGB", (64, 64), "white").save(folder / "mask.png")
    chain = read_chain(folder / "chain.toml")
    return findings(chain, plan(chain, shelf))


def paint(*lines: str) -> str:
    return "\n".join(["[[stage]]", 'do = "text-to-image"', *lines])


def change(*lines: str) -> str:
    return "\n".join(["[[stage]]", 'do = "image-to-image"', 'image = "in.png"', *lines])


def then(*lines: str) -> str:
    return "\n".join(["", "[[stage]]", 'do = "image-to-image"', *lines])


EULER, TWO_M, DDIM = 'solver = "euler"', 'solver = "dpm++2m"', 'solver = "ddim"'
KANDINSKY, BASE, REFINER = (f'model = "{name}"' for name in ("kandinsky-2.2-decoder", "sdxl-base", "sdxl-refiner"))
X2, X4 = (
    f'[[stage]]\ndo = "upscale"\nmodel = "{name}"\nimage = "in.png"\n' for name in ("x2-latent-upscaler", "x4-upscaler")
)
INPAINT = '[[stage]]\ndo = "inpaint"\nimage = "in.png"\nmask = "mask.png"\nfit = true\nmask_blur = 2.0\n'
MIXED = 'mix = [{ image = "in.png" }]'
UGLY = 'negative_prompt = "ugly"'
UNGUIDED = "guidance_scale = 1.0"
KARRAS = "scheduler = { use_karras_sigmas = true"

UNHEEDED = {
    "guidance_rescale": (
        paint("guidance_rescale = 0.7", UNGUIDED),
        r"guidance_rescale = 0\.7 has no effect beside guidance_scale = 1\.0: leave out one of the two",
        paint("guidance_rescale = 0.7"),
    ),
    "negative_prompt": (
        paint(UGLY, "steps = 2", "guidance_scale = [1.0, 0.0]"),
        r'negative_prompt = "ugly" has no effect beside guidance_scale = \[1\.0, 0\.0\]',
        paint(UGLY, "steps = 2", "guidance_scale = [1.0, 2.0]"),
    ),
    "negative_prompt of Kandinsky": (
        paint(UGLY, UNGUIDED, KANDINSKY, "prior.guidance_scale = 1.0"),
        r'negative_prompt = "ugly" has no effect beside guidance_scale = 1\.0',
        paint(UGLY, UNGUIDED, KANDINSKY),
    ),
    "negative_size": (
        paint("negative_size.crop = [9, 9]", UNGUIDED, BASE),
        r"negative_size = \{ crop = \[9, 9\] \} has no effect beside guidance_scale = 1\.0",
        paint("negative_size.crop = [9, 9]", BASE),
    ),
    "guidance_interval": (
        change("steps = 10", "strength = 0.5", "guidance_interval = [5, 10]"),
        r"guidance_interval = \[5, 10\] has no effect: it holds every step that is run; leave it out",
        change("steps = 10", "strength = 0.5", "guidance_interval = [6, 10]"),
    ),
    "guidance_scale": (
        change("steps = 10", "strength = 0.5", "guidance_interval = [0, 5]", "guidance_scale = 9.0"),
        r"guidance_scale = 9\.0 has no effect beside guidance_interval = \[0, 5\]",
        paint("guidance_interval = [0, 5]", "guidance_scale = 9.0"),
    ),
    "guidance_batched": (
        paint("guidance_batched = false", UNGUIDED),
        r"guidance_batched = false has no effect: guidance is off, so there is one pass only",
        paint("guidance_batched = false"),
    ),
    "eta": (
        paint("eta = 0.5", DDIM, "steps = 1"),
        r"eta = 0\.5 has no effect with steps = 1: leave it out",
        paint("eta = 0.5", DDIM, "steps = 2"),
    ),
    "stop": (
        paint("stop = { steps_fraction = 1.0 }"),
        r"stop = \{ steps_fraction = 1\.0 \} has no effect: the run ends there anyway",
        paint("stop = { step = 4 }") + then('start = "handoff"'),
    ),
    "spacing beside Karras": (
        paint(TWO_M, KARRAS + ', timestep_spacing = "trailing" }'),
        r'scheduler\.timestep_spacing = "trailing" has no effect beside scheduler\.use_karras_sigmas = true: leave out one',
        paint(TWO_M, KARRAS + " }"),
    ),
    "Karras beside levels of one's own": (
        paint(EULER, KARRAS + " }", "sigmas = [14, 5, 1, 0]"),
        r"scheduler\.use_karras_sigmas = true has no effect beside sigmas = \[14\.0, 5\.0, 1\.0, 0\.0\]",
        paint(EULER, "sigmas = [14, 5, 1, 0]"),
    ),
    "the solver's order at the end": (
        paint(TWO_M, "scheduler = { euler_at_final = true }"),
        r"scheduler\.euler_at_final = true has no effect here, the run is the same number for number without it: leave it",
        paint(TWO_M, 'scheduler = { euler_at_final = true, final_sigmas_type = "sigma_min" }'),
    ),
    "lower order in a long run": (
        paint(TWO_M, 'scheduler = { lower_order_final = false, final_sigmas_type = "sigma_min" }', "steps = 20"),
        r"scheduler\.lower_order_final = false has no effect with steps = 20|lower_order_final = false has no effect here",
        paint(TWO_M, 'scheduler = { lower_order_final = false, final_sigmas_type = "sigma_min" }', "steps = 10"),
    ),
    "a range that nothing is clipped to": (
        paint(DDIM, "scheduler = { clip_sample_range = 2.0 }"),
        r"scheduler\.clip_sample_range = 2\.0 has no effect beside the checkpoint.s own clip_sample = false",
        paint(DDIM, "scheduler = { clip_sample = true, clip_sample_range = 2.0 }"),
    ),
    "one that the checkpoint has decided": (
        X2 + 'scheduler = { timestep_spacing = "trailing" }',
        r'timestep_spacing = "trailing" has no effect beside the checkpoint.s own interpolation_type = "log_linear"',
        X2 + 'scheduler = { interpolation_type = "linear", timestep_spacing = "trailing" }',
    ),
    "fit": (
        paint() + then("fit = true"),
        r"fit = true has no effect: there is no picture file to fit",
        change("fit = true"),
    ),
    "posterior": (
        paint() + then('posterior = "mode"'),
        r'posterior = "mode" has no effect: it is handed latents, which are not encoded',
        paint() + then('posterior = "mode"', 'via = "pixels"'),
    ),
    "posterior of the x4 upscaler": (
        X4 + 'posterior = "mode"',
        r'posterior = "mode" has no effect: its pictures are not encoded',
        X2 + 'posterior = "mode"',
    ),
    "after": (
        "grid = true\n" + paint() + "\n" + change('after = "text-to-image"'),
        r'after = "text-to-image" has no effect: it starts from a file',
        f'grid = true\n{paint()}\n{change()}',
    ),
    "tiled": (
        paint("tiled = true") + then(),
        r"tiled = true has no effect: what it makes is handed on as latents and never decoded",
        paint("tiled = true") + then('via = "pixels"'),
    ),
    "mask_blur": (
        INPAINT + f"{BASE}\nstop = {{ step = 20 }}" + then(BASE, 'start = "handoff"'),
        r"mask_blur = 2\.0 has no effect: it stops while there is noise, so nothing is put back",
        INPAINT,
    ),
    "prompt": (
        paint(KANDINSKY, 'prompt = "a castle"', f"prior.{MIXED}"),
        r'prompt = "a castle" has no effect: prior\.mix stands in its place',
        paint(KANDINSKY, f"prior.{MIXED}"),
    ),
    "prior": (
        paint(KANDINSKY, f"prior = {{ steps = 9, {MIXED} }}"),
        r"prior\.steps = 9 has no effect: the prior is not run for a mix of pictures alone",
        paint(KANDINSKY, 'prior = { steps = 9, mix = [{ prompt = "a castle" }] }'),
    ),
    "score": (
        paint(BASE, "size.aesthetic_score = 7.0"),
        r"size\.aesthetic_score = 7\.0 has no effect: sdxl-base was trained without scores",
        change(REFINER, "size.aesthetic_score = 7.0"),
    ),
    "target": (
        change(REFINER, "size.target = [99, 99]"),
        r"size\.target = \[99, 99\] has no effect: sdxl-refiner is told a score in its place",
        paint(BASE, "size.target = [99, 99]"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", UNHEEDED)
def test_options_without_effect(case: str, tmp_path: Path, shelf: Shelf) -> None:
    wrong, sentence, right = UNHEEDED[case]
    said = found(tmp_path, wrong, shelf)
    assert [f.severity for f in said if re.search(sentence, f.sentence)] == ["warning"], said
    assert not [f for f in found(tmp_path, right, shelf) if "no effect" in f.sentence]


def test_what_is_said_to_all_stages_may_be_idle_in_one(tmp_path: Path, shelf: Shelf) -> None:
    shared = f"{UGLY}\n{paint(UNGUIDED)}"
    assert [f.severity for f in found(tmp_path, shared, shelf) if "no effect" in f.sentence] == ["warning"]
    here = [f for f in found(tmp_path, shared + then(), shelf) if "no effect" in f.sentence]
    assert [(f.severity, f.stage) for f in here] == [("note", "text-to-image")]


@pytest.mark.parametrize(
    "option", ["steps = 30", EULER, "guidance_scale = 5.0", 'scheduler = { timestep_spacing = "leading" }']
)
def test_what_holds_anyway_may_be_said(tmp_path: Path, shelf: Shelf, option: str) -> None:
    assert found(tmp_path, paint(BASE, option), shelf) == []


def test_faithful_where_nothing_departs(tmp_path: Path, shelf: Shelf) -> None:
    said = [f for f in found(tmp_path, paint("faithful = true"), shelf) if "faithful" in f.sentence]
    assert [(f.severity, f.sentence) for f in said] == [
        ("note", "faithful = true has no effect: nothing in this run departs from diffusers.")
    ]
    departs = ['scheduler = { timestep_spacing = "linspace" }', "steps = 7", "faithful = true"]
    assert found(tmp_path, paint(DDIM, *departs), shelf) == []
    assert found(tmp_path, paint(BASE, "negative_size.crop = [9, 9]", "faithful = true"), shelf) == []


def test_what_the_network_is_told_is_an_effect(tmp_path: Path, shelf: Shelf) -> None:
    told = 'scheduler = { prediction_type = "v_prediction", timestep_type = "continuous" }'
    assert found(tmp_path, paint(EULER, told), shelf) == []


def test_long_values_are_shortened(tmp_path: Path, shelf: Shelf) -> None:
    levels = ", ".join(f"{level}.5" for level in range(30, 0, -1))
    idle = next(
        f for f in found(tmp_path, paint(EULER, KARRAS + " }", f"timesteps = [{levels}]"), shelf) if "no eff" in f.sentence
    )
    assert re.search(r"beside timesteps = \[30\.5, 29\.5, .* …\]: leave", idle.sentence)
