import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from unrolled.core.errors import BadInput, CannotWrite, NonFinite, SpaceMismatch
from unrolled.core.latents import Latents, LatentSpace, batch
from unrolled.core.loading import Model
from unrolled.core.solver import Past
from unrolled.stages.decode import decode


@pytest.fixture
def noisy(space: LatentSpace) -> Latents:
    """Three latents in the middle of a run, with a history of two points."""
    torch.manual_seed(1)
    past = tuple(Past(sigma, torch.randn(3, 4, 2, 5), torch.randn(3, 4, 2, 5)) for sigma in (9.7, 5.1))
    return Latents(torch.randn(3, 4, 2, 5), space, 2.5, (7, -1, 2**40), "detail", past)


def same(a: Latents, b: Latents) -> bool:
    pairs = [(a.x, b.x), *((p.x, q.x) for p, q in zip(a.history, b.history, strict=True))]
    pairs += [(p.x0, q.x0) for p, q in zip(a.history, b.history, strict=True)]
    facts = [(v.space, v.sigma, v.seeds, v.stream, [p.sigma for p in v.history]) for v in (a, b)]
    return facts[0] == facts[1] and all(s.dtype == t.dtype and torch.equal(s, t) for s, t in pairs)


def test_repr_says_everything_in_one_line(noisy: Latents) -> None:
    assert repr(noisy) == (
        "Latents(3x4x2x5 float32 cpu space=[AutoencoderKL/8 01234567] sigma=2.5 noisy, "
        "history=2, seeds=[7, -1, 1099511627776])"
    )
    assert " float16 " in repr(replace(noisy, x=noisy.x.half()))
    assert "sigma=0 clean" in repr(replace(noisy, sigma=0.0))


def test_size_is_in_pixels(noisy: Latents) -> None:
    assert noisy.size == (16, 40)
    assert len(noisy) == 3


@pytest.mark.parametrize("shape", [(4, 2, 5), (1, 3, 2, 5), (1, 1, 4, 2, 5)])
def test_the_tensor_must_fit_the_space(space: LatentSpace, shape: tuple[int, ...]) -> None:
    with pytest.raises(BadInput, match=r"AutoencoderKL/8 01234567\] are \(batch, 4, height, width\), but .* is \("):
        Latents(torch.zeros(shape), space)


def test_one_seed_per_image(space: LatentSpace) -> None:
    with pytest.raises(BadInput, match="2 latents were given with 3 seeds: one seed per image"):
        Latents(torch.zeros(2, 4, 2, 2), space, seeds=(1, 2, 3))


@pytest.mark.parametrize(
    "change", [{"fingerprint": "fedcba9876543210"}, {"scaling": 0.13}, {"downscale": 4}, {"family": "VQModel"}]
)
def test_another_space_is_refused_and_both_are_named(space: LatentSpace, change: dict[str, object]) -> None:
    other = replace(space, **change)  # type: ignore[arg-type]
    space.require(space, "It")
    with pytest.raises(SpaceMismatch) as caught:
        space.require(other, "The refiner")
    mine, others = f"{space}", f"{other}"
    if mine == others:
        mine, others = f"{mine}, scaled by 0.18215", f"{others}, scaled by 0.13"
    assert str(caught.value) == (
        f"The refiner works in latent space [{mine}] but was given latents of [{others}]: "
        'decode and encode in between (via = "pixels" in a chain).'
    )


def test_decode_refuses_latents_of_another_space(tiny: Model, space: LatentSpace) -> None:
    with pytest.raises(SpaceMismatch, match=r"The VAE of .*tiny works in latent space \[AutoencoderKL/8 .*given latents of"):
        decode(tiny, Latents(torch.zeros(1, 4, 8, 8), space))


def test_decode_refuses_noisy_latents(tiny: Model) -> None:
    noisy = Latents(torch.zeros(1, 4, 8, 8), tiny.space, sigma=1.234)
    with pytest.raises(BadInput, match=r"Cannot decode latents .* sigma 1\.234 \(clean is at most 0\): denoise .*preview"):
        decode(tiny, noisy)


@pytest.mark.parametrize(
    ("sigma", "end", "clean"), [(0.0, 0.0, True), (0.0292, 0.0292, True), (0.0413, 0.0292, False), (0.0292, 0.0, False)]
)
def test_what_a_finished_schedule_leaves_counts_as_clean(space: LatentSpace, sigma: float, end: float, clean: bool) -> None:
    assert Latents(torch.zeros(1, 4, 2, 2), space, sigma, end=end).is_clean is clean


def test_the_lowest_training_noise_is_scaled_back(space: LatentSpace) -> None:
    latents = Latents(torch.ones(1, 4, 2, 2), space, sigma=0.03, end=0.03)
    torch.testing.assert_close(latents.unscaled, torch.full((1, 4, 2, 2), 1 / (0.18215 * (1 + 0.03**2) ** 0.5)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_saved_and_loaded_bit_for_bit(noisy: Latents, tmp_path: Path, dtype: torch.dtype) -> None:
    noisy = replace(noisy, x=noisy.x.to(dtype), sigma=0.1 + 0.2)
    noisy.save(tmp_path / "new folder" / "l.safetensors")
    assert same(Latents.load(tmp_path / "new folder" / "l.safetensors"), noisy)


def test_views_are_saved_as_what_they_show(noisy: Latents, tmp_path: Path) -> None:
    turned = replace(noisy, x=noisy.x.transpose(2, 3), history=())
    turned.save(tmp_path / "l.safetensors")
    assert same(Latents.load(tmp_path / "l.safetensors"), turned)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"There is no latents file at .*none\.safetensors\."):
        Latents.load(tmp_path / "none.safetensors")


@pytest.mark.parametrize("keep", [0, 5, 200, -3])
def test_a_truncated_file(noisy: Latents, tmp_path: Path, keep: int) -> None:
    path = tmp_path / "l.safetensors"
    noisy.save(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(BadInput, match=r"l\.safetensors is damaged and cannot be read as latents \("):
        Latents.load(path)


def test_a_foreign_safetensors_file(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1, 4, 2, 2)}, tmp_path / "lora.safetensors")
    with pytest.raises(BadInput, match=r"lora\.safetensors is a safetensors file but not one that Latents\.save wrote\."):
        Latents.load(tmp_path / "lora.safetensors")


@pytest.mark.parametrize("facts", ["", "{}", "[]", '{"history": [1.0]}', '{"history": [], "space": {"colour": 1}}'])
def test_a_file_whose_facts_are_damaged(tmp_path: Path, facts: str) -> None:
    path = tmp_path / "l.safetensors"
    save_file({"x": torch.zeros(1, 4, 2, 2)}, path, {"format": "unrolled-latents-1", "latents": facts})
    with pytest.raises(BadInput, match=r"l\.safetensors is damaged"):
        Latents.load(path)


def test_a_folder_in_the_way(noisy: Latents, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(CannotWrite, match=r"Could not write .*folder \(Is a directory\)"):
        noisy.save(tmp_path / "folder")
    assert os.listdir(tmp_path) == ["folder"]


def test_slices_and_batches_are_inverse(noisy: Latents) -> None:
    parts = [noisy[i : i + 1] for i in range(3)]
    assert parts[1].seeds == (-1,)
    assert torch.equal(parts[2].history[0].x0, noisy.history[0].x0[2:])
    assert same(batch(parts), noisy)
    assert same(noisy[1:], batch(parts[1:]))


def test_a_batch_of_one_space(noisy: Latents) -> None:
    other = replace(noisy, space=replace(noisy.space, fingerprint="x" * 16))
    with pytest.raises(SpaceMismatch, match=r"A batch works in latent space"):
        batch([noisy, other])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sigma": 1.0}, r"one noise level.*sigma 2\.5 and 1\."),
        ({"stream": "upscale"}, r"one stream of noise.*'detail' and 'upscale'"),
        ({"history": ()}, r"one history"),
        ({"x": torch.zeros(3, 4, 3, 5), "history": ()}, r"one size.*40x16 and 40x24"),
    ],
)
def test_what_cannot_be_one_batch(noisy: Latents, change: dict[str, object], message: str) -> None:
    first = replace(noisy, history=()) if "x" in change else noisy
    with pytest.raises(BadInput, match=message):
        batch([first, replace(noisy, **change)])  # type: ignore[arg-type]


def test_a_batch_keeps_histories_of_other_levels_apart(noisy: Latents) -> None:
    shifted = replace(noisy, history=tuple(replace(p, sigma=p.sigma + 1) for p in noisy.history))
    with pytest.raises(BadInput, match="one history"):
        batch([noisy, shifted])


def test_a_batch_of_nothing() -> None:
    with pytest.raises(BadInput, match="at least one"):
        batch([])


def test_nan_is_not_saved(space: LatentSpace, tmp_path: Path) -> None:
    with pytest.raises(NonFinite, match="hold NaN or infinity and are not worth saving"):
        Latents(torch.full((1, 4, 2, 2), torch.nan), space).save(tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


def test_handed_on_to_another_run(noisy: Latents) -> None:
    other = noisy.handed_on("refiner")
    assert (other.history, other.stream, other.seeds, other.sigma) == ((), "refiner", noisy.seeds, noisy.sigma)
    assert torch.equal(other.x, noisy.x)
