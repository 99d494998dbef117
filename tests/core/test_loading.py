import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from unrolled.core import source
from unrolled.core.catalog import CATALOG, MOVED
from unrolled.core.checkpoint import fingerprint
from unrolled.core.errors import BadInput, BadModel, Note
from unrolled.core.loading import Model, Shelf, load, require_known_device
from unrolled.core.source import MINIATURES, find
from unrolled.core.weights import Part
from unrolled.schedulers.config import read_scheduler


def weights(folder: Path, component: str) -> Path:
    return next((folder / component).glob("*.safetensors"))


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(path: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, {"format": "pt"})


def copy(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))


# --- what loads


def test_a_folder_loads(tiny: Model, tiny_folder: Path) -> None:
    assert repr(tiny) == f"Model({tiny_folder}, cpu float32, space=[{tiny.space}], 64 px)"
    assert (tiny.space.family, tiny.space.channels, tiny.space.downscale, tiny.space.scaling) == (
        "AutoencoderKL",
        4,
        8,
        0.18215,
    )
    assert (tiny.native_size, tiny.inpaints, read_scheduler(tiny.scheduler).kind) == (64, False, "epsilon")
    assert set(tiny.fingerprints) == {"tokenizer", "text_encoder", "unet", "vae"}
    for part in (tiny.text_encoder, tiny.unet, tiny.vae):
        assert not part.training
        assert not any(p.requires_grad for p in part.parameters())


def test_the_weights_are_those_of_the_files(tiny: Model, tiny_folder: Path) -> None:
    for component in ("text_encoder", "unet", "vae"):
        theirs, ours = load_file(weights(tiny_folder, component)), getattr(tiny, component).state_dict()
        assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_sizes_are_read_without_weights(tiny_folder: Path, tiny_inpaint: Model) -> None:
    assert find(str(tiny_folder)).sizes() == (64, 8)
    assert tiny_inpaint.inpaints


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtype(tiny_folder: Path, dtype: torch.dtype) -> None:
    model = load(str(tiny_folder), device="cpu", dtype=dtype)
    assert {model.unet.dtype, model.vae.dtype, model.text_encoder.dtype, model.dtype} == {dtype}


def test_equal_weights_load_once_on_one_shelf(tiny_folder: Path, tiny_inpaint_folder: Path) -> None:
    shelf = Shelf(device="cpu")
    a, b, c = shelf.load(str(tiny_folder)), shelf.load(str(tiny_inpaint_folder)), shelf.load(str(tiny_folder))
    assert a.text_encoder is b.text_encoder
    assert a.tokenizer is b.tokenizer
    assert a.unet is not b.unet
    assert a.unet is c.unet
    assert Shelf(device="cpu").load(str(tiny_folder)).unet is not a.unet


def test_equal_weights_of_another_config_are_loaded_apart(broken: Path, tiny_folder: Path) -> None:
    edit_json(broken / "vae" / "config.json", scaling_factor=0.13)
    shelf = Shelf(device="cpu")
    a, b = shelf.load(str(tiny_folder)), shelf.load(str(broken))
    assert (a.vae.config.scaling_factor, b.vae.config.scaling_factor) == (0.18215, 0.13)
    assert a.space != b.space


def test_other_weights_are_loaded_apart(broken: Path, tiny_folder: Path) -> None:
    edit_weights(weights(broken, "unet"), lambda t: t["conv_in.bias"].add_(1))
    shelf = Shelf(device="cpu")
    a, b = shelf.load(str(tiny_folder)), shelf.load(str(broken))
    assert a.vae is b.vae
    assert torch.equal(a.unet.conv_in.bias + 1, b.unet.conv_in.bias)


# --- latent spaces


def test_an_equal_vae_is_one_space(tiny: Model, broken: Path) -> None:
    assert load(str(broken), device="cpu").space == tiny.space


@pytest.mark.parametrize(("tensor", "same"), [("encoder.conv_in.weight", False), ("decoder.conv_in.weight", True)])
def test_the_encoder_defines_the_space(tiny: Model, broken: Path, tensor: str, same: bool) -> None:
    edit_weights(weights(broken, "vae"), lambda t: t[tensor].mul_(1.5))
    assert (load(str(broken), device="cpu").space == tiny.space) is same


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_half_precision_copy_is_the_same_space(tiny: Model, broken: Path, dtype: torch.dtype) -> None:
    AutoencoderKL.from_pretrained(broken / "vae").half().save_pretrained(broken / "vae")
    model = load(str(broken), device="cpu", dtype=dtype)
    assert model.space == tiny.space
    assert model.fingerprints["vae"] != tiny.fingerprints["vae"]


def test_shards_load_and_are_the_same_space(tiny: Model, broken: Path) -> None:
    for name, kind, size in [("unet", UNet2DConditionModel, "300KB"), ("vae", AutoencoderKL, "40KB")]:
        part = kind.from_pretrained(broken / name)
        weights(broken, name).unlink()
        part.save_pretrained(broken / name, max_shard_size=size)
        assert len(list((broken / name).glob("*-of-*.safetensors"))) > 1
    model = load(str(broken), device="cpu")
    for component in ("unet", "vae"):
        theirs = getattr(tiny, component).state_dict()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in getattr(model, component).state_dict().items())
    assert model.space == tiny.space


def test_a_missing_shard_is_named(broken: Path) -> None:
    unet = UNet2DConditionModel.from_pretrained(broken / "unet")
    weights(broken, "unet").unlink()
    unet.save_pretrained(broken / "unet", max_shard_size="300KB")
    gone = sorted((broken / "unet").glob("*-of-*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(BadModel, match=rf"{gone.name} is missing"):
        load(str(broken), device="cpu")


# --- variants


@pytest.fixture
def two_variants(broken: Path) -> Path:
    """The checkpoint with an fp16 variant whose UNet bias says which it is."""
    for component in ("text_encoder", "unet", "vae"):
        plain = weights(broken, component)
        tensors = {name: t.half() if t.is_floating_point() else t for name, t in load_file(plain).items()}
        if component == "unet":
            tensors["conv_in.bias"] += 1
        save_file(tensors, plain.with_name(plain.name.replace(".safe", ".fp16.safe")), {"format": "pt"})
    return broken


def test_a_variant_picks_its_file(two_variants: Path, tiny: Model) -> None:
    plain, half = (load(str(two_variants), device="cpu", variant=v) for v in (None, "fp16"))
    torch.testing.assert_close(plain.unet.conv_in.bias, tiny.unet.conv_in.bias, atol=0, rtol=0)
    torch.testing.assert_close(half.unet.conv_in.bias, tiny.unet.conv_in.bias + 1, atol=1e-2, rtol=0)
    assert half.fingerprints["unet"] != plain.fingerprints["unet"]
    assert half.space == plain.space


def test_a_variant_that_is_not_there(tiny_folder: Path) -> None:
    message = r'text_encoder has no safetensors weights of variant "fp16" \(found: model\.safetensors\)\.'
    with pytest.raises(BadModel, match=message):
        load(str(tiny_folder), device="cpu", variant="fp16")


def test_only_a_variant_is_there(two_variants: Path) -> None:
    weights(two_variants, "unet").with_name("diffusion_pytorch_model.safetensors").unlink()
    message = r"unet has no safetensors weights \(found: diffusion_pytorch_model\.fp16\.safetensors\)\."
    with pytest.raises(BadModel, match=message):
        load(str(two_variants), device="cpu")


# --- finding


def test_every_catalog_name_has_a_hub_id_and_a_miniature() -> None:
    for name, entry in CATALOG.items():
        assert entry.hub.count("/") == 1
        assert entry.about
        found = find(name)
        assert entry.borrows.keys() <= set(found.parts)
        for part in (*found.parts, "scheduler"):
            assert found.folders[part] == MINIATURES / entry.borrows.get(part, f"{name}/{part}")
            assert any(found.folders[part].iterdir())


@pytest.mark.parametrize(("old", "new"), MOVED.items())
def test_gone_hub_ids_lead_to_where_their_models_went(monkeypatch: pytest.MonkeyPatch, old: str, new: str) -> None:
    asked = []

    def download(repository: str, variant: str | None, revision: str | None, *more: object) -> Path:
        asked.append((repository, variant, revision))
        return Path("somewhere")

    monkeypatch.setattr(source, "download_folder", download)
    with pytest.warns(Note, match=f"{old} is gone from the hub; it has moved to {new}"):
        assert find(old, "hub", "fp16", "main").folders["unet"] == Path("somewhere/unet")
    assert asked == [(new, "fp16", "main")]
    assert new in {entry.hub for entry in CATALOG.values()}


@pytest.mark.parametrize("place", ["sd-1.5", "stable-diffusion-v1-5/stable-diffusion-v1-5", "."])
def test_models_in_a_folder(tiny_folder: Path, tmp_path: Path, place: str) -> None:
    target = tmp_path / "models" / place
    copy(tiny_folder, target)
    assert find("sd-1.5", str(tmp_path / "models")).folders["index"] == target
    assert load("sd-1.5", models=str(tmp_path / "models"), device="cpu").name == "sd-1.5"


@pytest.mark.parametrize("name", ["mine", "me/mine"])
def test_models_of_ones_own_in_a_folder(tiny_folder: Path, tmp_path: Path, name: str) -> None:
    target = copy(tiny_folder, tmp_path / "models" / name)
    assert find(name, str(tmp_path / "models")).folders["index"] == target


def test_a_hub_id_of_the_catalog_is_found_in_the_folder_too(tiny_folder: Path, tmp_path: Path) -> None:
    hub = CATALOG["sd-1.5"].hub
    assert find(hub, str(copy(tiny_folder, tmp_path / hub).parent.parent)).folders["index"] == tmp_path / hub


def test_a_folder_without_the_model(tmp_path: Path) -> None:
    message = (
        r"holds no model folder sd-1\.5 or stable-diffusion-v1-5/stable-diffusion-v1-5: put one there or use --models min"
    )
    with pytest.raises(BadModel, match=message):
        find("sd-1.5", str(tmp_path))


def test_an_unknown_name() -> None:
    with pytest.raises(BadModel, match=r"There is no model 'sd-9': use a folder, a hub id, or one of sd-1\.5, sd-1\.5-inp"):
        find("sd-9")


def test_the_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(BadModel) as caught:
        find("nobody/nothing-at-all", "hub")
    message = str(caught.value)
    assert message.startswith("nobody/nothing-at-all could not be fetched from the hub (")
    assert message.endswith("check the name and the network, or give a folder with --models FOLDER.")
    assert "\n" not in message


def test_a_device_that_is_not_there() -> None:
    require_known_device("cpu")
    with pytest.raises(BadInput, match=r"Device 'warp' cannot be used here \(.*\): use cpu or see unrolled doctor\."):
        require_known_device("warp")


# --- damage: what is done to a good folder, and what is said about it


def remove(*names: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        for name in names:
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return damage


def text(name: str, content: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(content)


def config(name: str, **changes: object) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / name, **changes)


def truncated(component: str, keep: int) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = weights(folder, component)
        path.write_bytes(path.read_bytes()[:keep])

    return damage


def tensors(component: str, edit: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    return lambda folder: edit_weights(weights(folder, component), edit)


def pickled(component: str, name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = weights(folder, component)
        torch.save(load_file(path), path.with_name(name))
        path.unlink()

    return damage


UNFIT = r"cannot be loaded: its config\.json does not fit its weights \("
INCOMPLETE = r"is missing: the folder is not a complete diffusers model\."
UNREADABLE = "is damaged and cannot be read as"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove("unet"), rf"unet/config\.json {INCOMPLETE}"),
        (remove("vae"), rf"vae/config\.json {INCOMPLETE}"),
        (remove("tokenizer"), rf"tokenizer/vocab\.json {INCOMPLETE}"),
        (remove("tokenizer/vocab.json"), rf"tokenizer/vocab\.json {INCOMPLETE}"),
        (remove("tokenizer/merges.txt"), rf"tokenizer/merges\.txt {INCOMPLETE}"),
        (text("tokenizer/vocab.json", "{"), rf"tokenizer {UNREADABLE} a CLIP tokenizer \("),
        (remove("unet/config.json"), rf"unet/config\.json {INCOMPLETE}"),
        (remove("scheduler"), rf"scheduler_config\.json {INCOMPLETE}"),
        (remove("vae/diffusion_pytorch_model.safetensors"), r"vae has no safetensors weights \(found: none\)\."),
        (truncated("unet", 5000), rf"unet/diffusion_pytorch_model\.safetensors {UNREADABLE} safetensors \("),
        (truncated("text_encoder", -1), rf"text_encoder/model\.safetensors {UNREADABLE} safetensors \("),
        (truncated("vae", 0), rf"vae/diffusion_pytorch_model\.safetensors {UNREADABLE} safetensors \("),
        (text("vae/diffusion_pytorch_model.safetensors", "<!doctype html>"), rf"model\.safetensors {UNREADABLE} safeten"),
        (text("unet/config.json", "{'a': 1}"), rf"unet/config\.json {UNREADABLE} JSON \("),
        (text("unet/config.json", "[]"), r"unet/config\.json holds a list where a JSON object is expected\."),
        (text("scheduler/scheduler_config.json", ""), rf"scheduler_config\.json {UNREADABLE} JSON \("),
        (text("model_index.json", "not json"), rf"model_index\.json {UNREADABLE} JSON \("),
        (
            config("unet/config.json", _class_name="UNet3DConditionModel"),
            r"unet holds UNet3DConditionModel where unet must be UNet2DConditionModel\.",
        ),
        (
            config("text_encoder/config.json", architectures=["T5EncoderModel"]),
            r"text_encoder holds T5EncoderModel where text_encoder must be CLIPTextModel or CLIPTextModelWithProjection\.",
        ),
        (config("text_encoder/config.json", architectures=None), r"text_encoder holds no named class where"),
        (
            config("model_index.json", vae=["diffusers", "AutoencoderTiny"]),
            r"model_index\.json wants vae to be a AutoencoderTiny, but only AutoencoderKL is allowed there\.",
        ),
        (
            config("model_index.json", tokenizer=["mycode", "Evil"]),
            r"model_index\.json wants tokenizer to be a Evil, but only CLIPTokenizer or CLIPTokenizerFast is allowed",
        ),
        (config("scheduler/scheduler_config.json", _class_name="Mine"), r"The scheduler class Mine is not supported"),
        (
            config("unet/config.json", block_out_channels=[32, 32]),
            rf"unet {UNFIT}.*expected shape torch.Size\(\[32\]\), but got torch.Size\(\[64\]\)",
        ),
        (config("vae/config.json", latent_channels=8), rf"vae {UNFIT}.*decoder\.conv_in\.weight expected shape"),
        (
            config("text_encoder/config.json", hidden_size=16),
            rf"text_encoder {UNFIT}\d+ mismatched keys, first embeddings\.",
        ),
        (
            config("text_encoder/config.json", num_hidden_layers=4),
            rf"text_encoder {UNFIT}\d+ unexpected keys, first .*layers\.4",
        ),
        (
            config("text_encoder/config.json", num_hidden_layers=6),
            rf"text_encoder {UNFIT}\d+ missing keys, first .*layers\.5",
        ),
        (config("unet/config.json", layers_per_block=2), rf"unet {UNFIT}.*up_blocks"),
        (config("unet/config.json", act_fn="no such"), rf"unet {UNFIT}activation function no such not found"),
        (tensors("unet", lambda t: t.pop("conv_in.bias")), rf"unet {UNFIT}1 missing keys, first conv_in\.bias"),
        (tensors("vae", lambda t: t.pop("quant_conv.bias")), rf"vae {UNFIT}1 missing keys, first quant_conv\.bias"),
        (
            tensors("unet", lambda t: t.update(extra=torch.zeros(1))),
            rf"unet {UNFIT}1 unexpected keys, first extra\)",
        ),
        (
            tensors("text_encoder", lambda t: t.update(extra=torch.zeros(1))),
            rf"text_encoder {UNFIT}1 unexpected keys, first extra\)",
        ),
        (
            pickled("unet", "diffusion_pytorch_model.bin"),
            r"unet holds only pickled weights \(diffusion_pytorch_model\.bin\), which can run code: convert them",
        ),
        (pickled("text_encoder", "pytorch_model.bin"), r"text_encoder holds only pickled weights \(pytorch_model\.bin\)"),
    ],
)
def test_a_damaged_folder(broken: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(broken)
    with pytest.raises(BadModel, match=message) as caught:
        load(str(broken), device="cpu")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_pickle_beside_safetensors_is_not_read(broken: Path) -> None:
    (broken / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"a pickle bomb")
    assert load(str(broken), device="cpu").native_size == 64


def test_the_index_of_position_ids_of_older_transformers_is_no_fault(broken: Path) -> None:
    name = "text_model.embeddings.position_ids"
    edit_weights(weights(broken, "text_encoder"), lambda t: t.update({name: torch.arange(77)[None]}))
    assert load(str(broken), device="cpu").native_size == 64


def test_components_of_other_kinds_in_the_folder_are_left_alone(broken: Path) -> None:
    (broken / "safety_checker").mkdir()
    edit_json(broken / "model_index.json", safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"])
    assert load(str(broken), device="cpu").native_size == 64


def test_a_folder_without_an_index_loads(broken: Path) -> None:
    (broken / "model_index.json").unlink()
    assert load(str(broken), device="cpu").native_size == 64


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(BadModel, match=r"is missing: the folder is not a complete diffusers model\."):
        load(str(tmp_path), device="cpu")


# --- what a config may ask for, and what tells weights apart


def test_a_config_cannot_choose_code(broken: Path) -> None:
    edit_json(broken / "text_encoder" / "config.json", attn_implementation="evil-org/evil-kernel")
    assert load(str(broken), device="cpu").text_encoder.config._attn_implementation == "sdpa"


def test_a_config_cannot_ask_for_a_quantizer(broken: Path) -> None:
    edit_json(broken / "unet" / "config.json", quantization_config={"quant_method": "bitsandbytes"})
    with pytest.raises(BadModel, match=r"unet/config\.json asks for a quantizer, which is not run: use plain weights"):
        load(str(broken), device="cpu")


def test_any_changed_byte_tells_weights_apart(tmp_path: Path) -> None:
    """Wherever in a large file it lies: who edits one row and loads both must not get one of them twice."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        rows = torch.zeros(5_000_000)
        rows[4_321_234] = name == "b"
        save_file({"rows": rows}, tmp_path / name / "model.safetensors")
    a, b = (fingerprint(Part("text_encoder", tmp_path / name)) for name in ("a", "b"))
    assert a != b


def test_who_wrote_a_config_does_not_tell_weights_apart(tiny_folder: Path, broken: Path) -> None:
    edit_json(broken / "vae" / "config.json", _diffusers_version="0.0.1")
    shelf = Shelf(device="cpu")
    assert shelf.load(str(broken)).vae is shelf.load(str(tiny_folder)).vae
    edit_json(broken / "vae" / "config.json", scaling_factor=0.5)
    assert shelf.load(str(broken)).vae is not shelf.load(str(tiny_folder)).vae
