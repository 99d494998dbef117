"""Putting a backend of attention into networks of diffusers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention
from unrolled.core.errors import BadInput
from unrolled.core.loading import Model, Shelf
from unrolled.kernels.networks import set_attention
from unrolled.miniatures.tiny_kandinsky import write_tiny_kandinsky, write_tiny_prior


@pytest.fixture(scope="module")
def kandinsky(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("kandinsky")
    return write_tiny_kandinsky(folder / "decoder"), write_tiny_prior(folder / "prior")


def processors(network: Any) -> set[str]:
    return {type(layer.processor).__name__ for layer in network.modules() if isinstance(layer, Attention)}


@pytest.mark.parametrize(
    ("name", "plain", "added"),
    [
        (None, "AttnProcessor2_0", "AttnAddedKVProcessor2_0"),
        ("auto", "AttnProcessor2_0", "AttnAddedKVProcessor2_0"),
        ("sdpa", "AttnProcessor2_0", "AttnAddedKVProcessor2_0"),
        ("reference", "AttnProcessor", "AttnAddedKVProcessor"),
    ],
)
def test_every_network_gets_the_one_named(
    tiny_folder: Path, kandinsky: tuple[Path, Path], name: str | None, plain: str, added: str
) -> None:
    shelf = Shelf(device="cpu", attention=name)
    model, decoder, prior = shelf.load(str(tiny_folder)), shelf.load(str(kandinsky[0])), shelf.load_prior(str(kandinsky[1]))
    assert processors(model.unet) == processors(model.vae) == processors(prior.prior) == {plain}
    assert processors(decoder.unet) == {added}


def test_the_backends_agree(tiny_folder: Path) -> None:
    def out(name: str) -> torch.Tensor:
        model: Model = Shelf(device="cpu", attention=name).load(str(tiny_folder))
        x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            return model.unet(x, 1, torch.ones(2, 77, 32)).sample  # type: ignore[no-any-return]

    sdpa, reference = out("sdpa"), out("reference")
    assert torch.equal(sdpa, out("auto"))
    assert not torch.equal(sdpa, reference), "these are two ways to compute it"
    torch.testing.assert_close(sdpa, reference, rtol=1e-4, atol=1e-5)


def test_xformers_that_fails_when_it_is_put_in() -> None:
    class Network:
        def enable_xformers_memory_efficient_attention(self) -> None:
            raise NotImplementedError("No operator found for `memory_efficient_attention_forward`\nmore")

    with pytest.raises(
        BadInput, match=r"Attention 'xformers' cannot run here \(No operator found for .*_forward`\): use auto"
    ):
        set_attention(Network(), "xformers")
