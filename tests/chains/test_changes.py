"""LoRAs and learned words of single stages: what they change, what the plan and the manifest say, what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner
from unrolled.__main__ import app
from unrolled.chains.adapters import LoraOptions
from unrolled.chains.chain import Chain, ImageToImage, TextToImage
from unrolled.chains.changes import Changes
from unrolled.chains.checks import findings
from unrolled.chains.jobs import text_to_image
from unrolled.chains.plan import plan
from unrolled.chains.read import read_chain
from unrolled.chains.run import resume, run
from unrolled.core.checkpoint import fingerprint_of
from unrolled.core.errors import BadChain, BadModel, Note
from unrolled.core.loading import Model, Shelf
from unrolled.core.lora import lora
from unrolled.core.textual_inversion import textual_inversion
from unrolled.stages.decode import decode

Write = Callable[..., Any]
BOTH = ("unet", "text_encoder")


@pytest.fixture
def files(tmp_path: Path, tiny: Model, tiny_sdxl: Model, write_lora: Write) -> Path:
    """A folder with two LoRAs and a word for the tiny model, and a LoRA for SDXL."""
    write_lora(tmp_path / "style.safetensors", tiny, "kohya", parts=BOTH)
    write_lora(tmp_path / "more.safetensors", tiny, "peft", parts=BOTH, seed=1)
    write_lora(tmp_path / "xl.safetensors", tiny_sdxl, "peft", parts=("unet",))
    save_file({"<toy>": torch.randn(2, 32, generator=torch.Generator().manual_seed(0))}, tmp_path / "toy.safetensors")
    return tmp_path


def paint(model: Path, *lines: str, name: str = "one") -> str:
    return "\n".join(["[[stage]]", f'name = "{name}"', 'do = "text-to-image"', f'model = "{model}"', *lines, ""])


def chain_of(files: Path, *parts: str) -> Chain:
    (files / "chain.toml").write_text("\n".join(parts))
    return read_chain(files / "chain.toml")


def pixels(picture: Image.Image) -> Any:
    return np.asarray(picture, dtype=int)


HEAD = 'prompt = "a <toy> castle"\nsteps = 3\nseed = 4\n'


def test_each_stage_has_its_own(files: Path, tiny_folder: Path) -> None:
    """Three stages on one model, loaded once: with a LoRA and a word, with another LoRA, with nothing."""
    half = 'lora = ["style.safetensors", { file = "more.safetensors", weight = 0.5 }]'
    one = paint(tiny_folder, half, 'embeddings = { "<toy>" = "toy.safetensors" }')
    two = paint(tiny_folder, 'lora = ["more.safetensors"]', name="two")
    chain = chain_of(files, "grid = true", HEAD, one, two, paint(tiny_folder, name="three"))
    shelf = Shelf(device="cpu")
    result = run(chain, shelf)
    model = shelf.load(str(tiny_folder))
    assert not [name for name, module in model.unet.named_modules() if "LowRank" in type(module).__name__]

    def by_hand(stage: int) -> Any:
        spec = chain.stages[stage]
        assert isinstance(spec, TextToImage)
        stream = "" if stage == 0 else spec.name
        return decode(model, text_to_image(model, spec.model_copy(update={"height": 64, "width": 64}), [4], stream))[0]

    word = textual_inversion(model, "<toy>", files / "toy.safetensors")
    with lora(model, files / "style.safetensors"), lora(model, files / "more.safetensors", 0.5), word:
        first = by_hand(0)
    with lora(model, files / "more.safetensors"):
        second = by_hand(1)
    for name, wanted in (("one", first), ("two", second), ("three", by_hand(2))):
        assert np.array_equal(pixels(result.outputs[name].pictures()[0]), pixels(wanted)), name
    assert not np.array_equal(pixels(by_hand(0)), pixels(first))
    prints = result.models["one"]
    assert prints["lora 1"] == fingerprint_of(files / "style.safetensors")
    assert prints["lora 2"] == fingerprint_of(files / "more.safetensors")
    assert prints["embedding <toy>"] == fingerprint_of(files / "toy.safetensors")
    assert not [key for key in result.models["three"] if key.startswith(("lora", "embedding"))]


def test_what_peft_says_beside_a_lora_is_part_of_it(tmp_path: Path) -> None:
    file = tmp_path / "style.safetensors"
    save_file({"x": torch.zeros(1)}, file)
    assert Changes(((file, 1.0),)).fingerprints() == {"lora 1": fingerprint_of(file)}
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 4}')
    weak = Changes(((file, 1.0),)).fingerprints()
    assert weak.keys() == {"lora 1", "lora 1, config"}
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 32}')
    assert Changes(((file, 1.0),)).fingerprints() != weak


def test_off_again_when_a_run_fails(files: Path, tiny_folder: Path) -> None:
    shelf = Shelf(device="cpu")
    before = [id(module) for module in shelf.load(str(tiny_folder)).unet.modules()]

    def stop(*_: Any) -> None:
        assert len(list(shelf.load(str(tiny_folder)).unet.modules())) > len(before)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(chain_of(files, HEAD, paint(tiny_folder, 'lora = ["style.safetensors"]')), shelf, watch=stop)
    assert [id(module) for module in shelf.load(str(tiny_folder)).unet.modules()] == before


def test_fast_networks_honour_them(files: Path, tiny_folder: Path) -> None:
    """The layers with a LoRA run as they were written, and a Note says so; without, they are fused again."""
    lines = ['lora = [{ file = "style.safetensors", weight = 0.7 }]']
    chain = chain_of(files, HEAD, paint(tiny_folder, *lines), paint(tiny_folder, name="two"))
    shelf = Shelf(device="cpu", fast=True)
    plain, fast = run(chain, Shelf(device="cpu")), run(chain, shelf)
    for name in ("one", "two"):
        ours, wanted = (pixels(result.outputs[name].pictures()[0]) for result in (fast, plain))
        assert np.abs(ours - wanted).max() <= 1
    assert any("is a unrolled LowRank" in note for note in fast.notes)
    assert plain.notes == []
    again = run(chain_of(files, HEAD, paint(tiny_folder)), shelf)
    assert again.notes == []


def test_what_the_manifest_and_the_parameters_say(files: Path, tiny_folder: Path) -> None:
    chain = chain_of(files, HEAD, paint(tiny_folder, 'lora = [{ file = "style.safetensors", weight = -0.5 }]'))
    run(chain, Shelf(device="cpu"), files / "out")
    facts = json.loads(next((files / "out").glob("*.json")).read_text())
    assert facts["chain"]["stages"][0]["lora"] == [{"file": "style.safetensors", "weight": -0.5}]
    assert facts["models"]["one"]["lora 1"] == fingerprint_of(files / "style.safetensors")
    text = Image.open(next((files / "out").glob("*.png"))).info["parameters"]
    assert text.startswith("a <toy> castle <lora:style:-0.5>\n")


def test_a_run_is_not_resumed_with_another_file(files: Path, tiny_folder: Path) -> None:
    chain = chain_of(files, HEAD, paint(tiny_folder, 'lora = ["style.safetensors"]'))
    whole = run(chain, Shelf(device="cpu"))

    def stop(_: Any, step: Any) -> None:
        if step.index == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(chain, Shelf(device="cpu"), files / "out", stop)
    style = (files / "style.safetensors").read_bytes()
    (files / "style.safetensors").write_bytes((files / "more.safetensors").read_bytes())
    with pytest.raises(BadModel, match="lora 1"):
        resume(files / "out")
    (files / "style.safetensors").write_bytes(style)
    assert np.array_equal(pixels(resume(files / "out").pictures[0]), pixels(whole.pictures[0]))


def test_another_lora_is_another_model_to_a_solver(files: Path, tiny_folder: Path) -> None:
    """What DPM++ 2M remembers goes on in the next stage for the same weights only."""
    first: Any = {"model": str(tiny_folder), "solver": "dpm++2m", "steps": 6}
    for told, same in (((), True), ((LoraOptions(file="more.safetensors"),), False)):
        stages = (
            TextToImage(name="one", stop={"step": 3}, **first),
            ImageToImage(name="two", start="handoff", lora=told, **first),
        )
        plans = plan(Chain(stages=stages, folder=files), Shelf(device="cpu"))
        assert plans[1].continues == same


# --- the plan


def test_the_plan_shows_them(files: Path, tiny_folder: Path) -> None:
    lines = ['lora = [{ file = "style.safetensors", weight = 0.5 }]', 'embeddings = { "<toy>" = "toy.safetensors" }']
    chain_of(files, HEAD, paint(tiny_folder, *lines))
    done = CliRunner().invoke(app, ["plan", str(files / "chain.toml"), "--device", "cpu"], env={"COLUMNS": "250"})
    assert done.exit_code == 0, done.output
    assert "LoRA style, 0.5" in done.output
    assert "<toy> as toy" in done.output


def said(chain: Chain) -> list[tuple[str, str, str]]:
    return [(f.severity, f.stage, f.sentence) for f in findings(chain, plan(chain, Shelf(device="cpu")))]


def test_what_has_no_effect(files: Path, tiny_folder: Path) -> None:
    nothing = paint(tiny_folder, 'lora = [{ file = "style.safetensors", weight = 0.0 }]')
    sentence = "the LoRA style.safetensors has the weight 0, which adds nothing: leave it out"
    assert ("note", "one", sentence) in said(chain_of(files, HEAD, nothing))
    word = 'embeddings = { "<cat>" = "toy.safetensors" }'
    sentence = 'embeddings.<cat> = "toy.safetensors" has no effect: none of its prompts has that word; leave it out.'
    assert ("warning", "one", sentence) in said(chain_of(files, HEAD, paint(tiny_folder, word)))
    other = paint(tiny_folder, 'negative_prompt = "a <CAT>"', name="two")
    assert ("note", "one", sentence) in said(chain_of(files, HEAD, word, paint(tiny_folder), other))
    assert not [s for s in said(chain_of(files, HEAD, word.replace("cat", "toy"), paint(tiny_folder))) if "embedd" in s[2]]


def test_shared_and_from_the_command_line(files: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chain = chain_of(
        files, 'lora = ["style.safetensors"]', HEAD, paint(tiny_folder), paint(tiny_folder, "lora = []", name="two")
    )
    assert [[told.file for told in stage.lora] for stage in chain.stages] == [["style.safetensors"], []]  # type: ignore[union-attr]
    monkeypatch.chdir(files)
    (files / "deep").mkdir()
    (files / "deep" / "chain.toml").write_text(HEAD + paint(tiny_folder))
    overrides = ['lora=[{file="more.safetensors", weight=2}, "gone.safetensors"]', "embeddings.<toy>=toy.safetensors"]
    stage: Any = read_chain("deep/chain.toml", overrides).stages[0]
    assert [(told.file, told.weight) for told in stage.lora] == [
        (str(files / "more.safetensors"), 2),
        ("gone.safetensors", 1),
    ]
    assert stage.embeddings == {"<toy>": str(files / "toy.safetensors")}


# --- what is refused


def test_files_that_do_not_fit(files: Path, tiny_folder: Path, tiny_sdxl_folder: Path) -> None:
    def fault(lines: str, model: Path = tiny_folder) -> str:
        with pytest.raises(BadModel) as caught:
            plan(chain_of(files, HEAD, paint(model, lines)), Shelf(device="cpu"))
        return str(caught.value)

    assert re.fullmatch(
        rf"Stage 'one': {files}/xl.safetensors does not fit {tiny_folder}: \d+ of the 125 layers that it changes are not "
        r"there or of another shape, unet\.\S+ to begin with; it was trained on a UNet that is told text of width 80, and "
        r"this one is told 32\.",
        fault('lora = ["xl.safetensors"]'),
    )
    assert fault('lora = ["gone.safetensors"]') == (
        "Stage 'one': There is no file gone.safetensors: give a path, or a file of a hub repository as OWNER/NAME/FILE with "
        "--models hub."
    )
    assert fault('embeddings = { "<toy>" = "toy.safetensors" }', tiny_sdxl_folder) == (
        f"Stage 'one': {files}/toy.safetensors does not fit {tiny_sdxl_folder}: its vectors are 32 wide, and those of its "
        "prompts 32 and 48."
    )


def test_keys_that_are_not_allowed(files: Path, tiny_folder: Path, tiny_kandinsky_folder: Path) -> None:
    with pytest.raises(BadChain, match=r"chain\.toml, line 9: unknown key 'wieght'\."):
        chain_of(files, HEAD, paint(tiny_folder, 'lora = [{ file = "style.safetensors", wieght = 2 }]'))
    with pytest.raises(BadChain, match=r"line 9: the key 'lora\.0\.file' is needed\."):
        chain_of(files, HEAD, paint(tiny_folder, "lora = [{ weight = 2 }]"))
    with pytest.raises(BadChain, match=r"line 9: lora\.0\.weight = inf is not allowed: input should be a finite number"):
        chain_of(files, HEAD, paint(tiny_folder, 'lora = [{ file = "style.safetensors", weight = inf }]'))
    chain = chain_of(files, HEAD, paint(tiny_kandinsky_folder, 'embeddings = { "<toy>" = "toy.safetensors" }'))
    with pytest.raises(
        BadChain, match=r"Stage 'one': embeddings has no effect with \S+: leave it out, or take another model\."
    ):
        plan(chain, Shelf("miniature", device="cpu"))


def test_a_chain_in_python_warns_of_nothing(files: Path, tiny_folder: Path, recwarn: pytest.WarningsRecorder) -> None:
    told = LoraOptions(file=str(files / "style.safetensors"), weight=0.3)
    stage = TextToImage(model=str(tiny_folder), lora=(told,), prompt="a castle", steps=2)
    assert run(Chain(stages=(stage,)), Shelf(device="cpu")).notes == []
    assert not [w for w in recwarn if issubclass(w.category, Note)]
