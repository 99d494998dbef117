import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from unrolled.core import memory
from unrolled.core.errors import BadInput
from unrolled.core.loading import Shelf
from unrolled.core.memory import Need, choose, peak, read_bytes, read_need, show_bytes

TEXT, UNET, VAE = Need("text_encoder", 200, 50, 1), Need("unet", 1000, 30, 100), Need("vae", 100, 10, 400)


# --- what is planned


def test_the_worst_moment_of_each_mode() -> None:
    assert peak([]) == 0
    assert peak([(need, "resident") for need in (TEXT, UNET, VAE)]) == 200 + 1000 + 100 + 400
    assert peak([(need, "model") for need in (TEXT, UNET, VAE)]) == 1000 + 100
    assert peak([(need, "layer") for need in (TEXT, UNET, VAE)]) == 400 + 10


def test_a_component_of_another_model_stays_while_this_one_runs() -> None:
    assert peak([(UNET, "resident"), (TEXT, "model"), (VAE, "layer")]) == 1000 + max(200 + 100, 200 + 1, 200 + 400 + 10)


@pytest.mark.parametrize(
    ("budget", "mode"), [(1700, "resident"), (1699, "model"), (1100, "model"), (1099, "layer"), (410, "layer")]
)
def test_the_fastest_mode_that_fits_is_chosen(budget: int, mode: str) -> None:
    assert choose("sd", [TEXT, UNET, VAE], [], budget) == mode


def test_what_is_held_counts() -> None:
    held: list[tuple[Need, memory.Mode]] = [(TEXT, "resident"), (VAE, "resident")]
    assert choose("sd", [UNET], held, 1700) == "resident"
    assert choose("sd", [UNET, UNET], held, 1700) == "model"


def test_what_fits_in_no_mode_is_told_with_what_it_needs() -> None:
    big = [Need(n.part, n.weights * 2**20, n.layer * 2**20, n.work * 2**20) for n in (TEXT, UNET, VAE)]
    with pytest.raises(
        BadInput, match=r"sd-1\.5 does not fit into 300 MiB of device memory: it needs 410 MiB layer by layer, "
    ) as error:
        choose("sd-1.5", big, [], 300 * 2**20)
    assert "1.1 GiB component by component, 1.7 GiB all at once: raise --vram" in str(error.value)
    with pytest.raises(BadInput, match=r"2.0 GiB of it held by models loaded before \(Shelf.keep frees them\)"):
        choose("sd-1.5", big, [(Need("unet", 2 * 2**30, 1, 1), "resident")], 300 * 2**20)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_needs_are_those_of_the_loaded_components(tiny_folder: Path, dtype: torch.dtype) -> None:
    shelf = Shelf(device="cpu", dtype=dtype)
    source = shelf.find(str(tiny_folder))
    model = shelf.load(str(tiny_folder))
    for part in ("text_encoder", "unet", "vae"):
        network = getattr(model, part)
        upcast = 2 if dtype == torch.float16 and part == "vae" else 1  # it runs in float32
        need = read_need(source.part(part), dtype)
        assert need.weights == upcast * sum(p.numel() * p.element_size() for p in network.parameters())
        own = [sum(p.numel() * p.element_size() for p in m.parameters(recurse=False)) for m in network.modules()]
        assert need.layer == upcast * max(own)


def test_work_grows_with_the_pictures(tiny_folder: Path) -> None:
    source = Shelf(device="cpu").find(str(tiny_folder))

    def work(part: str, size: tuple[int, int] = (64, 64), batch: int = 1) -> int:
        return read_need(source.part(part), torch.float32, size, 8, batch).work

    assert work("unet") == 32 * 2 * 8 * 8 * 32 * 4
    assert (work("unet", (128, 64)), work("unet", batch=3)) == (2 * work("unet"), 3 * work("unet"))
    assert work("vae") == work("vae", batch=3) == 8 * 64 * 64 * 8 * 4
    assert work("vae", (4096, 4096)) == work("vae", (1536, 1536)), "decoded in tiles"


def test_the_estimates_hold_for_the_structures_of_sd15(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tensors alive at once, counted on the meta device; attention keeps no scores there, as on CUDA."""
    unet = {
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        "block_out_channels": (320, 640, 1280, 1280),
        "cross_attention_dim": 768,
    }
    vae = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
    }
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda q, k, v, **_: torch.empty_like(q))
    with torch.device("meta"), torch.no_grad():
        networks = UNet2DConditionModel(**unet), AutoencoderKL(**vae)
        with Live(networks[0]) as live:
            networks[0](torch.empty(2, 4, 32, 32), torch.empty(()), torch.empty(2, 77, 768))
        assert 0.75 < live.peak / (memory.WORK["unet"] * 2 * 32 * 32 * 320 * 4) < 1
        with Live(networks[1]) as live:
            networks[1].decode(torch.empty(1, 4, 32, 32))
        assert 0.7 < live.peak / (memory.WORK["vae"] * 256 * 256 * 128 * 4) < 1


class Live(torch.utils._python_dispatch.TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors made and alive, a network's own left out."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak, self.alive = 0, {p.untyped_storage()._cdata: 0 for p in (*network.parameters(), *network.buffers())}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.alive:
                    self.alive[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.alive.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self.alive.values()))
        return made


@pytest.mark.parametrize(
    ("text", "count"), [("8G", 8 * 2**30), ("7.5 GiB", 7.5 * 2**30), ("900m", 900 * 2**20), ("512KB", 2**19), ("1000", 1000)]
)
def test_sizes_of_memory(text: str, count: float) -> None:
    assert read_bytes(text) == count


@pytest.mark.parametrize("text", ["", "G", "8 apples", "-1G", "8GG", "1,5G"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(BadInput, match="is no size of memory: give a number with K, M or G, such as 8G"):
        read_bytes(text)


def test_bytes_are_shown_to_people() -> None:
    assert (show_bytes(5 * 2**20), show_bytes(2**30 * 3 // 2)) == ("5 MiB", "1.5 GiB")


def test_an_offload_that_there_is_not() -> None:
    with pytest.raises(BadInput, match="There is no offload 'disk': use auto, resident, model, layer"):
        Shelf(device="cpu", offload="disk")  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="vram must be above 0 bytes, got 0"):
        Shelf(device="cpu", vram=0)
