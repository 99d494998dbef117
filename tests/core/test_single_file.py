"""Whole checkpoints in one file: the same weights as in a folder, loaded both ways."""

from __future__ import annotations

import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from unrolled.chains.plan import plan
from unrolled.chains.read import read_chain
from unrolled.core.errors import BadChain, Note
from unrolled.core.loading import Model, Shelf, load
from unrolled.core.single_file import LAYOUTS, convert, kind_of, parts_in
from unrolled.core.source import find
from unrolled.schedulers.config import read_scheduler

Tensors = dict[str, Tensor]
KINDS = ("sd-1.5", "sd-1.5-inpainting", "sdxl-base", "sdxl-refiner", "x4-upscaler")


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


def test_the_miniatures_are_the_bases_of_miniature_files(layout: SimpleNamespace, tmp_path: Path) -> None:
    source = find("sd-1.5")
    save_file(layout.checkpoint(source.folders["index"], "sd-1.5"), tmp_path / "mine.safetensors")
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
    old = load_file(file)
    for new_name, old_name in (("to_q.", "query."), ("to_k.", "key."), ("to_v.", "value."), ("to_out.0.", "proj_attn.")):
        old = {name.replace(new_name, old_name): tensor for name, tensor in old.items()}
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
    assert read_scheduler(model.scheduler).kind == "v"


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


CHAIN = """
steps = 4
[[stage]]
name = "first"
do = "text-to-image"
model = "{file}"
prompt = "a castle"
[[stage]]
name = "second"
do = "image-to-image"
model = "sd-1.5"
prompt = "a castle"
strength = 0.5
"""


def test_a_chain_goes_from_a_file_to_a_folder_in_latents(
    written: Callable[..., Path], models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unrolled.core.loading.read_component", None)  # plans read no weights
    (tmp_path / "chain.toml").write_text(CHAIN.format(file=written()))
    first, second = plan(read_chain(tmp_path / "chain.toml"), Shelf(str(models), device="cpu"))
    assert (first.size, second.takes) == ((64, 64), "latents")

    def edit(tensors: Tensors) -> None:
        tensors["first_stage_model.quant_conv.bias"] = tensors["first_stage_model.quant_conv.bias"] + 1

    written(edit=edit)
    with pytest.raises(BadChain, match="have different VAEs, so latents cannot be handed on"):
        plan(read_chain(tmp_path / "chain.toml"), Shelf(str(models), device="cpu"))


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
def test_full_size_checkpoints_have_their_kind_and_names(
    kind: str, options: dict[str, Any], known: str, layout: SimpleNamespace
) -> None:
    with torch.device("meta"):
        unet, vae = UNet2DConditionModel(**options), AutoencoderKL(**VAE)
    tensors = {"model.diffusion_model." + n: t for n, t in layout.unet(unet.state_dict(), unet.config).items()}
    tensors |= {"first_stage_model." + n: t for n, t in layout.vae(vae.state_dict(), vae.config).items()}
    assert f"model.diffusion_model.{known}" in tensors
    assert (kind_of(tensors, Path("file")), parts_in(tensors, kind)) == (kind, ("unet", "vae"))
    for part, model in (("unet", unet), ("vae", vae)):
        converted = convert(tensors, part, model.config, Path("file"))
        assert {n: t.shape for n, t in converted.items()} == {n: t.shape for n, t in model.state_dict().items()}
