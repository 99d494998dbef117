"""Chain files are read key by key, and every mistake is named with its line."""

from pathlib import Path

import pytest
from unrolled.chains.chain import Chain, Cut, ImageToImage, Resize, TextToImage
from unrolled.chains.read import packaged_chains, read_chain
from unrolled.core.errors import BadChain

CHAIN = """\
prompt = "a castle"
steps = 40

[[stage]]
name = "composition"
do = "text-to-image"
model = "sd-1.5"
stop = { training_time = 0.8 }

[[stage]]
name = "detail"
do = "image-to-image"
steps = 20
start = "handoff"
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "chain.toml"
    path.write_text(CHAIN)
    return path


def test_shared_keys_stand_at_the_top_and_a_stage_overrides_them(file: Path) -> None:
    chain = read_chain(file)
    first, second = chain.stages
    assert isinstance(first, TextToImage)
    assert isinstance(second, ImageToImage)
    assert (first.prompt, first.steps, second.prompt, second.steps) == ("a castle", 40, "a castle", 20)
    assert first.stop == Cut(training_time=0.8)
    assert chain.folder == file.parent


def test_overrides(file: Path) -> None:
    chain = read_chain(
        file, ["detail.prompt=a dog", "guidance_scale=3", "scheduler.use_karras_sigmas=true", "seed=5"], steps=7, prompt=None
    )
    first, second = chain.stages
    assert isinstance(first, TextToImage)
    assert isinstance(second, ImageToImage)
    assert (first.prompt, second.prompt) == ("a castle", "a dog")
    assert first.steps == second.steps == 7, "what is given for the chain goes before what a stage says"
    assert first.guidance_scale == second.guidance_scale == 3
    assert first.scheduler == {"use_karras_sigmas": True}
    assert chain.seeds() == (5,)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("steps = 40", "stepz = 40", r"line 2: unknown key 'stepz'; did you mean 'steps'\?"),
        ("steps = 20", "strenght = 20", r"line 13: unknown key 'strenght'; did you mean 'strength'\?"),
        ("steps = 20", "steps = 0", "line 13: steps = 0 is not allowed"),
        ("steps = 20", 'steps = "many"', "line 13: steps = 'many' is not allowed"),
        ('do = "image-to-image"', 'do = "paint"', "line 12: do = 'paint' is not a stage; use one of text-to-image"),
        ('start = "handoff"', 'start = "there"', "line 14: start = 'there' is not allowed"),
        ("{ training_time = 0.8 }", "{ training_time = 0.8, step = 3 }", "line 8: give exactly one of step"),
        ("{ training_time = 0.8 }", "{ time = 0.8 }", "line 8: unknown key 'time'"),
        ('name = "detail"', 'name = "composition"', "two stages are called 'composition'"),
        ('name = "detail"', 'after = "nobody"', "comes after 'nobody', which is no earlier stage"),
        ("steps = 40", "steps = ", "is not valid TOML"),
        ("steps = 20", "strength = 0.5\nfirst_step = 3", "give strength or first_step, not both"),
    ],
)
def test_mistakes_are_named_with_their_line(file: Path, old: str, new: str, message: str) -> None:
    file.write_text(CHAIN.replace(old, new))
    with pytest.raises(BadChain, match=message):
        read_chain(file)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("nobody.steps=3", "names no stage of this chain; its stages are composition, detail"),
        ("steps", "is not of the form key=value"),
        ("detail.stepz=3", "unknown key 'stepz'"),
        ("detail.steps.x=3", "reaches into detail, which is a single value"),
        ("steps=true", r"^Given for chain\.toml: steps = True is not allowed"),
        ("formats=jpg", r"formats = 'jpg' is not allowed: input should be a list, e\.g\. \[\"jpg\"\]"),
        ("seed=-5", "seed = -5 is not allowed"),
        ("guidance_scale=nan", "guidance_scale.* = nan is not allowed"),
    ],
)
def test_bad_overrides(file: Path, override: str, message: str) -> None:
    with pytest.raises(BadChain, match=message):
        read_chain(file, [override])


def test_a_name_that_is_nearly_right_and_a_file_of_another_kind(tmp_path: Path) -> None:
    with pytest.raises(BadChain, match="did you mean 'text-to-image'"):
        read_chain("txt-to-image")
    (tmp_path / "interrupted_000.safetensors").touch()
    with pytest.raises(BadChain, match="is no chain file: if it is a run that was stopped, `unrolled resume"):
        read_chain(tmp_path / "interrupted_000.safetensors")


def test_a_chain_without_stages_or_file(tmp_path: Path) -> None:
    (tmp_path / "empty.toml").write_text("steps = 3\n")
    with pytest.raises(BadChain, match=r"has no \[\[stage\]\]"):
        read_chain(tmp_path / "empty.toml")
    with pytest.raises(BadChain, match=r"There is no chain file nowhere: use a path, or one of .*text-to-image"):
        read_chain("nowhere")


@pytest.mark.parametrize("name", packaged_chains())
def test_packaged_chains_read(name: str) -> None:
    assert read_chain(name).stages


def test_python_builds_the_same_chain(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(
        '[[stage]]\ndo = "text-to-image"\nprompt = "a dog"\n[[stage]]\ndo = "resize"\nfactor = 3\n'
    )
    built = Chain(stages=(TextToImage(prompt="a dog"), Resize(factor=3)))
    assert read_chain(tmp_path / "c.toml").model_dump() == built.model_dump()
    assert [stage.name for stage in built.stages] == ["text-to-image", "resize"]
