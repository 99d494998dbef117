"""The plan finds every mistake without loading a model."""

from pathlib import Path

import pytest
from PIL import Image
from unrolled.chains.chain import Chain, TextToImage
from unrolled.chains.plan import plan
from unrolled.chains.read import packaged_chains, read_chain
from unrolled.chains.trace import draws, planned_steps
from unrolled.core.errors import BadChain, BadModel
from unrolled.core.loading import Shelf
from unrolled.schedulers import Euler, EulerAncestral


def chain(folder: Path, text: str) -> Chain:
    path = folder / "chain.toml"
    path.write_text(text)
    return read_chain(path)


SPLIT = """\
steps = 10
solver = "euler"
[[stage]]
name = "base"
do = "text-to-image"
stop = {{ {stop} }}
[[stage]]
name = "rest"
do = "image-to-image"
start = "handoff"
"""


@pytest.mark.parametrize(
    ("stop", "steps"),
    [("step = 4", (4, 6)), ("steps_fraction = 0.8", (8, 2)), ("sigma = 1.0", (6, 4)), ("training_time = 0.8", (8, 2))],
)
def test_a_split_adds_up_and_shares_its_sigma(tmp_path: Path, stop: str, steps: tuple[int, int]) -> None:
    base, rest = (item.run for item in plan(chain(tmp_path, SPLIT.format(stop=stop)), Shelf(device="cpu")))
    assert base is not None
    assert rest is not None
    assert (len(base.schedule), len(rest.schedule)) == steps
    assert base.schedule.sigmas[-1] == rest.schedule.sigmas[0]
    assert rest.schedule.first == len(base.schedule)


def test_sizes_handoffs_and_calls(tmp_path: Path) -> None:
    text = """
    [[stage]]
    do = "text-to-image"
    solver = "heun"
    steps = 5
    [[stage]]
    do = "image-to-image"
    solver = "pndm"
    scheduler = { skip_prk_steps = true }
    steps = 10
    strength = 0.5
    [[stage]]
    do = "resize"
    factor = 2
    """
    first, second, third = plan(chain(tmp_path, text), Shelf(device="cpu"))
    assert (first.takes, second.takes, third.takes) == ("noise", "latents", "pixels")
    assert (first.size, third.size) == ((64, 64), (128, 128))
    assert (first.evaluations, second.evaluations, third.evaluations) == (9, 6, 0), "PNDM starts with a step of Heun's"
    assert second.run is not None
    assert (len(second.run.schedule), len(second.run.whole)) == (5, 10)
    assert (first.memory is not None, first.mode, third.mode) == (True, "resident", None)


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (
            'do = "text-to-image"\nwidth = 66',
            "66x64, but sides must be multiples of 4: the nearest sizes are 64x64 and 68x64",
        ),
        ('do = "text-to-image"\nsteps = 2000', "Steps go from 1 to 1000"),
        ('do = "text-to-image"\nsolver = "magic"', "There is no solver 'magic': use one of ddim"),
        ('do = "text-to-image"\nstop = { step = 3 }', "is the last but stops at sigma"),
        ('do = "text-to-image"\nstop = { step = 0 }', "has no step to run"),
        ('do = "text-to-image"\nguidance_scale = [1.0, 2.0]', "2 guidance scales were given for a schedule of 30 steps"),
        ('do = "text-to-image"\nguidance_interval = [5, 3]', "does not lie within 30 steps"),
        ('do = "image-to-image"', "there is no picture to start from"),
        ('do = "image-to-image"\nimage = "gone.png"', "There is no picture at"),
        ('do = "image-to-image"\nimage = "in.png"\nstrength = 0', "Strength must be more than 0 and at most 1, got 0"),
        ('do = "image-to-image"\nimage = "in.png"\nstrength = 1.5', "Strength must be more than 0 and at most 1"),
        ('do = "image-to-image"\nimage = "in.png"\nstrength = 0.01', "leaves no step to run: use at least"),
        ('do = "image-to-image"\nimage = "in.png"\nfirst_step = 30', "first_step goes from 0 to 29"),
        ('do = "image-to-image"\nimage = "odd.png"', "67x64, but sides must be"),
        (
            'do = "image-to-image"\nimage = "in.png"\nstart = "handoff"',
            'line 1: start = "handoff" goes on from noisy latents',
        ),
        ('do = "inpaint"\nimage = "in.png"\nmask = "odd.png"', "the mask is 67x64 but the picture is 64x64"),
        ('do = "inpaint"\nimage = "in.png"\nmask = "alpha.png"', "unclear whether they mean keep or repaint"),
        ('do = "sharpen"', "there is no picture to work on"),
    ],
)
def test_mistakes_of_one_stage(tmp_path: Path, stage: str, message: str) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "in.png")
    Image.new("RGB", (67, 64)).save(tmp_path / "odd.png")
    Image.new("RGBA", (64, 64), (255, 255, 255, 90)).save(tmp_path / "alpha.png")
    with pytest.raises(BadChain, match=message):
        plan(chain(tmp_path, f"[[stage]]\n{stage}\n"), Shelf(device="cpu"))


def test_handoffs_that_do_not_fit(tmp_path: Path) -> None:
    unstopped = SPLIT.replace("stop = {{ {stop} }}\n", "")
    with pytest.raises(BadChain, match="needs a stage before it that stops early"):
        plan(chain(tmp_path, unstopped), Shelf(device="cpu"))
    cut = SPLIT.format(stop="step = 4").replace('"handoff"', "{ step = 6 }")
    with pytest.raises(BadChain, match=r"it is handed latents at sigma 1\.95 but starts at 0\.93\d+: stop the stage bef"):
        plan(chain(tmp_path, cut), Shelf(device="cpu"))
    ignored = SPLIT.format(stop="step = 4").replace('start = "handoff"', "strength = 0.5")
    with pytest.raises(BadChain, match=r'handed latents at sigma .*: give start = "handoff"'):
        plan(chain(tmp_path, ignored), Shelf(device="cpu"))


def test_another_latent_space_needs_pixels(tmp_path: Path, tiny_folder: Path) -> None:
    text = f'[[stage]]\ndo = "text-to-image"\n[[stage]]\ndo = "image-to-image"\nmodel = "{tiny_folder}"\n'
    with pytest.raises(BadChain, match='different VAEs, so latents cannot be handed on: say via = "pixels"'):
        plan(chain(tmp_path, text), Shelf(device="cpu"))
    through = plan(chain(tmp_path, text + 'via = "pixels"\n'), Shelf(device="cpu"))[1]
    assert through.takes == "pixels"
    assert through.notes[0] == f"through pixels, because the latent spaces of sd-1.5 and {tiny_folder} differ"


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BadModel, match="Stage 'text-to-image': There is no model 'nothing'"):
        plan(chain(tmp_path, '[[stage]]\ndo = "text-to-image"\nmodel = "nothing"\n'), Shelf(device="cpu"))


def test_no_weights_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a plan must not load a component")

    monkeypatch.setattr("unrolled.core.loading.read_component", refuse)
    assert plan(read_chain("text-to-image"), Shelf(device="cpu"))


def test_a_picture_far_above_the_native_size_is_noted(tmp_path: Path) -> None:
    Image.new("RGB", (200, 64)).save(tmp_path / "wide.png")
    job = chain(tmp_path, '[[stage]]\ndo = "image-to-image"\nimage = "wide.png"\n')
    assert "far above the model's native 64 px" in plan(job, Shelf(device="cpu"))[0].notes[0]


@pytest.mark.parametrize("name", packaged_chains())
def test_every_packaged_chain_plans_and_counts_its_calls(name: str) -> None:
    for item in plan(read_chain(name), Shelf(device="cpu")):
        assert (item.evaluations >= len(item.run.schedule)) if item.run else item.evaluations == 0
        assert not any("far above" in note for note in item.notes)


def test_noisy_latents_of_another_vae_are_not_told_to_go_through_pixels() -> None:
    chain = read_chain("base-to-refiner", ["refiner.model=sd-1.5"])
    with pytest.raises(BadChain, match="handed on while they are noisy: let two models of one VAE share a run"):
        plan(chain, Shelf(device="cpu"))


def test_a_file_named_from_outside_is_ones_own(
    tmp_path: Path, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture.save(tmp_path / "mine.png")
    monkeypatch.chdir(tmp_path)
    chain = read_chain("image-to-image-to-image", ["changed.image=mine.png"])
    assert plan(chain, Shelf(device="cpu"))[0].takes.endswith("mine.png, fitted")


# --- every step of a plan


def test_steps_say_where_every_evaluation_lies(tmp_path: Path) -> None:
    text = """
    [[stage]]
    name = "first"
    do = "text-to-image"
    solver = "heun"
    steps = 3
    guidance_scale = [5.0, 1.0, 3.0]
    [[stage]]
    name = "again"
    do = "image-to-image"
    solver = "dpm++2m"
    steps = 4
    strength = 0.5
    repeat = 2
    """
    plans = plan(chain(tmp_path, text), Shelf(device="cpu"))
    steps = planned_steps(plans)
    assert [step.index for step in steps] == list(range(7))
    assert [(step.stage, step.repetition, step.step) for step in steps] == [
        *(("first", 0, i) for i in range(3)), *(("again", 0, i) for i in (2, 3)), *(("again", 1, i) for i in (2, 3)),
    ]  # fmt: skip
    first, again = plans[0].run, plans[1].run
    assert first is not None
    assert again is not None
    one, two, three, *rest = steps
    assert one.evaluated == (one.sigma, one.sigma_next) == first.schedule.sigmas[:2], "Heun's second lies at the end"
    assert (two.sigma, three.evaluated, three.sigma_next) == (one.sigma_next, (three.sigma,), 0.0)
    assert [step.timestep for step in steps[:3]] == list(first.schedule.timesteps)
    assert [step.guidance_scale for step in steps[:3]] == [5.0, 1.0, 3.0]
    assert [step.remembered for step in rest] == [0, 1, 0, 1], "each repetition starts afresh"
    assert [step.sigma for step in rest] == [*again.schedule.sigmas[:2]] * 2
    assert sum(len(step.evaluated) for step in steps) == sum(item.evaluations for item in plans)


def test_the_middle_of_a_step(tmp_path: Path) -> None:
    job = chain(tmp_path, '[[stage]]\ndo = "text-to-image"\nsolver = "dpm2"\nsteps = 3')
    for step in planned_steps(plan(job, Shelf(device="cpu")))[:-1]:
        assert step.sigma > step.evaluated[1] > step.sigma_next
        assert step.evaluated[1] == pytest.approx((step.sigma * step.sigma_next) ** 0.5, rel=0.05)


def test_the_rest_of_a_run_starts_with_what_was_remembered(tmp_path: Path) -> None:
    """PNDM's first step takes two evaluations, but not that of a run that goes on."""
    pndm = 'solver = "pndm"\nscheduler = { skip_prk_steps = true }'
    text = SPLIT.format(stop="step = 4").replace('solver = "euler"', pndm)
    whole = f'[[stage]]\ndo = "text-to-image"\n{pndm}\nsteps = 10'
    shelf = Shelf(device="cpu")
    base, rest = plan(chain(tmp_path, text), shelf)
    assert rest.continues
    assert rest.goes_on_from is base
    assert (base.evaluations, rest.evaluations) == (5, 6)
    steps, at_once = planned_steps([base, rest]), planned_steps(plan(chain(tmp_path, whole), shelf))
    assert [(s.evaluated, s.remembered) for s in steps] == [(s.evaluated, s.remembered) for s in at_once]
    assert [s.remembered for s in steps] == [0, 1, 2, *[3] * 7]
    (base, rest) = plan(chain(tmp_path, text.replace('name = "rest"', 'name = "rest"\nsteps = 9')), shelf)
    assert (rest.continues, rest.evaluations, len(rest.trace)) == (False, 7, 6)


def test_who_draws(tmp_path: Path) -> None:
    (item,) = plan(chain(tmp_path, '[[stage]]\ndo = "text-to-image"\nsteps = 3'), Shelf(device="cpu"))
    assert item.run is not None
    assert draws(item.run.schedule, EulerAncestral())
    assert not draws(item.run.schedule, Euler())


def test_a_solver_keeps_the_name_it_was_given(tmp_path: Path) -> None:
    """Some names stand for a solver and options of it; what is run is planned again from the plan's stages."""
    for given in ("dpm++3m-sde", None):
        job = chain(tmp_path, '[[stage]]\ndo = "text-to-image"\nsteps = 3' + (f'\nsolver = "{given}"' if given else ""))
        (item,) = plan(job, Shelf(device="cpu"))
        assert isinstance(item.stage, TextToImage)
        assert item.stage.solver == (given or "dpm++2m")
        (again,) = plan(Chain(stages=(item.stage,)), Shelf(device="cpu"))
        assert again.run == item.run


def test_a_plan_says_how_its_models_are_placed() -> None:
    job = read_chain("text-to-image")
    (all_at_once,) = plan(job, Shelf(device="cpu", vram="1G"))
    assert all_at_once.mode == "resident"
    (part,) = plan(job, Shelf(device="cpu", vram=int(all_at_once.memory or 0) - 1))
    assert part.mode == "model"
    (layers,) = plan(job, Shelf(device="cpu", offload="layer"))
    assert layers.mode == "layer"
    assert (part.memory or 0) < (all_at_once.memory or 0)
