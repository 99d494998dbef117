"""ControlNets and IP-Adapters found and loaded: folders, single files, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import unrolled
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from unrolled.core.companions import find_controlnet, find_image_adapter, load_controlnet, load_image_adapter
from unrolled.core.denoiser import IMAGE_PROMPTED, UNetDenoiser
from unrolled.core.errors import BadInput, BadModel
from unrolled.core.image_adapter import ImageAdapter, image_prompted
from unrolled.core.loading import Model, Shelf
from unrolled.core.memory import Offload
from unrolled.stages.image_prompt import with_image_prompt
from unrolled.stages.text import encode_text


@pytest.fixture
def shelf() -> Shelf:
    return Shelf(device="cpu")


@pytest.fixture
def folder(controlnet_folders: dict[str, list[Path]]) -> Path:
    return controlnet_folders["sd"][0]


@pytest.fixture(scope="session")
def adapter(tiny: Model, image_adapter_files: dict[str, Path]) -> ImageAdapter:
    return load_image_adapter(Shelf(device="cpu"), str(image_adapter_files["sd"]), tiny)


def same(a: Any, b: Any) -> bool:
    mine, theirs = a.state_dict(), b.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


# --- ControlNets


def test_a_controlnet_is_loaded_once(shelf: Shelf, folder: Path, tiny: Model) -> None:
    network = load_controlnet(shelf, str(folder), tiny)
    assert type(network).__name__ == "ControlNetModel"
    assert not network.training
    assert load_controlnet(shelf, str(folder), tiny) is network
    assert shelf.keep(str(tiny.name), find_controlnet(str(folder), shelf.find(tiny.name))) == 0
    assert load_controlnet(shelf, str(folder), tiny) is network
    del network
    assert shelf.keep(str(tiny.name)) > 100_000


def test_from_a_folder_of_models(tiny: Model, folder: Path) -> None:
    shelf = Shelf(str(folder.parent), device="cpu")
    assert find_controlnet(folder.name, shelf.find(tiny.name), shelf.models).folder == folder


@pytest.mark.parametrize("original", [False, True])
def test_from_one_file(original: bool, shelf: Shelf, folder: Path, tiny: Model, tmp_path: Path) -> None:
    """Which has no config: it is that of the UNet."""
    file = tmp_path / "edges.safetensors"
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    save_file(as_first_published(weights) if original else weights, file)
    assert same(load_controlnet(shelf, str(file), tiny), load_controlnet(shelf, str(folder), tiny))


def as_first_published(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A ControlNet of two levels of one block under the names of ControlNet's first authors."""
    names = {
        "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2", "conv_in": "input_blocks.0.0",
        "controlnet_cond_embedding.conv_in": "input_hint_block.0",
        "controlnet_cond_embedding.conv_out": "input_hint_block.14",
        "down_blocks.0.resnets.0": "input_blocks.1.0", "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
        "down_blocks.1.resnets.0": "input_blocks.3.0", "down_blocks.1.attentions.0": "input_blocks.3.1",
        "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2", "controlnet_mid_block": "middle_block_out.0",
        **{f"controlnet_down_blocks.{i}": f"zero_convs.{i}.0" for i in range(4)},
        **{f"controlnet_cond_embedding.blocks.{i}": f"input_hint_block.{2 + 2 * i}" for i in range(6)},
    }  # fmt: skip
    inside = {
        "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
        "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
    }  # fmt: skip

    def renamed(name: str) -> str:
        prefix = max((theirs for theirs in names if name.startswith(f"{theirs}.")), key=len)
        rest = name.removeprefix(f"{prefix}.")
        if ".resnets." in prefix:
            first, _, last = rest.partition(".")
            rest = f"{inside[first]}.{last}"
        return f"control_model.{names[prefix]}.{rest}"

    return {renamed(name): weight for name, weight in weights.items()}


def test_there_is_none(shelf: Shelf, tiny: Model, tmp_path: Path) -> None:
    with pytest.raises(
        BadModel, match=r"There is no controlnet .*nowhere: give a folder with its config\.json, or a hub id"
    ):
        load_controlnet(shelf, str(tmp_path / "nowhere"), tiny)
    with pytest.raises(BadModel, match=r"There is no file .*nowhere\.safetensors"):
        load_controlnet(shelf, str(tmp_path / "nowhere.safetensors"), tiny)


def test_something_else(shelf: Shelf, tiny: Model, tiny_folder: Path, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BadModel, match=r"unet holds UNet2DConditionModel where controlnet must be ControlNetModel\."):
        load_controlnet(shelf, str(tiny_folder / "unet"), tiny)
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    save_file({name: w for name, w in weights.items() if "mid_block" not in name}, tmp_path / "part.safetensors")
    with pytest.raises(BadModel, match=r"part\.safetensors does not fit .*mid_block"):
        load_controlnet(shelf, str(tmp_path / "part.safetensors"), tiny)
    save_file({"lora.down": torch.zeros(1)}, tmp_path / "lora.safetensors")
    with pytest.raises(BadModel, match=r"lora\.safetensors is no ControlNet: .* is missing"):
        load_controlnet(shelf, str(tmp_path / "lora.safetensors"), tiny)


def test_a_pickle_is_refused(shelf: Shelf, tiny: Model, tmp_path: Path) -> None:
    (tmp_path / "edges.ckpt").write_bytes(b"")
    with pytest.raises(BadModel, match=r"edges\.ckpt is pickled, which can run code"):
        load_controlnet(shelf, str(tmp_path / "edges.ckpt"), tiny)


# --- IP-Adapters


@pytest.mark.parametrize("fails", [False, True])
def test_the_unet_is_as_it_was_afterwards(fails: bool, tiny: Model, adapter: ImageAdapter) -> None:
    before, weights, config = dict(tiny.unet.attn_processors), set(tiny.unet.state_dict()), dict(tiny.unet.config)
    attributes = {name: set(vars(module)) for name, module in tiny.unet.named_modules()}
    try:
        with image_prompted(tiny, adapter, 0.5):
            assert UNetDenoiser(tiny.unet).takes == {"context", "image_tokens"}
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    after = tiny.unet.attn_processors
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)
    assert set(tiny.unet.state_dict()) == weights
    assert dict(tiny.unet.config) == config
    assert {name: set(vars(module)) for name, module in tiny.unet.named_modules()} == attributes
    assert UNetDenoiser(tiny.unet).takes == {"context"}


def test_at_scale_zero_it_adds_nothing(tiny: Model, adapter: ImageAdapter, picture: Image.Image) -> None:
    cond, x = encode_text(tiny, "a castle"), torch.randn(1, 4, 8, 8)
    shown = with_image_prompt(adapter, cond, picture)
    with image_prompted(tiny, adapter, 0.0):
        silent = tiny.denoiser(x, 2.0, 300.0, shown).out
    with image_prompted(tiny, adapter, 1.0):
        loud = tiny.denoiser(x, 2.0, 300.0, shown).out
    torch.testing.assert_close(silent, tiny.denoiser(x, 2.0, 300.0, cond).out)
    assert not torch.allclose(silent, loud, atol=0.01)


def test_a_picture_for_each_image(tiny: Model, adapter: ImageAdapter, picture: Image.Image) -> None:
    cond, other = encode_text(tiny, "a castle"), picture.rotate(90)
    both = with_image_prompt(adapter, cond, [picture, other])
    assert repr(both) == "Conditioning(context=2x77x32, image_tokens=2x1x4x32)"
    alone = with_image_prompt(adapter, cond, other).image_tokens
    assert both.image_tokens is not None
    assert alone is not None
    torch.testing.assert_close(both.image_tokens[1:], alone)


def test_pictures_that_do_not_go_together(tiny: Model, adapter: ImageAdapter, picture: Image.Image) -> None:
    with pytest.raises(BadInput, match=r"image_tokens=3x1x4x32\) cannot condition 3 images"):
        with_image_prompt(adapter, encode_text(tiny, ["a castle", "a boat"]), [picture] * 3)
    with pytest.raises(BadInput, match=r"needs at least one picture; None is no picture at all"):
        with_image_prompt(adapter, encode_text(tiny, "a castle"), [])


def test_tokens_and_adapter_need_each_other(tiny: Model, adapter: ImageAdapter, picture: Image.Image) -> None:
    cond, x = encode_text(tiny, "a castle"), torch.randn(1, 4, 8, 8)
    with pytest.raises(BadInput, match=r"conditioned by context, it cannot take image_tokens"):
        tiny.denoiser(x, 2.0, 300.0, with_image_prompt(adapter, cond, picture))
    with image_prompted(tiny, adapter), pytest.raises(BadInput, match=r"image_tokens is missing: .*with_image_prompt"):
        tiny.denoiser(x, 2.0, 300.0, cond)


def test_one_at_a_time(tiny: Model, adapter: ImageAdapter) -> None:
    refused = pytest.raises(BadInput, match=r"has an IP-Adapter on already, and takes one at a time")
    with image_prompted(tiny, adapter), refused, image_prompted(tiny, adapter):
        pass
    assert not hasattr(tiny.unet, IMAGE_PROMPTED)


def test_offloading(tiny_folder: Path, image_adapter_files: dict[str, Path], picture: Image.Image) -> None:
    results = []
    ways: list[Offload] = ["resident", "model"]
    for offload in ways:
        shelf = Shelf(device="cpu", offload=offload)
        model = shelf.load(str(tiny_folder))
        adapter = load_image_adapter(shelf, str(image_adapter_files["sd-plus"]), model)
        shown = with_image_prompt(adapter, encode_text(model, "a castle"), picture)
        with image_prompted(model, adapter):
            results.append(model.denoiser(torch.ones(1, 4, 8, 8), 2.0, 300.0, shown).out)
    torch.testing.assert_close(*results)


def test_layer_by_layer_there_is_no_room(tiny_folder: Path, adapter: ImageAdapter) -> None:
    model = Shelf(device="cpu", offload="layer").load(str(tiny_folder))
    refused = pytest.raises(BadInput, match=r"offloaded layer by layer, which leaves no room for image prompts")
    with refused, image_prompted(model, adapter):
        pass


def test_models_that_take_none(tiny_kandinsky: Model, image_adapter_files: dict[str, Path], shelf: Shelf) -> None:
    with pytest.raises(BadInput, match=r"Image prompts go with Stable Diffusion and SDXL, and .* is neither"):
        load_image_adapter(shelf, str(image_adapter_files["sd"]), tiny_kandinsky)


def test_an_adapter_for_another_unet(
    tiny: Model, image_adapter_files: dict[str, Path], shelf: Shelf, tmp_path: Path
) -> None:
    with pytest.raises(BadModel, match=r"made for a UNet told text of width 80, and that of .* is told 32"):
        load_image_adapter(shelf, str(image_adapter_files["sdxl"]), tiny)
    shutil.copytree(image_adapter_files["sd"].parent, tmp_path / "short")
    file = tmp_path / "short" / image_adapter_files["sd"].name
    save_file({name: w for name, w in load_file(file).items() if not name.startswith("ip_adapter.7")}, file)
    with pytest.raises(BadModel, match=r"does not fit the UNet of .*7\.to_k_ip.*take the IP-Adapter for it"):
        load_image_adapter(shelf, str(file), tiny)


def test_face_id_and_other_files(tiny: Model, image_adapter_files: dict[str, Path], shelf: Shelf, tmp_path: Path) -> None:
    file = tmp_path / "face.safetensors"
    encoder = str(image_adapter_files["sd"].parent / "image_encoder")
    face = {"image_proj.norm.weight": torch.zeros(32), "image_proj.proj.0.weight": torch.zeros(8, 8)}
    layers = {name: w for name, w in load_file(image_adapter_files["sd"]).items() if name.startswith("ip_adapter")}
    for weights in (face | layers, {"lora.down": torch.zeros(1)}):
        save_file(weights, file)
        with pytest.raises(BadModel, match=r"face\.safetensors is no IP-Adapter that is run: .* of Face ID are not"):
            load_image_adapter(shelf, str(file), tiny, encoder)


def test_there_is_no_image_encoder(tiny: Model, image_adapter_files: dict[str, Path], shelf: Shelf, tmp_path: Path) -> None:
    file = shutil.copy(image_adapter_files["sd"], tmp_path)
    with pytest.raises(BadModel, match=r"There is no image encoder .*image_encoder: give a folder with its config\.json"):
        load_image_adapter(shelf, str(file), tiny)
    (tmp_path / "image_encoder").mkdir()
    (tmp_path / "image_encoder" / "config.json").write_text(json.dumps({"architectures": ["CLIPVisionModel"]}))
    (tmp_path / "image_encoder" / "model.safetensors").touch()
    save_file({"a": torch.zeros(1)}, tmp_path / "image_encoder" / "model.safetensors")
    with pytest.raises(BadModel, match=r"holds CLIPVisionModel where image_encoder must be CLIPVisionModelWithProjection"):
        load_image_adapter(shelf, str(file), tiny)


def test_in_half_precision(tiny_folder: Path, image_adapter_files: dict[str, Path], picture: Image.Image) -> None:
    shelf = Shelf(device="cpu", dtype=torch.bfloat16)
    model = shelf.load(str(tiny_folder))
    adapter = load_image_adapter(shelf, str(image_adapter_files["sd-plus"]), model)
    shown = with_image_prompt(adapter, encode_text(model, "a castle"), picture)
    with image_prompted(model, adapter):
        assert bool(model.denoiser(torch.ones(1, 4, 8, 8), 2.0, 300.0, shown).out.isfinite().all())
    assert isinstance(adapter.projection, nn.Module)
    assert next(adapter.projection.parameters()).dtype == torch.bfloat16


# --- the hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """A hub that has everything; the list holds what it was asked for."""
    asked: list[Any] = []

    def snapshot_download(repository: str, *, revision: Any, allow_patterns: list[str], ignore_patterns: Any) -> str:
        asked.append((repository, revision, allow_patterns, ignore_patterns))
        return str(tmp_path)

    def hf_hub_download(repository: str, name: str, *, revision: Any) -> str:
        asked.append((repository, revision, name))
        return str(tmp_path / name)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", hf_hub_download)
    return asked


def test_of_the_hub_only_what_is_read_is_fetched(hub: list[Any], tiny: Model, shelf: Shelf, tmp_path: Path) -> None:
    source = shelf.find(tiny.name)
    part = find_controlnet("lllyasviel/sd-controlnet-canny", source, "hub", revision="main", weights=False)
    assert (part.name, part.folder) == ("controlnet", tmp_path)
    assert find_controlnet("lllyasviel/sd-controlnet-canny", source, "hub", "fp16").variant == "fp16"
    found = find_image_adapter("h94/IP-Adapter/models/ip-adapter_sd15.safetensors", models="hub")
    assert found.file == tmp_path / "models" / "ip-adapter_sd15.safetensors"
    assert found.image_encoder.folder == tmp_path / "models" / "image_encoder"
    skipped, folder = ["*.fp16.*", "*.fp16-*"], "models/image_encoder"
    assert hub == [
        ("lllyasviel/sd-controlnet-canny", "main", ["config.json"], skipped),
        ("lllyasviel/sd-controlnet-canny", None, ["config.json", "*.fp16*safetensors"], None),
        ("h94/IP-Adapter", None, "models/ip-adapter_sd15.safetensors"),
        ("h94/IP-Adapter", None, [f"{folder}/config.json", f"{folder}/*.safetensors"], skipped),
    ]


def test_the_pages_examples_run(
    tiny_folder: Path,
    controlnet_folders: dict[str, list[Path]],
    image_adapter_files: dict[str, Path],
    picture: Image.Image,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = (Path(unrolled.__file__).parent / "docs" / "adapters.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    control, prompt = (block for block in blocks if "load_controlnet" in block or "load_image_adapter" in block)
    for file in ("edges.png", "style.png"):
        picture.save(tmp_path / file)
    monkeypatch.chdir(tmp_path)
    for name, here in {
        '"hub"': 'device="cpu"',
        "sd-1.5": str(tiny_folder),
        "lllyasviel/sd-controlnet-canny": str(controlnet_folders["sd"][0]),
        "h94/IP-Adapter/models/ip-adapter_sd15.safetensors": str(image_adapter_files["sd"]),
        "steps=20": "steps=3",
    }.items():
        control, prompt = control.replace(name, here), prompt.replace(name, here)
    names: dict[str, Any] = {}
    exec(control, names)
    controlled = names["latents"].x
    exec(prompt, names)
    assert controlled.shape == names["latents"].x.shape == (1, 4, 8, 8)
