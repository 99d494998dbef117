"""One thing is broken at a time, and the diagnosis names the stage that it is in."""

import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from unrolled import __main__ as command
from unrolled.chains.chain import Chain, Ingredient, PriorOptions, TextToImage
from unrolled.chains.checkups import Bounds, Check, apart, finite
from unrolled.chains.diagnose import Diagnosis, Examined, diagnose, prompts_of
from unrolled.chains.read import read_chain
from unrolled.core.conditioning import Conditioning
from unrolled.core.errors import BadChain
from unrolled.core.loading import Shelf
from unrolled.core.source import MINIATURES

HEALTHY = "Nothing was found to be wrong: text encoding, denoising and decoding are as expected."
LONG = "a red castle with a green tree beside a blue house, " * 9 + "and the last word is zebra"


@pytest.fixture(scope="module")
def shelf() -> Shelf:
    return Shelf(device="cpu")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the SD miniature to damage."""
    return Path(shutil.copytree(MINIATURES / "sd-1.5", tmp_path / "copy"))


def configure(file: Path, **options: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | options))


def damage(folder: Path, change: Callable[[Tensor], Tensor], only: str = "") -> None:
    """Change those weights whose name holds ``only``."""
    file = next(folder.glob("*.safetensors"))
    tensors = load_file(file)
    assert any(only in name for name in tensors)
    save_file({name: change(t) if only in name else t for name, t in tensors.items()}, file, {"format": "pt"})


def noise(t: Tensor) -> Tensor:
    return torch.randn(t.shape, generator=torch.Generator().manual_seed(0)).to(t) * t.std(correction=0)


def nan(t: Tensor) -> Tensor:
    return torch.full_like(t, math.nan)


def painted(model: Path | str, **keys: object) -> Chain:
    return Chain(
        stages=[{"do": "text-to-image", "name": "painted", "prompt": "a castle", "steps": 8, "model": str(model)} | keys]
    )


def named(found: Diagnosis, part: str, stage: str = "painted") -> bool:
    return found.sentence.startswith(f"Most likely it is the {part} of stage {stage!r}: ")


# --- nothing is wrong


@pytest.mark.parametrize(
    ("chain", "stages"),
    [("text-to-image", 1), ("base-to-refiner", 2), ("image-to-upscaler-to-super-resolution", 3), ("inpaint", 2)],
)
def test_what_is_healthy(shelf: Shelf, chain: str, stages: int) -> None:
    found = diagnose(read_chain(chain, steps=12), shelf)
    assert found.sentence == HEALTHY
    assert found.fault is None
    assert len(found.stages) == stages
    for stage in found.stages:
        assert {check.verdict for _, checks in stage.parts for check in checks} == {"ok"}
        assert all((stage.vae, stage.text, stage.denoising, stage.steps, stage.tokens))
    assert found.stages[-1].picture
    assert bool(found.stages[0].picture) == (chain != "base-to-refiner")  # the base hands on noise


def test_healthy_kandinsky_its_prompts_are_the_priors(shelf: Shelf) -> None:
    stages = [
        TextToImage(name="painted", model="kandinsky-2.2-decoder", prompt="a castle", negative_prompt="a house", steps=12)
    ]
    found = diagnose(Chain(stages=stages), shelf)
    assert found.sentence == HEALTHY
    assert [row.text for row in found.stages[0].tokens["a castle"]] == ["a", "castle"]


def test_guidance_off_and_equal_prompts_are_no_fault(shelf: Shelf) -> None:
    found = diagnose(painted("sd-1.5", guidance_scale=1.0, negative_prompt="a castle", steps=12), shelf)
    assert found.sentence == HEALTHY
    assert {step.apart for step in found.stages[0].steps} == {None}


# --- one thing is


def test_the_vaes_scaling_factor_is_anothers(shelf: Shelf, copy: Path) -> None:
    configure(copy / "vae" / "config.json", scaling_factor=0.18215)
    found = diagnose(painted(copy), shelf)
    assert named(found, "decoding")
    assert "std of a known picture's latents (scaling factor): 0.293, where 0.7 to 1.4 is expected" in found.sentence


@pytest.mark.parametrize("change", [nan, noise])
def test_the_decoder_is_damaged(shelf: Shelf, copy: Path, change: Callable[[Tensor], Tensor]) -> None:
    damage(copy / "vae", change, "decoder.")
    found = diagnose(painted(copy), shelf)
    assert named(found, "decoding")
    assert "known picture, encoded and decoded" in found.sentence


def test_the_encoder_is_damaged(shelf: Shelf, copy: Path) -> None:
    damage(copy / "vae", nan, "encoder.conv_in")
    found = diagnose(painted(copy), shelf)
    assert named(found, "decoding")
    assert "The VAE encoder gave NaN" in found.sentence


@pytest.mark.parametrize(("kind", "read"), [("v_prediction", "v"), ("sample", "x0")])
def test_the_prediction_type_is_anothers(shelf: Shelf, copy: Path, kind: str, read: str) -> None:
    configure(copy / "scheduler" / "scheduler_config.json", prediction_type=kind)
    found = diagnose(painted(copy), shelf)
    assert named(found, "denoising")
    denoising = {check.what: check.verdict for check in found.stages[0].denoising}
    assert denoising["its error as epsilon instead (prediction_type)"] == "wrong"
    assert any(f"its error as {read}, over" in what for what in denoising)


def test_the_text_encoder_is_empty(shelf: Shelf, copy: Path) -> None:
    damage(copy / "text_encoder", torch.zeros_like)
    found = diagnose(painted(copy), shelf)
    assert named(found, "text encoding")
    assert "distance of 'a red apple' from 'a castle at night': 0, where above 0.01" in found.sentence


def test_the_text_encoder_gives_nan(shelf: Shelf, copy: Path) -> None:
    damage(copy / "text_encoder", nan, "final_layer_norm")
    found = diagnose(painted(copy), shelf)
    assert named(found, "text encoding")
    assert "encoded prompts: " in found.sentence
    assert "NaN or infinite" in found.sentence


def test_a_prompt_too_long(shelf: Shelf) -> None:
    found = diagnose(painted("sd-1.5", prompt=LONG, steps=12), shelf)
    assert named(found, "text encoding")
    assert "last word is zebra', where none dropped is expected" in found.sentence
    rows = found.stages[0].tokens[LONG]
    assert rows[-1].text == "zebra"
    assert rows[-1].chunk is None
    assert sum(row.chunk is not None for row in rows) == 75
    assert diagnose(painted("sd-1.5", prompt=LONG, steps=12, chunks=True), shelf).sentence == HEALTHY


def test_weights_stand_in_the_token_table(shelf: Shelf) -> None:
    found = diagnose(painted("sd-1.5", prompt="a (red:1.3) castle", prompt_weights=True), shelf)
    (rows,) = found.stages[0].tokens.values()
    assert [(row.text, row.weight) for row in rows] == [("a", 1.0), ("red", 1.3), ("castle", 1.0)]


def test_guidance_is_absurd(shelf: Shelf) -> None:
    found = diagnose(painted("sd-1.5", guidance_scale=60.0), shelf)
    assert named(found, "denoising")
    verdicts = {check.what: check.verdict for check in (*found.stages[0].denoising, *found.stages[0].picture)}
    assert verdicts["part of the last x0 beyond what the VAE knows"] == "wrong"
    assert verdicts["part of the picture far beyond white and black"] == "odd"


@pytest.mark.parametrize("change", [nan, noise])
def test_the_unet_is_damaged(shelf: Shelf, copy: Path, change: Callable[[Tensor], Tensor]) -> None:
    damage(copy / "unet", change, "mid_block" if change is nan else "")
    found = diagnose(painted(copy), shelf)
    assert named(found, "denoising")
    broken = [check.found for check in found.stages[0].denoising if check.what == "the run"]
    assert len(broken) == (change is nan)
    assert all("NaN or infinity appeared in step 1 of 8" in said for said in broken)


def test_a_unet_that_does_not_listen(shelf: Shelf, copy: Path) -> None:
    damage(copy / "unet", torch.zeros_like, "attn2.to_out")
    found = diagnose(painted(copy), shelf)
    assert named(found, "denoising")
    assert "distance of conditional from unconditional output: 0, where" in found.sentence


def test_kandinskys_input_is_not_scaled(shelf: Shelf) -> None:
    found = diagnose(painted("kandinsky-2.2-decoder", solver="euler", faithful=True), shelf)
    assert named(found, "denoising")
    given = {check.what: check.verdict for check in found.stages[0].denoising}
    assert given["std of what the UNet is given over the expected"] == "wrong"


def test_the_prior_gives_nan_before_any_stage_is_entered(shelf: Shelf, tmp_path: Path) -> None:
    prior = Path(shutil.copytree(MINIATURES / "kandinsky-2.2-prior", tmp_path / "prior"))
    shutil.copytree(MINIATURES / "sd-1.5" / "tokenizer", prior / "tokenizer", dirs_exist_ok=True)
    damage(prior / "prior", nan, "proj_in")
    found = diagnose(painted("kandinsky-2.2-decoder", prior={"model": str(prior)}), shelf)
    assert named(found, "text encoding")
    assert "NaN or infinity appeared in step 1" in found.sentence


def test_the_stage_that_is_broken_is_named(shelf: Shelf, copy: Path) -> None:
    damage(copy / "unet", nan, "mid_block")
    first = {"do": "text-to-image", "name": "first", "model": "sd-1.5", "prompt": "a castle", "steps": 12}
    second = {"do": "image-to-image", "name": "second", "model": str(copy), "prompt": "a house", "steps": 4}
    found = diagnose(Chain(stages=[first, second]), shelf)
    assert named(found, "denoising", "second")
    assert [stage.name for stage in found.stages] == ["first", "second"]


# --- how it is put


def test_what_is_wrong_comes_before_what_is_odd_and_causes_before_what_follows() -> None:
    odd, wrong = Check("a", "1", "2", "odd"), Check("b", "1", "2", "wrong")
    first, second = Examined("one", text=(odd,)), Examined("two", denoising=(wrong,), picture=(wrong,))
    assert (
        Diagnosis((first, second)).sentence == "Most likely it is the denoising of stage 'two': b: 1, where 2 is expected."
    )
    assert named(Diagnosis((first,)), "text encoding", "one")
    assert named(Diagnosis((Examined("x", vae=(wrong,), text=(wrong,)),)), "decoding", "x")


def test_bounds() -> None:
    bounds = Bounds(0.5, 0.7, 1.4, 2.0)
    assert [bounds.judge(v) for v in (0.4, 0.6, 0.7, 1.4, 1.5, 2.1, math.nan)] == [
        "wrong", "odd", "ok", "ok", "odd", "wrong", "wrong",
    ]  # fmt: skip
    assert [str(b) for b in (bounds, Bounds(1, 2, math.inf, math.inf))] == ["0.7 to 1.4", "above 2"]
    assert str(Bounds(-math.inf, -math.inf, 3, 4)) == "below 3"


def test_what_is_counted() -> None:
    assert finite("x", [torch.tensor([1.0, math.nan]), torch.tensor([math.inf])]).found == "2 of 3 numbers NaN or infinite"
    one, two = (Conditioning(context=torch.full((1, 2, 2), v), time_ids=torch.full((1, 6), 9 * v)) for v in (2.0, 1.0))
    assert apart(one, two) == 0.5
    assert apart(one, one) == 0.0
    longer = Conditioning(context=torch.cat([torch.full((1, 2, 2), 1.0), torch.full((1, 3, 2), 7.0)], 1))
    assert apart(one, longer) == apart(longer, one) == 0.5


def test_prompts_of_a_mix() -> None:
    mix = (Ingredient(prompt="a cat"), Ingredient(image="dog.png"))
    stage = TextToImage(prompt="unused", negative_prompt="a cat", prompt_2="b", prior=PriorOptions(mix=mix))
    assert prompts_of(stage) == ("a cat", "b")


# --- the command


def unrolled(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["unrolled", *arguments])
    try:
        command.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert unrolled(monkeypatch, "diagnose", "text-to-image", "--steps", "8") == 0
    assert capsys.readouterr().out.splitlines()[-1] == HEALTHY
    assert unrolled(monkeypatch, "diagnose", "text-to-image", "--steps", "2", "--prompt", f"{LONG} [/red]") == 1
    printed = capsys.readouterr().out
    assert "dropped" in printed
    assert printed.splitlines()[-1].startswith("Most likely it is the ")
    assert not list(tmp_path.iterdir())


def test_other_faults_are_raised_as_by_run(shelf: Shelf) -> None:
    with pytest.raises(BadChain, match="Guidance from step 5 to 99"):
        diagnose(painted("sd-1.5", guidance_interval=(5, 99)), shelf)
