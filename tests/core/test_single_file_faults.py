"""Where whole checkpoints in one file are found, and what is said of those that cannot be read."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from torch import Tensor
from unrolled.core.errors import BadModel, Note
from unrolled.core.loading import load
from unrolled.core.source import find

Tensors = dict[str, Tensor]


def without(prefix: str) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.startswith(prefix)]:
            del tensors[name]

    return edit


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
    file, asked = written(edit=without("first_stage_model.")), list[tuple[str, Any, object]]()

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
        load(str(file), models=str(models), device="cpu")
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
        load(str(written("sdxl-refiner")), models=str(tmp_path / "models"), device="cpu")


@pytest.mark.parametrize("keep", [0, 7, 5000])
def test_a_damaged_file(keep: int, written: Callable[..., Path], models: Path) -> None:
    file = written()
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(BadModel, match=r"model\.safetensors is damaged and cannot be read as safetensors \("):
        load(str(file), models=str(models), device="cpu")
