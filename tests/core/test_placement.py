import gc
import os
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from unrolled.core import memory
from unrolled.core.conditioning import Conditioning
from unrolled.core.errors import BadInput
from unrolled.core.loading import Model, Prior, Shelf
from unrolled.core.memory import Placement, peak
from unrolled.miniatures.tiny_kandinsky import write_tiny_kandinsky, write_tiny_prior
from unrolled.stages.decode import decode_tensor
from unrolled.stages.image import encode_image
from unrolled.stages.noise import add_noise, unit_noise
from unrolled.stages.prior import embed_image, sample_prior
from unrolled.stages.text import encode_text

CPU = torch.device("cpu")
MODES: tuple[memory.Mode, ...] = ("resident", "model", "layer")


@pytest.fixture(scope="module")
def kandinsky(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("kandinsky")
    return write_tiny_kandinsky(folder / "decoder"), write_tiny_prior(folder / "prior")


def test_a_budget_chooses_where_a_model_lives(tiny_folder: Path) -> None:
    shelf = Shelf(device="cpu", offload="auto")
    placed = shelf.placement(shelf.find(str(tiny_folder))).values()
    assert {mode for _, mode in placed} == {"resident"}, "no limit on a CPU unless one is given"
    needs = [need for need, _ in placed]
    for mode in MODES:
        budget = peak([(need, mode) for need in needs])
        shelf = Shelf(device="cpu", vram=budget)
        model = shelf.load(str(tiny_folder))
        assert {mode for _, mode in shelf.placement(shelf.find(str(tiny_folder))).values()} == {mode}
        assert where(model.unet) == mode
        assert shelf.load(str(tiny_folder)).unet is model.unet
    with pytest.raises(BadInput, match="does not fit into 1 MiB of device memory"):
        Shelf(device="cpu", vram="1M").load(str(tiny_folder))
    assert where(Shelf(device="cpu", vram="1M", offload="model").load(str(tiny_folder)).unet) == "model", "taken as given"


def where(network: torch.nn.Module) -> str:
    if any(p.device.type == "meta" for p in network.parameters()):
        return "layer"
    return "model" if hasattr(network, "_hf_hook") else "resident"


# --- the modes compute the same


def sd_results(model: Model, picture: Image.Image) -> Iterator[torch.Tensor]:
    cond = encode_text(model, ["a red barn", "a castle"])
    assert cond.context is not None
    skipped = encode_text(model, "a red barn", clip_skip=1).context
    assert skipped is not None
    yield from (cond.context, skipped)
    latents = encode_image(model, picture, seeds=[0])
    schedule = model.schedule(4)[2:]
    noisy = add_noise(latents, schedule, unit_noise(latents))
    yield from (
        latents.x,
        model.denoiser(noisy.x, schedule.sigmas[0], schedule.timesteps[0], encode_text(model, "a castle")).x0,
    )
    yield decode_tensor(model, latents)


@pytest.mark.parametrize("mode", ["model", "layer"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_mode_computes_the_same(
    tiny_folder: Path, picture: Image.Image, mode: memory.Offload, dtype: torch.dtype
) -> None:
    wanted = list(sd_results(Shelf(device="cpu", dtype=dtype, offload="resident").load(str(tiny_folder)), picture))
    model = Shelf(device="cpu", dtype=dtype, offload=mode).load(str(tiny_folder))
    assert where(model.unet) == where(model.vae) == where(model.text_encoder) == mode
    for _ in range(2):  # the second time everything has been moved before
        assert all(torch.equal(a, b) for a, b in zip(wanted, sd_results(model, picture), strict=True))
    assert {model.unet.dtype, model.vae.dtype, model.text_encoder.dtype} == {dtype}, "also after a VAE in float32"
    assert model.device == CPU


@pytest.mark.parametrize("mode", ["model", "layer"])
def test_every_mode_computes_the_same_with_kandinsky(
    kandinsky: tuple[Path, Path], picture: Image.Image, mode: memory.Offload
) -> None:
    def results(shelf: Shelf) -> list[torch.Tensor]:
        decoder, prior = shelf.load(str(kandinsky[0])), shelf.load_prior(str(kandinsky[1]))
        made, seen = sample_prior(prior, "a castle", seeds=[0], steps=2), embed_image(prior, picture)
        latents = encode_image(decoder, picture, seeds=[0])
        out = decoder.denoiser(latents.x, 1.0, 500.0, made).x0
        return [
            *(e for e in (made.image_embeds, seen.image_embeds) if e is not None),
            latents.x,
            out,
            decode_tensor(decoder, latents),
        ]

    wanted, got = results(Shelf(device="cpu")), results(Shelf(device="cpu", offload=mode))
    assert len(got) == 5
    assert all(torch.equal(a, b) for a, b in zip(wanted, got, strict=True))


# --- model by model: what is fetched, and when


class Moves(torch.nn.Linear):
    """Says where it is sent."""

    def __init__(self, log: list[tuple[str, str]], name: str) -> None:
        super().__init__(1, 1)
        self.log, self.name = log, name

    def to(self, *args: Any, **kwargs: Any) -> Any:
        self.log.append((self.name, str(args[0])))
        return self


def test_one_component_at_a_time_is_on_the_device() -> None:
    """With a device that is only a word, since there is no second one on a CPU."""
    log: list[tuple[str, str]] = []
    placement = Placement(torch.device("meta"), "model")
    text, unet = Moves(log, "text"), Moves(log, "unet")
    for network in (text, unet):
        placement.put(network, "model")
    assert log == [], "nothing is moved before it runs"
    for network in (text, text, unet, unet, text):
        network(torch.zeros(1))
    assert log == [("text", "meta"), ("text", "cpu"), ("unet", "meta"), ("unet", "cpu"), ("text", "meta")]


def test_a_component_that_does_not_fit_is_taken_back() -> None:
    log: list[tuple[str, str]] = []

    class Full(Moves):
        def to(self, *args: Any, **kwargs: Any) -> Any:
            super().to(*args, **kwargs)
            if len(log) == 1:
                raise torch.OutOfMemoryError("no room")
            return self

    placement, network = Placement(torch.device("meta"), "model"), Full(log, "unet")
    placement.put(network, "model")
    with pytest.raises(torch.OutOfMemoryError):
        network(torch.zeros(1))
    network(torch.zeros(1))
    assert log == [("unet", "meta"), ("unet", "cpu"), ("unet", "meta")]


@pytest.mark.parametrize("family", ["AutoencoderKL", "VQModel"])
def test_encode_and_decode_fetch_the_vae(
    tiny_folder: Path, kandinsky: tuple[Path, Path], picture: Image.Image, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are no forward: diffusers' apply_forward_hook has to ask ours."""
    fetched: list[str] = []
    fetch = Placement._fetch

    def watched(self: Placement, part: torch.nn.Module) -> None:
        fetched.append(type(part).__name__)
        fetch(self, part)

    monkeypatch.setattr(Placement, "_fetch", watched)
    model = Shelf(device="cpu", offload="model").load(str(tiny_folder if family == "AutoencoderKL" else kandinsky[0]))
    latents = encode_image(model, picture, seeds=[0])
    assert fetched == [family]
    decode_tensor(model, latents)
    assert fetched == [family] * 2


def test_a_layer_has_its_weights_for_its_own_call_alone(tiny_folder: Path) -> None:
    model = Shelf(device="cpu", offload="layer").load(str(tiny_folder))
    assert all(p.device.type == "meta" for p in model.unet.parameters())
    seen: list[tuple[int, int]] = []

    def counted(*args: torch.Tensor) -> Any:
        real = [p.device.type == "cpu" for p in model.unet.parameters()]
        seen.append((sum(real), len(real)))
        return forward(*args)

    inner = model.unet.mid_block.resnets[0].conv1
    forward = inner._old_forward
    inner._old_forward = counted
    model.denoiser(torch.zeros(1, 4, 8, 8), 1.0, 500.0, encode_text(model, "a castle"))
    assert seen == [(2, len(list(model.unet.parameters())))], "weight and bias of this layer, and no other's"
    assert all(p.device.type == "meta" for p in model.unet.parameters())


def test_tied_weights_stay_tied_and_right() -> None:
    torch.manual_seed(0)
    first, second = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    second.weight = first.weight
    network = torch.nn.Sequential(first, torch.nn.Sequential(second))
    x = torch.rand(2, 3)
    with torch.no_grad():
        wanted = network(x)
        Placement(CPU).put(network, "layer")
        assert torch.equal(network(x), wanted)


def test_tensors_used_outside_forward_stay(kandinsky: tuple[Path, Path]) -> None:
    prior = Shelf(device="cpu", offload="layer").load_prior(str(kandinsky[1]))
    assert {prior.prior.clip_mean.device, prior.prior.clip_std.device} == {CPU}


# --- freeing


def watch(model: Model | Prior) -> dict[str, weakref.ref[torch.nn.Module]]:
    return {name: weakref.ref(part) for name, part in vars(model).items() if isinstance(part, torch.nn.Module)}


@pytest.fixture
def other_unet(broken: Path, tiny_folder: Path) -> Path:
    """The tiny checkpoint with another UNet."""
    shutil.rmtree(broken / "unet")
    UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(tiny_folder / "unet")).save_pretrained(broken / "unet")
    return broken


@pytest.mark.parametrize("mode", MODES)
def test_what_no_kept_model_needs_is_freed(tiny_folder: Path, other_unet: Path, mode: memory.Offload) -> None:
    shelf = Shelf(device="cpu", offload=mode)
    first, second = shelf.load(str(tiny_folder)), shelf.load(str(other_unet))
    assert first.vae is second.vae
    encode_text(first, "a castle")  # hooks have run
    first.denoiser(torch.zeros(1, 4, 8, 8), 1.0, 500.0, Conditioning(context=torch.zeros(1, 77, 32)))
    gone, stays, size = watch(first), watch(second), sum(p.nbytes for p in first.unet.parameters())
    del first
    assert shelf.keep(str(other_unet)) == size
    assert {name: part() is None for name, part in gone.items()} == {"text_encoder": False, "unet": True, "vae": False}
    assert all(part() is not None for part in stays.values())
    assert shelf.load(str(other_unet)).unet is second.unet
    del second
    assert shelf.keep() > 0
    assert all(part() is None for part in stays.values())


def test_a_model_not_loaded_yet_keeps_what_it_will_share(tiny_folder: Path, other_unet: Path) -> None:
    shelf = Shelf(device="cpu")
    first = watch(shelf.load(str(tiny_folder)))
    shelf.keep(str(other_unet))
    assert {name: part() is None for name, part in first.items()} == {"text_encoder": False, "unet": True, "vae": False}


def test_borrowed_components_are_kept_by_source(tiny_folder: Path, other_unet: Path) -> None:
    shelf = Shelf(device="cpu")
    parts = watch(shelf.load(str(tiny_folder)))
    shelf.keep(shelf.find(str(other_unet), {"unet": str(tiny_folder)}, weights=False))
    assert all(part() is not None for part in parts.values())


def test_a_component_still_in_use_is_not_counted_as_freed(tiny_folder: Path) -> None:
    shelf = Shelf(device="cpu")
    model = shelf.load(str(tiny_folder))
    assert shelf.keep() == 0
    assert shelf.load(str(tiny_folder)).unet is not model.unet, "forgotten all the same"


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's count of resident pages")
def test_memory_really_falls(broken: Path) -> None:
    shutil.rmtree(broken / "unet")
    options = {"cross_attention_dim": 32, "layers_per_block": 1, "norm_num_groups": 8, "sample_size": 8}
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    with torch.device("meta"):
        unet = UNet2DConditionModel(block_out_channels=(768,), **blocks, **options)
    for parameter in unet.to_empty(device="cpu").parameters():
        torch.nn.init.ones_(parameter)
    unet.save_pretrained(broken / "unet")
    size = sum(p.nbytes for p in unet.parameters())
    del unet
    gc.collect()

    def used() -> int:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    shelf = Shelf(device="cpu")
    total = sum(float(p.sum()) for p in shelf.load(str(broken)).unet.parameters())  # reads every page
    loaded = used()
    freed = shelf.keep()
    assert total == size / 4
    assert size > 150 * 2**20
    assert freed >= size
    # Against the loaded state: what other tests left behind may go at any time.
    assert loaded - used() > 0.9 * size
