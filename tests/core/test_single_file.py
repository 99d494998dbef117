"""Whole checkpoints in one file: the same weights laid out as the training code had them, loaded both ways."""

from __future__ import annotations

import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from torch import Tensor
from unrolled.core.errors import BadModel, Note
from unrolled.core.loading import Model, Shelf, load
from unrolled.core.single_file import LAYOUTS, convert, kind_of, parts_in
from unrolled.core.source import find
from unrolled.core.weights import read_json

Tensors = dict[str, Tensor]
KINDS = {
    "sd-1.5": "tiny_folder",
    "sd-1.5-inpainting": "tiny_inpaint_folder",
    "sdxl-base": "tiny_sdxl_folder",
    "sdxl-refiner": "tiny_refiner_folder",
    "x4-upscaler": "tiny_x4_folder",
}

# --- the way back: diffusers' names to those of the training code


def rename(name: str, *pairs: tuple[str, str]) -> str:
    for old, new in pairs:
        name = re.sub(old, new, name)
    return name


def original_unet(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Tensors:
    """Blocks are counted through: those of level b start at b * (layers + 1), after the first convolution going down."""
    a_level = config["layers_per_block"] + 1
    attends = {int(name.split(".")[1]) for name in tensors if re.match(r"up_blocks\.\d+\.attentions", name)}

    def place(match: re.Match[str]) -> str:
        side, level, kind, layer = match[1], int(match[2]), match[3], int(match[4])
        if kind == "downsamplers":
            return f"input_blocks.{(level + 1) * a_level}.0.op"
        if kind == "upsamplers":
            return f"output_blocks.{(level + 1) * a_level - 1}.{2 if level in attends else 1}.conv"
        block = (
            f"input_blocks.{1 + level * a_level + layer}" if side == "down" else f"output_blocks.{level * a_level + layer}"
        )
        return f"{block}.{1 if kind == 'attentions' else 0}"

    found = {}
    for name, tensor in tensors.items():
        resnet = (r"norm1", "in_layers.0"), (r"conv1", "in_layers.2"), (r"norm2", "out_layers.0"), (r"conv2", "out_layers.3")
        new = rename(name, *resnet, ("time_emb_proj", "emb_layers.1"), ("conv_shortcut", "skip_connection")) if (
            ".resnets." in name
        ) else name  # fmt: skip
        new = re.sub(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)(\.conv(?=\.))?", place, new)
        new = rename(
            new,
            (r"mid_block\.attentions\.0", "middle_block.1"),
            (r"mid_block\.resnets\.0", "middle_block.0"),
            (r"mid_block\.resnets\.1", "middle_block.2"),
            (r"^conv_in", "input_blocks.0.0"),
            (r"^conv_norm_out", "out.0"),
            (r"^conv_out", "out.2"),
            (r"^time_embedding\.linear_1", "time_embed.0"),
            (r"^time_embedding\.linear_2", "time_embed.2"),
            (r"^add_embedding\.linear_1", "label_emb.0.0"),
            (r"^add_embedding\.linear_2", "label_emb.0.2"),
            (r"^class_embedding", "label_emb"),
        )
        found[new] = tensor
    return found


def original_vae(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Tensors:
    """Levels of the decoder are counted from the other end, and attention is made of 1 x 1 convolutions."""
    last = len(config["block_out_channels"]) - 1
    found = {}
    for name, tensor in tensors.items():
        attends = ".attentions." in name
        new = rename(
            name,
            (r"encoder\.down_blocks\.(\d+)\.resnets", r"encoder.down.\1.block"),
            (r"encoder\.down_blocks\.(\d+)\.downsamplers\.0", r"encoder.down.\1.downsample"),
            (r"mid_block\.resnets\.0", "mid.block_1"),
            (r"mid_block\.resnets\.1", "mid.block_2"),
            (r"mid_block\.attentions\.0", "mid.attn_1"),
            ("conv_norm_out", "norm_out"),
            ("conv_shortcut", "nin_shortcut"),
            ("group_norm", "norm"),
            (r"to_([qkv])\.", r"\1."),
            (r"to_out\.0", "proj_out"),
        )
        new = re.sub(r"up_blocks\.(\d+)\.resnets", lambda m: f"up.{last - int(m[1])}.block", new)
        new = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{last - int(m[1])}.upsample", new)
        found[new] = tensor[:, :, None, None] if attends and tensor.ndim == 2 else tensor
    return found


def original_clip(tensors: Mapping[str, Tensor]) -> Tensors:
    return {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in tensors.items()}


def openclip(tensors: Mapping[str, Tensor], width: int) -> Tensors:
    """Queries, keys and values in one matrix, and the projection transposed."""
    found = {
        "text_projection": tensors["text_projection.weight"].T if "text_projection.weight" in tensors else torch.eye(width)
    }
    joined: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        new = rename(
            name.removeprefix("text_model."),
            (r"^encoder\.layers", "transformer.resblocks"),
            (r"^embeddings\.position_embedding\.weight", "positional_embedding"),
            (r"^embeddings\.token_embedding", "token_embedding"),
            (r"^final_layer_norm", "ln_final"),
            ("layer_norm(.)", r"ln_\1"),
            (r"mlp\.fc1", "mlp.c_fc"),
            (r"mlp\.fc2", "mlp.c_proj"),
            ("self_attn", "attn"),
        )
        if match := re.fullmatch(r"(.*\.attn)\.([qkv])_proj\.(weight|bias)", new):
            joined.setdefault(f"{match[1]}.in_proj_{match[3]}", {})[match[2]] = tensor
        elif name != "text_projection.weight":
            found[new] = tensor
    return found | {name: torch.cat([parts[letter] for letter in "qkv"]) for name, parts in joined.items()}


def original(folder: Path, kind: str) -> Tensors:
    """A folder's weights in the layout of the training code, with the scraps such files have."""
    found: Tensors = {"betas": torch.zeros(3), "model_ema.decay": torch.tensor(0.9)}
    for part, prefix in LAYOUTS[kind].items():
        tensors, config = load_file(next((folder / part).glob("*.safetensors"))), read_json(folder / part / "config.json")
        if part == "unet":
            tensors = original_unet(tensors, config)
        elif part == "vae":
            tensors = original_vae(tensors, config)
        elif prefix.endswith(".model."):
            tensors = openclip(tensors, config["hidden_size"]) | {"logit_scale": torch.zeros(())}
        else:
            tensors = original_clip(tensors)
            tensors |= {"text_model.embeddings.position_ids": torch.arange(77)[None], "text_projection.weight": torch.eye(2)}
        found |= {prefix + name: tensor.contiguous() for name, tensor in tensors.items()}
    return found


# --- fixtures


@pytest.fixture(scope="session")
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds a tiny model of every kind."""
    folder = tmp_path_factory.mktemp("kinds")
    for kind, fixture in KINDS.items():
        (folder / kind).symlink_to(request.getfixturevalue(fixture))
    return folder


@pytest.fixture(scope="session")
def originals(models: Path) -> dict[str, Tensors]:
    return {kind: original(models / kind, kind) for kind in KINDS}


@pytest.fixture
def written(originals: dict[str, Tensors], tmp_path: Path) -> Callable[..., Path]:
    """Writes the file of a kind, edited."""

    def write(kind: str = "sd-1.5", edit: Callable[[Tensors], object] = len, name: str = "model.safetensors") -> Path:
        tensors = dict(originals[kind])
        edit(tensors)
        if name.endswith(".ckpt"):
            torch.save({"state_dict": tensors, "global_step": 7}, tmp_path / name)
        else:
            save_file(tensors, tmp_path / name)
        return tmp_path / name

    return write


def loaded(file: Path | str, models: Path, **options: Any) -> Model:
    return load(str(file), models=str(models), device="cpu", **options)


def without(prefix: str) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.startswith(prefix)]:
            del tensors[name]

    return edit


def one_call(model: Model) -> Tensor:
    """One of the UNet, with everything that one of any kind may take."""
    unet, draw = model.unet, torch.Generator().manual_seed(1)
    x = torch.randn(2, unet.config.in_channels, 8, 8, generator=draw)
    context = torch.randn(2, 77, unet.config.cross_attention_dim, generator=draw)
    labels = torch.tensor([3, 3]) if unet.config.num_class_embeds else None
    added = {}
    if model.text_encoder_2:
        pooled = model.text_encoder_2.config.projection_dim
        ids = (unet.config.projection_class_embeddings_input_dim - pooled) // unet.config.addition_time_embed_dim
        added = {"text_embeds": torch.randn(2, pooled, generator=draw), "time_ids": torch.ones(2, ids)}
    return unet(x, 500, context, class_labels=labels, added_cond_kwargs=added).sample  # type: ignore[no-any-return]


def assert_same_call(ours: Model, theirs: Model) -> None:
    """Equal weights at other addresses in memory round differently in the last bit."""
    torch.testing.assert_close(one_call(ours), one_call(theirs), atol=3e-6, rtol=0)


# --- what loads


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ending", ["safetensors", "ckpt"])
def test_a_file_is_the_folder_it_was_made_of(kind: str, ending: str, written: Callable[..., Path], models: Path) -> None:
    file = written(kind, name=f"model.{ending}")
    with warnings.catch_warnings():
        warnings.simplefilter("error", Note)
        ours = loaded(file, models, allow_pickle=ending == "ckpt")
    theirs = load(str(models / kind), device="cpu")
    assert find(str(file), str(models), allow_pickle=True).files.keys() == LAYOUTS[kind].keys()
    for part in LAYOUTS[kind]:
        mine, wanted = getattr(ours, part).state_dict(), getattr(theirs, part).state_dict()
        assert mine.keys() == wanted.keys()
        assert all(torch.equal(mine[name], wanted[name]) for name in wanted), part
        assert not getattr(ours, part).training
        assert not any(p.requires_grad for p in getattr(ours, part).parameters())
    assert_same_call(ours, theirs)
    assert (ours.space, ours.system, ours.native_size) == (theirs.space, theirs.system, theirs.native_size)
    assert (ours.scheduler, ours.low_res_scheduler, ours.index) == (theirs.scheduler, theirs.low_res_scheduler, theirs.index)
    assert (ours.inpaints, ours.scored) == (theirs.inpaints, theirs.scored)
    assert ours.fingerprints.keys() == theirs.fingerprints.keys()


def test_the_miniatures_are_the_bases_of_miniature_files(tmp_path: Path) -> None:
    source = find("sd-1.5")
    save_file(original(source.folders["index"], "sd-1.5"), tmp_path / "mine.safetensors")
    ours, theirs = load(str(tmp_path / "mine.safetensors"), device="cpu"), load("sd-1.5", device="cpu")
    assert_same_call(ours, theirs)
    assert ours.space == theirs.space


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_half_precision_file_is_of_the_same_space(dtype: torch.dtype, written: Callable[..., Path], models: Path) -> None:
    def halve(tensors: Tensors) -> None:
        tensors |= {name: tensor.half() for name, tensor in tensors.items() if tensor.is_floating_point()}

    model = loaded(written(edit=halve), models, dtype=dtype)
    assert {model.unet.dtype, model.vae.dtype, model.text_encoder.dtype} == {dtype}
    theirs = load(str(models / "sd-1.5"), device="cpu")
    assert model.space == theirs.space
    assert torch.equal(model.unet.conv_in.weight.float(), theirs.unet.conv_in.weight.half().float())


def test_another_encoder_is_another_space(written: Callable[..., Path], models: Path) -> None:
    def edit(tensors: Tensors) -> None:
        tensors["first_stage_model.encoder.conv_in.weight"] = tensors["first_stage_model.encoder.conv_in.weight"] * 1.5

    assert loaded(written(edit=edit), models).space != load(str(models / "sd-1.5"), device="cpu").space


def test_old_names_of_attention_are_of_the_same_space(models: Path, tmp_path: Path) -> None:
    """Stable Diffusion 1.5's own VAE file has the names of diffusers before 0.17."""
    folder = Path(shutil.copytree(models / "sd-1.5", tmp_path / "old"))
    file = next((folder / "vae").glob("*.safetensors"))
    pairs = (r"to_q\.", "query."), (r"to_k\.", "key."), (r"to_v\.", "value."), (r"to_out\.0\.", "proj_attn.")
    old = {rename(name, *pairs): tensor for name, tensor in load_file(file).items()}
    assert any(".proj_attn." in name for name in old)
    save_file(old, file, {"format": "pt"})
    assert load(str(folder), device="cpu").space == load(str(models / "sd-1.5"), device="cpu").space


@pytest.mark.parametrize(
    ("kind", "prefix", "message"),
    [
        ("sd-1.5", "first_stage_model.", "model.safetensors holds no vae: taken from sd-1.5."),
        ("sd-1.5", "cond_stage_model.", "model.safetensors holds no text_encoder: taken from sd-1.5."),
        (
            "sdxl-base",
            "conditioner.",
            "model.safetensors holds no text_encoder and no text_encoder_2: taken from sdxl-base.",
        ),
    ],
)
def test_what_a_file_lacks_is_borrowed(
    kind: str, prefix: str, message: str, written: Callable[..., Path], models: Path
) -> None:
    with pytest.warns(Note, match=re.escape(message)):
        ours = loaded(written(kind, without(prefix)), models)
    theirs = load(str(models / kind), device="cpu")
    assert_same_call(ours, theirs)
    for part in ("text_encoder", "vae"):
        mine = getattr(ours, part).state_dict()
        assert all(torch.equal(tensor, mine[name]) for name, tensor in getattr(theirs, part).state_dict().items())


def test_a_text_encoder_of_the_oldest_names(written: Callable[..., Path], models: Path) -> None:
    prefix = "cond_stage_model.transformer."

    def edit(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.startswith(f"{prefix}text_model.")]:
            tensors[name.replace("text_model.", "")] = tensors.pop(name)

    ours, theirs = loaded(written(edit=edit), models), load(str(models / "sd-1.5"), device="cpu")
    mine = ours.text_encoder.state_dict()
    assert all(torch.equal(tensor, mine[name]) for name, tensor in theirs.text_encoder.state_dict().items())


def test_averaged_weights_beside_the_others_are_left_alone(written: Callable[..., Path], models: Path) -> None:
    def edit(tensors: Tensors) -> None:
        unet = {name: tensor for name, tensor in tensors.items() if name.startswith("model.diffusion_model.")}
        tensors |= {"model_ema." + "".join(name.split(".")[1:]): tensor * 0 for name, tensor in unet.items()}

    ours, theirs = loaded(written(edit=edit), models), load(str(models / "sd-1.5"), device="cpu")
    assert_same_call(ours, theirs)


def test_marks_of_v_prediction_change_the_scheduler(written: Callable[..., Path], models: Path) -> None:
    def mark(tensors: Tensors) -> None:
        tensors |= {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}

    model = loaded(written("sdxl-base", mark), models)
    assert (model.scheduler["prediction_type"], model.scheduler["rescale_betas_zero_snr"]) == ("v_prediction", True)
    assert model.denoiser.kind == "v"


def test_the_file_may_go_once_it_is_loaded(written: Callable[..., Path], models: Path) -> None:
    file = written()
    model = loaded(file, models)
    before = one_call(model)
    file.write_bytes(b"\0" * file.stat().st_size)
    assert torch.equal(one_call(model), before)


def test_one_file_loads_once_on_a_shelf_and_lends_its_parts(written: Callable[..., Path], models: Path) -> None:
    file, shelf = written(), Shelf(str(models), device="cpu")
    one = shelf.load(str(file))
    assert shelf.load(str(file)).unet is one.unet
    lent = shelf.load("sd-1.5-inpainting", {"vae": str(file)})
    assert lent.vae is one.vae
    assert lent.space == one.space
    assert shelf.load(str(file), {"vae": "sd-1.5"}).fingerprints["vae"] == shelf.load("sd-1.5").fingerprints["vae"]


def test_sizes_are_read_without_weights_of_the_base(written: Callable[..., Path], models: Path) -> None:
    source = find(str(written("sdxl-base")), str(models), weights=False)
    assert (source.system, source.sizes()) == ("sdxl", (64, 8))


# --- the published structures, by name alone


SDXL = {
    "sample_size": 128, "block_out_channels": (320, 640, 1280), "transformer_layers_per_block": (1, 2, 10),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (5, 10, 20), "cross_attention_dim": 2048, "use_linear_projection": True,
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
VAE = {
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4, "latent_channels": 4,
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "options", "known"),
    [
        ("sd-1.5", {"cross_attention_dim": 768}, "output_blocks.11.0.skip_connection.weight"),
        ("sd-1.5-inpainting", {"cross_attention_dim": 768, "in_channels": 9}, "input_blocks.11.0.in_layers.2.weight"),
        ("sdxl-base", SDXL, "output_blocks.2.1.transformer_blocks.9.attn2.to_out.0.weight"),
    ],
)
def test_full_size_checkpoints_have_their_kind_and_names(kind: str, options: dict[str, Any], known: str) -> None:
    with torch.device("meta"):
        unet, vae = UNet2DConditionModel(**options), AutoencoderKL(**VAE)
    tensors = {"model.diffusion_model." + n: t for n, t in original_unet(unet.state_dict(), unet.config).items()}
    tensors |= {"first_stage_model." + n: t for n, t in original_vae(vae.state_dict(), vae.config).items()}
    assert f"model.diffusion_model.{known}" in tensors
    assert (kind_of(tensors, Path("file")), parts_in(tensors, kind)) == (kind, ("unet", "vae"))
    for part, model in (("unet", unet), ("vae", vae)):
        converted = convert(tensors, part, model.config, Path("file"))
        assert {n: t.shape for n, t in converted.items()} == {n: t.shape for n, t in model.state_dict().items()}


# --- where files are found


def test_a_file_in_the_folder_of_models(written: Callable[..., Path], models: Path, tmp_path: Path) -> None:
    folder = tmp_path / "models"
    shutil.copytree(models, folder)
    target = folder / "me" / "mine" / "style.safetensors"
    target.parent.mkdir(parents=True)
    written().rename(target)
    assert find("me/mine/style.safetensors", str(folder)).files["unet"] == target


def test_a_file_of_a_hub_repository(
    monkeypatch: pytest.MonkeyPatch, written: Callable[..., Path], models: Path, tmp_path: Path
) -> None:
    file, asked = written(edit=without("first_stage_model.")), []

    def file_download(repository: str, inside: str, revision: str | None) -> str:
        asked.append((repository, inside, revision))
        return str(file)

    def snapshot_download(repository: str, allow_patterns: list[str], **more: object) -> str:
        asked.append((repository, sorted(p for p in allow_patterns if p.endswith("safetensors")), more["revision"]))
        return str(models / "sd-1.5")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", file_download)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.warns(Note, match="holds no vae"):
        source = find("me/mine/sub/style.safetensors", "hub", revision="v2")
    assert source.files.keys() == {"unet", "text_encoder"}
    assert asked[0] == ("me/mine", "sub/style.safetensors", "v2")
    base, weights, revision = asked[1]
    assert (base, revision) == ("stable-diffusion-v1-5/stable-diffusion-v1-5", None)
    assert "vae/*.safetensors" in weights
    assert not {"unet/*.safetensors", "text_encoder/*.safetensors"} & set(weights)


def test_a_file_that_is_not_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def file_download(*_: object, **__: object) -> str:
        raise LocalEntryNotFoundError("404: no such entry")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", file_download)
    message = r"me/mine/gone\.safetensors could not be fetched from the hub \(404: no such entry\): check the name and the"
    with pytest.raises(BadModel, match=message):
        find("me/mine/gone.safetensors", "hub")


@pytest.mark.parametrize("models_", ["miniature", "hub", "."])
@pytest.mark.parametrize("name", ["gone.safetensors", "./a/b/gone.ckpt"])
def test_a_file_that_is_not_there(name: str, models_: str) -> None:
    message = rf"There is no file {name}: give a path, or a file of a hub repository as OWNER/NAME/FILE with --models hub\."
    with pytest.raises(BadModel, match=message):
        find(name, models_, allow_pickle=True)


def test_a_folder_of_single_files_names_them(written: Callable[..., Path], tmp_path: Path) -> None:
    written(), (tmp_path / "other.ckpt").write_bytes(b"")
    message = rf"{tmp_path} holds no model folders but model\.safetensors, other\.ckpt: name the file, as {tmp_path}/m"
    with pytest.raises(BadModel, match=message):
        load(str(tmp_path), device="cpu")


def test_a_repository_of_single_files_names_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    files = ["README.md", *(f"v{n}.ckpt" for n in range(7))]
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda *_, **__: files)
    message = r"me/mine holds no model folders but v0.ckpt, v1.ckpt, v2.ckpt, v3.ckpt, v4.ckpt, …: name the file, as me/mine"
    with pytest.raises(BadModel, match=message):
        find("me/mine", "hub")


# --- what cannot be read


def changed(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: change(tensors[name]).contiguous()})


FIRST = "model.diffusion_model.input_blocks.0.0.weight"
ONLY = r"sd-1\.5, sd-1\.5-inpainting, x4-upscaler, sdxl-base, sdxl-refiner"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            without("model.diffusion_model."),
            rf"is of no known kind: a checkpoint in one file has the weights {FIRST}, and it has \d+ others \(betas, …\): "
            rf"LoRAs, single components and models other than {ONLY} are not read\.",
        ),
        (without(""), rf"has the weights {FIRST}, and it has 0 others \(none, …\)"),
        (
            lambda t: t.update({"cond_stage_model.model.ln_final.weight": torch.zeros(4)}),
            r"is of no known kind: cond_stage_model\.model\.… without model\.diffusion_model\.label_emb\.weight is Stable "
            rf"Diffusion 2, and only {ONLY} are read\.",
        ),
        (
            lambda t: t.update(edm_mean=torch.zeros(4)),
            r"is a model of EDM's noise levels \(it has the key edm_…\), whi",
        ),
        (
            changed("model.diffusion_model.out.2.bias", lambda t: torch.cat([t, t])),
            r"does not fit .*unet/config\.json; give the models it was made from \(--models\) "
            r"\(1 mismatched keys, first conv_out\.bias\)\.",
        ),
        (without("model.diffusion_model.out.2.bias"), r"does not fit .*unet.*\(1 missing keys, first conv_out\.bias\)\."),
        (
            lambda t: t.update({"model.diffusion_model.middle_block.3.extra": torch.zeros(1)}),
            r"does not fit .*unet.*\(1 unexpected keys, first mid_block\.attentions\.2\.extra\)\.",
        ),
        (
            without("model.diffusion_model.output_blocks.1.2.conv.bias"),
            r"cannot be converted: its unet is not complete \('output_blocks\.1\.2\.conv\.bias'\)\.",
        ),
        (
            changed("first_stage_model.encoder.conv_in.bias", lambda t: t[:2]),
            r"does not fit .*vae/config.json;.*\(1 mismatched keys, first encoder\.conv_in\.bias\)\.",
        ),
        (
            changed("cond_stage_model.transformer.text_model.final_layer_norm.bias", lambda t: t[:2]),
            r"does not fit .*text_encoder/config.json;.*\(1 mismatched keys, first final_layer_norm\.bias\)\.",
        ),
        (
            without("cond_stage_model.transformer.text_model.encoder.layers.4."),
            r"does not fit .*text_encoder/config.json;.*\(16 missing keys, first encoder\.layers\.4\.layer_norm1\.bias\)\.",
        ),
    ],
)
def test_a_file_that_does_not_fit(
    edit: Callable[[Tensors], object], message: str, written: Callable[..., Path], models: Path
) -> None:
    file = written(edit=edit)
    with pytest.raises(
        BadModel, match=rf"^{file} {message}" if message.startswith(("is", "does", "cannot")) else message
    ) as it:
        loaded(file, models)
    assert "\n" not in str(it.value)


def test_a_full_size_file_does_not_fit_a_miniature(written: Callable[..., Path]) -> None:
    message = r"model\.safetensors does not fit .*config\.json; give the models it was made from \(--models\) \(\d+ mis"
    with pytest.raises(BadModel, match=message):
        load(str(written()), device="cpu")


def test_a_base_that_is_not_there(written: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    message = (
        r"model\.safetensors is of the kind sdxl-refiner, whose configs and tokenizers it needs: .*models holds no model fol"
    )
    with pytest.raises(BadModel, match=message):
        loaded(written("sdxl-refiner"), tmp_path / "models")


@pytest.mark.parametrize("keep", [0, 7, 5000])
def test_a_damaged_file(keep: int, written: Callable[..., Path], models: Path) -> None:
    file = written()
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(BadModel, match=r"model\.safetensors is damaged and cannot be read as safetensors \("):
        loaded(file, models)
