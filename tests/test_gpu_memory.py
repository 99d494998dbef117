"""On a CUDA device: what each way of placing components takes of it, and that all compute the same. `pytest -m gpu`."""

import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from unrolled.core.errors import BadInput
from unrolled.core.latents import Latents
from unrolled.core.loading import Model, Shelf
from unrolled.core.memory import Mode, peak
from unrolled.miniatures.full_size import write_full_size
from unrolled.miniatures.tiny_kandinsky import write_tiny_kandinsky, write_tiny_prior
from unrolled.stages.decode import decode_tensor
from unrolled.stages.image import encode_image
from unrolled.stages.noise import noise
from unrolled.stages.prior import embed_image, sample_prior
from unrolled.stages.text import encode_text

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
MODES: tuple[Mode, ...] = ("resident", "model", "layer")


@pytest.fixture(scope="module")
def full_size(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """SD 1.5's structure twice: another UNet, the same text encoder and VAE."""
    folder = tmp_path_factory.mktemp("full-size")
    first = write_full_size(folder / "first", "sd-1.5", 0, torch.float16)
    return first, write_full_size(folder / "second", "sd-1.5", 1, torch.float16, shared=first)


def paint(model: Model) -> torch.Tensor:
    """One step at 512x512, guided, and the decoder."""
    latents: Latents = noise(model, model.schedule(2), 512, 512, seeds=[0])
    cond = encode_text(model, ["a castle", ""])
    with torch.no_grad():
        x0 = model.denoiser(torch.cat([latents.x] * 2), latents.sigma, 999.0, cond).x0
    return decode_tensor(model, Latents(x0[:1] / x0[:1].std(), latents.space, 0.0, seeds=(0,)))


def fresh() -> int:
    """Forget former peaks; what is still allocated."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


@pytest.fixture
def peaks(full_size: tuple[Path, Path]) -> Callable[[Mode], tuple[int, torch.Tensor, int]]:
    def run(mode: Mode) -> tuple[int, torch.Tensor, int]:
        before = fresh()
        shelf = Shelf(device="cuda", dtype=torch.float16, offload=mode)
        estimate = peak(shelf.placement(shelf.find(str(full_size[0]))).values())
        pixels = paint(shelf.load(str(full_size[0]))).cpu()
        return torch.cuda.max_memory_allocated() - before, pixels, estimate

    return run


def test_each_mode_takes_less_and_computes_the_same(peaks: Callable[[Mode], tuple[int, torch.Tensor, int]]) -> None:
    taken = {mode: peaks(mode) for mode in MODES}
    print({mode: (real >> 20, estimate >> 20) for mode, (real, _, estimate) in taken.items()})
    assert taken["resident"][0] > taken["model"][0] > taken["layer"][0]
    for mode in MODES:
        torch.testing.assert_close(taken[mode][1], taken["resident"][1], rtol=0, atol=2 / 255)


@pytest.mark.parametrize("mode", MODES)
def test_the_plan_is_kept(peaks: Callable[[Mode], tuple[int, torch.Tensor, int]], mode: Mode) -> None:
    real, _, estimate = peaks(mode)
    assert 0.4 < real / estimate <= 1.0


@pytest.mark.parametrize("mode", ["model", "layer"])
def test_kandinsky_computes_the_same(tmp_path: Path, picture: Image.Image, mode: Mode) -> None:
    """Its prior has tensors of its own, used outside forward too."""
    folders = write_tiny_kandinsky(tmp_path / "decoder"), write_tiny_prior(tmp_path / "prior")

    def results(offload: Mode) -> list[torch.Tensor | None]:
        shelf = Shelf(device="cuda", dtype=torch.float32, offload=offload)
        decoder, prior = shelf.load(str(folders[0])), shelf.load_prior(str(folders[1]))
        made, seen = sample_prior(prior, "a castle", seeds=[0], steps=2), embed_image(prior, picture)
        latents = encode_image(decoder, picture, seeds=[0])
        with torch.no_grad():
            x0 = decoder.denoiser(latents.x, 1.0, 500.0, made).x0
        return [made.image_embeds, seen.image_embeds, latents.x, x0, decode_tensor(decoder, latents)]

    torch.testing.assert_close(results(mode), results("resident"), rtol=1e-3, atol=1e-4)


def test_one_component_at_a_time(full_size: tuple[Path, Path]) -> None:
    model = Shelf(device="cuda", dtype=torch.float16, offload="model").load(str(full_size[0]))
    parts = {"text_encoder": model.text_encoder, "unet": model.unet, "vae": model.vae}

    def there() -> set[str]:
        return {name for name, part in parts.items() if next(part.parameters()).device.type == "cuda"}

    assert there() == set()
    cond = encode_text(model, "a castle")
    assert there() == {"text_encoder"}
    x = noise(model, model.schedule(2), 64, 64, seeds=[0]).x
    with torch.no_grad():
        model.denoiser(x, 1.0, 999.0, cond)
    assert there() == {"unet"}
    decode_tensor(model, Latents(x / x.std(), model.space, 0.0, seeds=(0,)))
    assert there() == {"vae"}
    assert model.vae.dtype == torch.float16, "after decoding in float32"


@pytest.mark.parametrize("mode", MODES)
def test_what_is_not_kept_leaves_the_device(full_size: tuple[Path, Path], mode: Mode) -> None:
    before = fresh()
    shelf = Shelf(device="cuda", dtype=torch.float16, offload=mode)
    model = shelf.load(str(full_size[0]))
    encode_text(model, "a castle")
    full = torch.cuda.memory_allocated()
    unet = sum(p.nbytes for p in model.unet.parameters())
    del model
    assert shelf.keep(str(full_size[1])) == unet
    if mode == "resident":
        assert full - torch.cuda.memory_allocated() > 0.99 * unet
    shelf.keep()
    assert torch.cuda.memory_allocated() - before < 64 * 2**20


def test_without_a_budget_the_free_memory_decides(full_size: tuple[Path, Path]) -> None:
    shelf = Shelf(device="cuda", dtype=torch.float16)
    source = shelf.find(str(full_size[0]))
    needs = [need for need, _ in shelf.placement(source).values()]
    free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
    wanted = next(mode for mode in MODES if peak([(need, mode) for need in needs]) <= free)
    assert {mode for _, mode in shelf.placement(source).values()} == {wanted}
    with pytest.raises(BadInput, match="does not fit into 100 MiB of device memory"):
        Shelf(device="cuda", dtype=torch.float16, vram="100M").load(str(full_size[0]))


def test_attention_backends_agree_on_the_device(full_size: tuple[Path, Path]) -> None:
    sdpa, reference = (
        paint(Shelf(device="cuda", dtype=torch.float16, attention=name).load(str(full_size[0])))
        for name in ("sdpa", "reference")
    )
    assert (sdpa - reference).abs().mean() < 2 / 255
