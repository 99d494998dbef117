"""Pickled weights: read only where asked for, and never anything in them but tensors."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file
from unrolled.core.errors import BadModel
from unrolled.core.loading import Model, Shelf, load
from unrolled.core.source import find
from unrolled.core.weights import has_weights, read_tensors

NAMES = {
    "unet": "diffusion_pytorch_model.bin",
    "vae": "diffusion_pytorch_model.bin",
    "text_encoder": "pytorch_model.bin",
}
ADVICE = (
    r", which can run code: convert them to safetensors, or give allow_pickle=True \(allow_pickle = true in a chain\), "
    r"which reads tensors from pickles and refuses all else\."
)


class Evil:
    """What a malicious file holds: unpickled, it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.system, (f"touch '{self.path}'",)


def pickled(folder: Path, *components: str, variant: str = "", **options: Any) -> Path:
    """Some components' weights, pickled instead."""
    for component in components or NAMES:
        file = next((folder / component).glob("*.safetensors"))
        name = NAMES[component].replace(".bin", f"{variant}.bin")
        torch.save(load_file(file), file.with_name(name), **options)
        file.unlink()
    return folder


def assert_same(ours: Model, theirs: Model) -> None:
    for part in NAMES:
        mine, wanted = getattr(ours, part).state_dict(), getattr(theirs, part).state_dict()
        assert mine.keys() == wanted.keys()
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in mine.items()), part
    assert ours.space == theirs.space


# --- what loads where asked for


@pytest.mark.parametrize("zipped", [True, False])
def test_a_folder_of_pickles(zipped: bool, broken: Path, tiny: Model) -> None:
    ours = load(str(pickled(broken, _use_new_zipfile_serialization=zipped)), device="cpu", allow_pickle=True)
    assert_same(ours, tiny)
    assert ours.fingerprints["unet"] != tiny.fingerprints["unet"]
    x, context = torch.ones(1, 4, 8, 8), torch.ones(1, 77, 32)
    torch.testing.assert_close(ours.unet(x, 5, context).sample, tiny.unet(x, 5, context).sample, atol=3e-6, rtol=0)


def test_a_variant_of_pickles(broken: Path, tiny: Model) -> None:
    folder = pickled(broken, variant=".fp16")
    assert_same(load(str(folder), device="cpu", variant="fp16", allow_pickle=True), tiny)
    message = r"text_encoder has no weights \(found: pytorch_model\.fp16\.bin\)\."
    with pytest.raises(BadModel, match=message):
        load(str(folder), device="cpu", allow_pickle=True)


def shard(folder: Path) -> None:
    for name, kind, size in [("unet", UNet2DConditionModel, "300KB"), ("vae", AutoencoderKL, "40KB")]:
        part = kind.from_pretrained(folder / name)
        next((folder / name).glob("*.safetensors")).unlink()
        part.save_pretrained(folder / name, max_shard_size=size, safe_serialization=False)
        assert len(list((folder / name).glob("*-of-*.bin"))) > 1


def test_pickles_in_several_files(broken: Path, tiny: Model) -> None:
    shard(broken)
    assert_same(load(str(broken), device="cpu", allow_pickle=True), tiny)


def test_a_missing_shard_is_named(broken: Path) -> None:
    shard(broken)
    gone = sorted((broken / "unet").glob("*-of-*.bin"))[1]
    gone.unlink()
    with pytest.raises(BadModel, match=rf"{gone.name} is missing: the folder is not a complete diffusers model\."):
        load(str(broken), device="cpu", allow_pickle=True)


def test_safetensors_are_read_where_there_are_both(broken: Path, tiny: Model) -> None:
    (broken / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"a pickle bomb")
    assert_same(load(str(broken), device="cpu", allow_pickle=True), tiny)


def test_a_plan_sees_pickles_only_where_they_count(broken: Path) -> None:
    pickled(broken, "vae")
    seen = {allow: has_weights(find(str(broken), allow_pickle=allow).part("vae")) for allow in (False, True)}
    assert seen == {False: False, True: True}
    assert has_weights(find(str(broken)).part("unet"))


def test_it_counts_for_the_components_named_beside_the_model(broken: Path, tiny_folder: Path) -> None:
    pickled(broken, "vae")
    shelf = Shelf(device="cpu")
    with pytest.raises(BadModel, match="vae holds only pickled weights"):
        shelf.load(str(tiny_folder), {"vae": str(broken)})
    lent = shelf.load(str(tiny_folder), {"vae": str(broken)}, allow_pickle=True)
    assert lent.space == shelf.load(str(tiny_folder)).space
    with pytest.raises(BadModel, match="vae holds only pickled weights"):
        shelf.load(str(broken))


# --- what is refused


@pytest.mark.parametrize(("component", "name"), NAMES.items())
def test_a_folder_of_pickles_is_refused_unless_asked_for(component: str, name: str, broken: Path) -> None:
    pickled(broken, component)
    with pytest.raises(BadModel, match=rf"{component} holds only pickled weights \({name}\)" + ADVICE):
        load(str(broken), device="cpu")


def test_a_file_is_refused_unless_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "model.ckpt"
    torch.save({"state_dict": {"w": torch.zeros(2)}}, file)
    with pytest.raises(BadModel, match=rf"{file} is pickled" + ADVICE):
        load(str(file), device="cpu")
    assert read_tensors(file, allow_pickle=True).keys() == {"w"}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("component", NAMES)
def test_a_malicious_pickle_in_a_folder_does_nothing(component: str, zipped: bool, broken: Path, tmp_path: Path) -> None:
    mark, file = tmp_path / "it ran", pickled(broken) / component / NAMES[component]
    torch.save({"w": torch.zeros(2), "evil": Evil(mark)}, file, _use_new_zipfile_serialization=zipped)
    torch.load(file, weights_only=False)
    assert mark.is_file(), "it is malicious"
    mark.unlink()
    message = rf"{NAMES[component]} was refused: its pickle calls posix\.system, and pickles of tensors only are read; get"
    with pytest.raises(BadModel, match=message) as caught:
        load(str(broken), device="cpu", allow_pickle=True)
    assert not mark.exists()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_malicious_file_does_nothing(zipped: bool, tmp_path: Path) -> None:
    mark, file = tmp_path / "it ran", tmp_path / "model.ckpt"
    torch.save({"state_dict": {"w": torch.zeros(2)}, "evil": Evil(mark)}, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(BadModel, match=r"model\.ckpt was refused: its pickle calls posix\.system, and pickles of tensors"):
        load(str(file), device="cpu", allow_pickle=True)
    assert not mark.exists()


def test_the_environment_does_not_loosen_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    mark, file = tmp_path / "it ran", tmp_path / "model.ckpt"
    torch.save({"evil": Evil(mark)}, file)
    with pytest.raises(BadModel, match="was refused"):
        load(str(file), device="cpu", allow_pickle=True)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"model\.ckpt is damaged and cannot be read as a pickle of tensors \(EOFError\)\."),
        (
            b"<!doctype html>",
            r"model\.ckpt is damaged and cannot be read as a pickle of tensors \(Unsupported operand 60\)\.",
        ),
        (b"PK\x03\x04 no zip", r"model\.ckpt is damaged and cannot be read as a pickle of tensors \("),
        ([1, 2], r"model\.ckpt holds a list without tensors where weights are expected\."),
        ({"state_dict": {"epoch": 3}}, r"model\.ckpt holds a dict without tensors where weights are expected\."),
        ({"state_dict": [3]}, r"model\.ckpt holds a list without tensors where weights are expected\."),
    ],
)
def test_a_file_that_is_no_pickle_of_tensors(content: object, message: str, tmp_path: Path) -> None:
    file = tmp_path / "model.ckpt"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    with pytest.raises(BadModel, match=message) as caught:
        load(str(file), device="cpu", allow_pickle=True)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_truncated_pickle(broken: Path) -> None:
    file = pickled(broken, "unet") / "unet" / NAMES["unet"]
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(BadModel, match=r"_model\.bin is damaged and cannot be read as a pickle of tensors \("):
        load(str(broken), device="cpu", allow_pickle=True)


def test_a_plain_pickle_is_no_way_round(tmp_path: Path) -> None:
    mark, file = tmp_path / "it ran", tmp_path / "model.ckpt"
    file.write_bytes(pickle.dumps(Evil(mark)))
    with pytest.raises(BadModel, match=r"model\.ckpt (is damaged|was refused)"):
        load(str(file), device="cpu", allow_pickle=True)
    assert not mark.exists()


def test_pickled_weights_of_another_shape(broken: Path) -> None:
    file = pickled(broken, "unet") / "unet" / NAMES["unet"]
    tensors = torch.load(file, weights_only=True)
    torch.save({name: tensor for name, tensor in tensors.items() if name != "conv_in.bias"}, file)
    message = r"unet cannot be loaded: its config\.json does not fit its weights \(1 missing keys, first conv_in\.bias\)\."
    with pytest.raises(BadModel, match=message):
        load(str(broken), device="cpu", allow_pickle=True)


# --- the hub


@pytest.fixture
def repository(monkeypatch: pytest.MonkeyPatch, broken: Path, tmp_path: Path) -> Path:
    """A repository with pickles in some folders; what is asked of it lands in another."""
    pickled(broken, "unet", "text_encoder")
    (broken / "vae" / NAMES["vae"]).write_bytes(b"a pickle beside safetensors")
    (broken / "unet" / "diffusion_pytorch_model.fp16.bin").write_bytes(b"a variant")
    (broken / "v1.ckpt").write_bytes(b"a checkpoint in one file")
    landed = tmp_path / "landed"

    def snapshot_download(
        name: str, revision: str | None, allow_patterns: list[str], ignore_patterns: list[str] | None
    ) -> str:
        for file in (file for file in broken.rglob("*") if file.is_file()):
            inside = str(file.relative_to(broken))
            skipped = any(fnmatch(inside, pattern) for pattern in ignore_patterns or [])
            if any(fnmatch(inside, pattern) for pattern in allow_patterns) and not skipped:
                (landed / inside).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, landed / inside)
        return str(landed)

    files = sorted(str(file.relative_to(broken)) for file in broken.rglob("*") if file.is_file())
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda *_, **__: files)
    return landed


def test_pickles_are_fetched_only_where_asked_for_and_needed(repository: Path) -> None:
    with pytest.raises(BadModel, match="holds only pickled weights"):
        find("me/mine", "hub")
    assert not [*repository.rglob("*.bin"), *repository.rglob("*.ckpt")]
    find("me/mine", "hub", weights=False, allow_pickle=True)
    assert not list(repository.rglob("*.bin"))
    find("me/mine", "hub", allow_pickle=True)
    fetched = sorted(str(file.relative_to(repository)) for file in repository.rglob("*.bin"))
    assert fetched == ["text_encoder/pytorch_model.bin", "unet/diffusion_pytorch_model.bin"]


def test_a_repository_of_pickles(repository: Path, tiny: Model) -> None:
    message = r"me/mine holds only pickled weights \((unet/diffusion_pytorch|text_encoder/pytorch)_model\.(fp16\.)?bin\)"
    with pytest.raises(BadModel, match=message + ADVICE):
        load("me/mine", "hub", device="cpu")
    assert_same(load("me/mine", "hub", device="cpu", allow_pickle=True), tiny)


def test_a_pickled_file_of_the_hub_is_refused_before_it_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> str:
        raise AssertionError("fetched")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", never)
    with pytest.raises(BadModel, match=r"me/mine/v1\.ckpt is pickled" + ADVICE):
        find("me/mine/v1.ckpt", "hub")
