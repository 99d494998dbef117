"""ControlNets and image prompts in chains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from rich.console import Console
from unrolled.chains.adapters import ControlOptions, ImagePromptOptions
from unrolled.chains.chain import Chain, Cut, Denoising, ImageToImage, Inpaint, TextToImage, Upscale
from unrolled.chains.checks import findings
from unrolled.chains.jobs import text_to_image
from unrolled.chains.plan import plan
from unrolled.chains.read import read_chain
from unrolled.chains.run import resume, run
from unrolled.chains.terminal import stage_table
from unrolled.core.companions import load_controlnet, load_image_adapter
from unrolled.core.control import Control, between, controlled
from unrolled.core.errors import BadChain, BadInput, BadModel
from unrolled.core.guidance import classifier_free
from unrolled.core.image_adapter import image_prompted
from unrolled.core.loading import Shelf
from unrolled.core.loop import denoise
from unrolled.kernels.fast import fast_of
from unrolled.stages.control import with_control
from unrolled.stages.decode import decode
from unrolled.stages.image_prompt import with_image_prompt
from unrolled.stages.noise import noise
from unrolled.stages.text import encode_text


@pytest.fixture
def folder(tmp_path: Path, picture: Image.Image, mask: Image.Image) -> Path:
    """Where a chain lies, with its pictures."""
    picture.save(tmp_path / "picture.png")
    mask.save(tmp_path / "mask.png")
    ImageOps.mirror(picture).save(tmp_path / "edges.png")
    picture.resize((96, 64)).save(tmp_path / "wide.png")
    return tmp_path


@pytest.fixture
def brought(controlnet_folders: dict[str, list[Path]], image_adapter_files: dict[str, Path]) -> dict[str, Any]:
    """Options of a stage, by system."""
    return {
        system: {
            "control": (
                ControlOptions(model=str(one), image="edges.png", scale=0.8, end=0.75),
                ControlOptions(model=str(two), image="wide.png", fit=True, start=0.5),
            ),
            "image_prompt": ImagePromptOptions(adapter=str(image_adapter_files[system]), image="wide.png", scale=0.6),
        }
        for system, (one, two) in controlnet_folders.items()
    }


@pytest.fixture
def stage(tiny_folder: Path, brought: dict[str, Any]) -> TextToImage:
    return TextToImage(model=str(tiny_folder), prompt="a castle", negative_prompt="grey", steps=4, **brought["sd"])


def same(one: Image.Image, other: Image.Image, within: int = 0) -> bool:
    return bool(np.abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int)).max() <= within)


def test_a_chain_is_the_script(stage: TextToImage, folder: Path, brought: dict[str, Any]) -> None:
    (made,) = run(Chain(stages=(stage,), folder=folder), Shelf(device="cpu")).pictures
    shelf = Shelf(device="cpu")
    sd = shelf.load(stage.model)
    schedule, solver = sd.sampling(4)
    edges, wide = (Image.open(folder / name).convert("RGB") for name in ("edges.png", "wide.png"))
    first, second = (load_controlnet(shelf, told.model, sd) for told in stage.control)
    adapter = load_image_adapter(shelf, brought["sd"]["image_prompt"].adapter, sd)
    with image_prompted(sd, adapter, 0.6):
        cond = with_image_prompt(adapter, encode_text(sd, "a castle"), wide)
        uncond = with_image_prompt(adapter, encode_text(sd, "grey"), None)
        fitted = ImageOps.fit(wide, (64, 64), Image.Resampling.LANCZOS)
        cond, uncond = (with_control(sd, c, [edges, fitted]) for c in (cond, uncond))
        acting = [Control(first, between(schedule, 0.8, end=0.75)), Control(second, between(schedule, 1.0, 0.5))]
        denoiser = classifier_free(controlled(sd.denoiser, acting), cond, uncond, 7.5)
        latents = denoise(denoiser, noise(sd, schedule, seeds=[0]), schedule, solver)
    assert same(made, decode(sd, latents)[0])
    (plain,) = run(
        Chain(stages=(stage.model_copy(update={"control": (), "image_prompt": None}),), folder=folder), Shelf(device="cpu")
    ).pictures
    assert not same(made, plain, 8)


@pytest.mark.parametrize("kind", ["image-to-image", "inpaint", "blended inpaint", "sdxl"])
def test_with_every_kind_of_stage(
    kind: str,
    folder: Path,
    tiny_folder: Path,
    tiny_inpaint_folder: Path,
    tiny_sdxl_folder: Path,
    brought: dict[str, Any],
) -> None:
    told: dict[str, Any] = {"prompt": "a castle", "steps": 4}
    more = brought["sdxl" if kind == "sdxl" else "sd"]

    def chain(**more: Any) -> Chain:
        one: Denoising
        if kind == "image-to-image":
            one = ImageToImage(model=str(tiny_folder), image="picture.png", repeat=2, **told, **more)
        elif kind == "sdxl":
            one = TextToImage(model=str(tiny_sdxl_folder), **told, **more)
        else:
            model = tiny_inpaint_folder if kind == "inpaint" else tiny_folder
            one = Inpaint(model=str(model), image="picture.png", mask="mask.png", composite=False, **told, **more)
        return Chain(stages=(one,), folder=folder, batch=2)

    shelf = Shelf(device="cpu")
    with_, without = run(chain(**more), shelf), run(chain(), shelf)
    for ours, plain in zip(with_.pictures, without.pictures, strict=True):
        assert not same(ours, plain, 8)
    alone = run(chain(**more).model_copy(update={"batch": 1, "seed": 1}), shelf)
    assert same(alone.pictures[0], with_.pictures[1], 1)


def test_what_is_written(stage: TextToImage, folder: Path, tmp_path: Path) -> None:
    result = run(Chain(stages=(stage,), folder=folder, grid=True), Shelf(device="cpu"), tmp_path / "out")
    assert list(result.inputs) == ["edges.png", "wide.png"]
    facts = json.loads((tmp_path / "out" / "output_000.json").read_text())
    brought = {key: value for key, value in facts["models"]["text-to-image"].items() if " " in key}
    assert list(brought) == ["control 1", "control 2", "image prompt", "image prompt, encoder"]
    assert len(set(brought.values())) == 4
    assert all(len(digest) == 16 for digest in brought.values())
    assert facts["chain"]["stages"][0]["control"][0]["end"] == 0.75


def test_a_run_is_taken_up_where_it_stopped(stage: TextToImage, folder: Path, tmp_path: Path) -> None:
    chain = Chain(stages=(stage,), folder=folder)
    (whole,) = run(chain, Shelf(device="cpu")).pictures

    def stop(_: Any, step: Any) -> None:
        if step.index == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(chain, Shelf(device="cpu"), tmp_path / "out", stop)
    assert same(resume(tmp_path / "out", Shelf(device="cpu")).pictures[0], whole)


@pytest.mark.parametrize("fails", [False, True])
def test_the_network_is_as_it_was_for_the_next_stage(fails: bool, stage: TextToImage, folder: Path) -> None:
    shelf = Shelf(device="cpu")
    plain = stage.model_copy(update={"name": "plain", "control": (), "image_prompt": None})
    (alone,) = run(Chain(stages=(plain,)), shelf).pictures
    unet = shelf.load(stage.model).unet
    before = dict(unet.attn_processors)

    def watch(*_: Any) -> None:
        if fails:
            raise KeyboardInterrupt

    chain = Chain(stages=(stage, plain.model_copy(update={"after": None})), folder=folder, seed=0)
    if fails:
        with pytest.raises(KeyboardInterrupt):
            run(chain, shelf, watch=watch)
    else:
        run(chain, shelf, watch=watch)
    assert all(unet.attn_processors[name] is processor for name, processor in before.items())
    assert same(run(Chain(stages=(plain,)), shelf).pictures[0], alone)


def test_they_stay_as_long_as_a_stage_needs_them(stage: TextToImage, folder: Path) -> None:
    again = ImageToImage(model=stage.model, prompt="a castle", steps=3, name="again", control=stage.control[:1])
    after = again.model_copy(update={"name": "after", "control": ()})
    shelf, seen = Shelf(device="cpu"), dict[str, dict[tuple[str, str], int]]()

    def watch(stage: Any, _: Any) -> None:
        held = shelf._components.items()
        seen[stage.name] = {key: id(part) for key, part in held if key[0] in ("controlnet", "image_encoder")}

    run(Chain(stages=(stage, again, after), folder=folder), shelf, watch=watch, free=True)
    assert [len(held) for held in seen.values()] == [3, 1, 0]
    assert seen["again"].items() <= seen["text-to-image"].items()


@pytest.mark.parametrize("kind", ["control", "image_prompt"])
def test_with_optimised_networks(kind: str, stage: TextToImage, folder: Path) -> None:
    """A ControlNet is made fast too; layers with an IP-Adapter on run as diffusers wrote them, which is said."""
    other = {"control": ("image_prompt", None), "image_prompt": ("control", ())}[kind]
    chain = Chain(stages=(stage.model_copy(update=dict([other])),), folder=folder, batch=2)
    plain, shelf = run(chain, Shelf(device="cpu")), Shelf(device="cpu", fast=True)
    fast = run(chain, shelf)
    for ours, theirs in zip(fast.pictures, plain.pictures, strict=True):
        assert same(ours, theirs, 1)
    said = [note for note in fast.notes if "not fused, because its attention processor is a IPAdapter" in note]
    assert len(said) == (kind == "image_prompt")
    assert fast_of(shelf.load(stage.model).unet) is not None
    if kind == "control":
        assert fast_of(load_controlnet(shelf, stage.control[0].model, shelf.load(stage.model))) is not None


def test_a_stop_does_not_move_where_they_act(stage: TextToImage, folder: Path) -> None:
    """Half of the whole run's steps, although the first stage runs three of its four."""
    told = {"control": (stage.control[0].model_copy(update={"end": 0.5}),), "image_prompt": None}
    first = stage.model_copy(update={**told, "stop": Cut(step=3), "name": "first"})
    rest = ImageToImage(model=stage.model, prompt="a castle", negative_prompt="grey", steps=4, start="handoff", name="rest")
    ends = list[torch.Tensor]()

    def watch(_: Any, step: Any) -> None:
        ends.append(step.x)

    run(Chain(stages=(first, rest), folder=folder), Shelf(device="cpu"), watch=watch)
    run(Chain(stages=(stage.model_copy(update=told),), folder=folder), Shelf(device="cpu"), watch=watch)
    for cut, whole in zip(ends[:4], ends[4:], strict=True):
        assert torch.equal(cut, whole)


# --- the plan


def test_the_plan_shows_them(stage: TextToImage, folder: Path) -> None:
    (planned,) = plan(Chain(stages=(stage,), folder=folder), Shelf(device="cpu"))
    console = Console(width=300)
    with console.capture() as shown:
        console.print(stage_table([planned]))
    for line in ("edges.png by sd-0, 0.8, 0% to 75%", "wide.png by sd-1, 1, 50% to 100%", "wide.png by ip-adapter, 0.6"):
        assert line in shown.get()
    alone = stage.model_copy(update={"control": (), "image_prompt": None})
    (without,) = plan(Chain(stages=(alone,), folder=folder), Shelf(device="cpu"))
    weights = sum(file.stat().st_size for told in stage.control for file in Path(told.model).glob("*.safetensors"))
    assert planned.memory is not None
    assert without.memory is not None
    assert planned.memory - without.memory > weights


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"image": "wide.png"},
            r"the control picture wide\.png is 96x64 but 64x64 is painted: .* say fit = true in control",
        ),
        ({"image": "gone.png"}, r"There is no picture at .*gone\.png"),
        ({"model": "nowhere"}, r"There is no controlnet nowhere: give a folder with its config\.json"),
        ({"model": "SDXL"}, r"-0 was made for a UNet whose cross_attention_dim is 80, and this one's is 32"),
        ({"model": "UNET"}, r"unet holds UNet2DConditionModel where controlnet must be ControlNetModel"),
    ],
)
def test_controls_that_are_refused_before_anything_runs(
    change: dict[str, str], message: str, stage: TextToImage, folder: Path, controlnet_folders: dict[str, list[Path]]
) -> None:
    paths = {"SDXL": str(controlnet_folders["sdxl"][0]), "UNET": f"{stage.model}/unet"}
    change = {key: paths.get(value, value) for key, value in change.items()}
    wrong = stage.model_copy(update={"control": (stage.control[0].model_copy(update=change),)})
    with pytest.raises((BadChain, BadModel), match=rf"Stage 'text-to-image': .*{message}"):
        plan(Chain(stages=(wrong,), folder=folder), Shelf(device="cpu"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": "gone.png"}, r"There is no picture at .*gone\.png"),
        ({"adapter": "gone.safetensors"}, r"There is no file gone\.safetensors"),
        ({"adapter": "SDXL"}, r"made for a UNet told text of width 80, and that of .* is told 32"),
        ({"image_encoder": "nowhere"}, r"There is no image encoder nowhere"),
    ],
)
def test_image_prompts_that_are_refused_before_anything_runs(
    change: dict[str, str], message: str, stage: TextToImage, folder: Path, image_adapter_files: dict[str, Path]
) -> None:
    change = {key: str(image_adapter_files["sdxl"]) if value == "SDXL" else value for key, value in change.items()}
    assert stage.image_prompt is not None
    wrong = stage.model_copy(update={"image_prompt": stage.image_prompt.model_copy(update=change)})
    with pytest.raises((BadChain, BadModel), match=rf"Stage 'text-to-image': .*{message}"):
        plan(Chain(stages=(wrong,), folder=folder), Shelf(device="cpu"))


@pytest.mark.parametrize("option", ["control", "image_prompt"])
def test_systems_that_take_none(
    option: str, folder: Path, tiny_kandinsky_folder: Path, tiny_x4_folder: Path, brought: dict[str, Any]
) -> None:
    more = {option: brought["sd"][option]}
    for stage in (
        TextToImage(model=str(tiny_kandinsky_folder), **more),
        Upscale(model=str(tiny_x4_folder), image="picture.png", **more),
    ):
        with pytest.raises(BadChain, match=rf"{option} has no effect with .*: leave it out, or take another model\."):
            plan(Chain(stages=(stage,), folder=folder), Shelf(device="cpu"))


def test_pictures_given_from_outside_lie_where_one_is(
    tiny_folder: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    (folder / "deep").mkdir()
    (folder / "deep" / "chain.toml").write_text(f'[[stage]]\ndo = "text-to-image"\nmodel = "{tiny_folder}"\n')
    Image.new("RGB", (8, 8)).save(folder / "here.png")
    told = ['control=[{model="net", image="here.png"}]', 'image_prompt={adapter="gone", image="here.png"}']
    stage: Any = read_chain("deep/chain.toml", told).stages[0]
    assert stage.control[0].image == stage.image_prompt.image == str(folder / "here.png")


def test_files_lie_beside_the_chain(
    folder: Path, tiny_folder: Path, controlnet_folders: dict[str, list[Path]], image_adapter_files: dict[str, Path]
) -> None:
    (folder / "edges").symlink_to(controlnet_folders["sd"][0])
    (folder / "adapters").symlink_to(image_adapter_files["sd"].parent)
    (folder / "mine.toml").write_text(
        f"""
        model = "{tiny_folder}"
        [[stage]]
        do = "text-to-image"
        control = [{{ model = "edges", image = "edges.png", scale = 0.5 }}]
        image_prompt = {{ adapter = "adapters/{image_adapter_files["sd"].name}", image = "wide.png" }}
        """
    )
    (planned,) = plan(read_chain(folder / "mine.toml"), Shelf(device="cpu"))
    assert planned.companions.controlnets[0].folder == folder / "edges"
    assert planned.companions.image_adapter is not None
    assert planned.companions.image_adapter.image_encoder.folder == folder / "adapters" / "image_encoder"


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ('model = "a", image = "b.png", guess_mode = true', r"line 4: unknown key 'guess_mode'"),
        ('model = "a"', r"line 4: the key 'control\.0\.image' is needed"),
        ('model = "a", image = "b.png", start = 0.6, end = 0.5', r"line 4: .* to a later one, not 0\.6 to 0\.5"),
        ('model = "a", image = "b.png", end = 1.5', r"line 4: control\.0\.end = 1\.5 is not allowed"),
    ],
)
def test_tables_that_make_no_sense(table: str, message: str, folder: Path) -> None:
    (folder / "mine.toml").write_text(f'prompt = "a"\n[[stage]]\ndo = "text-to-image"\ncontrol = [{{ {table} }}]\n')
    with pytest.raises(BadChain, match=message):
        read_chain(folder / "mine.toml")


def test_what_has_no_effect_is_said(stage: TextToImage, folder: Path) -> None:
    short = stage.control[0].model_copy(update={"start": 0.3, "end": 0.4})
    assert stage.image_prompt is not None
    silent = stage.image_prompt.model_copy(update={"scale": 0.0})
    chain = Chain(stages=(stage.model_copy(update={"control": (short,), "image_prompt": silent}),), folder=folder)
    said = [found.sentence for found in findings(chain, plan(chain, Shelf(device="cpu")))]
    assert any("acts in none of the 4 steps that are run; leave it out." in sentence for sentence in said)
    assert any("at scale 0 it adds nothing; leave it out." in sentence for sentence in said)
    chain = Chain(stages=(stage,), folder=folder)
    assert not [found for found in findings(chain, plan(chain, Shelf(device="cpu"))) if "no effect" in found.sentence]


def test_a_job_by_hand_needs_them(stage: TextToImage, folder: Path) -> None:
    model = Shelf(device="cpu").load(stage.model)
    with pytest.raises(BadInput, match=r"the stage has ControlNets or an image prompt that are not loaded"):
        text_to_image(model, stage, [0])
    assert torch.is_grad_enabled()
