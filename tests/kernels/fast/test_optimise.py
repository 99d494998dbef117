"""An optimised network computes what it did, and is what it was once it is undone."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from unrolled.core.errors import BadInput
from unrolled.core.loading import Model, Shelf
from unrolled.core.source import MINIATURES
from unrolled.kernels.fast import fast_of, optimise

TOLERANCE = 1e-5
Call = Callable[..., Tensor]
Off = Callable[[Tensor, Tensor], float]
OPTIONS = [dict(zip(("channels_last", "fuse_qkv"), on, strict=True)) for on in itertools.product((True, False), repeat=2)]


def weights(network: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) and a[name].stride() == b[name].stride() for name in a)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_system_computes_the_same(model: Model, call: Call, off: Off, options: dict[str, Any]) -> None:
    plain, before = call(model), weights(model.unet)
    with optimise(model.unet, **options) as made:
        fast = call(model)
        assert off(fast, plain) < TOLERANCE
        assert torch.equal(fast, call(model)), "twice the same, bit for bit"
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.unet.state_dict().items())
        assert not options["fuse_qkv"] or len(made.shared.fused) > 3
    assert torch.equal(call(model), plain), "undone, bit for bit"
    assert same(weights(model.unet), before)
    assert not any({"forward", "_apply"} & m.__dict__.keys() for m in model.unet.modules())
    assert fast_of(model.unet) is None
    made.undo()  # twice is no fault


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize("model", ["tiny", "tiny_kandinsky"], indirect=True)
def test_backends_of_attention(model: Model, call: Call, off: Off, backend: Any) -> None:
    plain = call(model)
    with optimise(model.unet, attention=backend):
        assert off(call(model), plain) < TOLERANCE


def test_every_vae_computes_the_same(model: Model, off: Off) -> None:
    vae, draw = model.vae, torch.Generator().manual_seed(0)
    z, picture = torch.randn(2, 4, 8, 8, generator=draw), torch.randn(1, 3, 64, 64, generator=draw)

    def both() -> tuple[Tensor, Tensor]:
        movq = model.space.family == "VQModel"
        with torch.no_grad():
            decoded = vae.decode(z, return_dict=False, **({"force_not_quantize": True} if movq else {}))[0]
            encoded = vae.encode(picture, return_dict=False)[0]
        return decoded, encoded if movq else encoded.mean

    (plain, code), before = both(), weights(vae)
    with optimise(vae):
        fast, fast_code = both()
        assert off(fast, plain) < TOLERANCE
        assert off(fast_code, code) < TOLERANCE
    assert all(map(torch.equal, both(), (plain, code)))
    assert same(weights(vae), before)


@pytest.mark.parametrize("name", sorted(f.parent.name for f in MINIATURES.glob("*/unet")))
def test_trained_miniatures(name: str, off: Off, conditioning_of: Callable[..., Any]) -> None:
    model = Shelf(device="cpu").load(name)
    shape = model.unet.config.sample_size
    x, cond = torch.randn(2, 4, shape, shape), conditioning_of(model, 0, 2)
    if cond.channels is not None:
        cond = replace(cond, channels=torch.randn(2, cond.channels.shape[1], shape, shape))

    def out() -> Tensor:
        with torch.no_grad():
            return model.denoiser(x, 2.0, 300.0, cond).out

    plain = out()
    with optimise(model.unet) as made:
        assert off(out(), plain) < TOLERANCE
        assert made.replaced["Attention"] > 0 or made.replaced["ResnetBlock2D"] > 0


@pytest.mark.parametrize("size", [(15, 13), (16, 10)])
def test_odd_sizes(sd: Model, off: Off, size: tuple[int, int]) -> None:
    x, context = torch.randn(1, 4, *size), torch.randn(1, 77, 32)
    with torch.no_grad():
        plain = sd.unet(x, 3, context).sample
        with optimise(sd.unet):
            assert off(sd.unet(x, 3, context).sample, plain) < TOLERANCE


# --- what a network may go through while it is fast


def test_other_weights_are_loaded_in_place(model: Model, call: Call, off: Off) -> None:
    other = {name: tensor * 1.5 for name, tensor in weights(model.unet).items()}
    plain = replace(model, unet=copy.deepcopy(model.unet))
    plain.unet.load_state_dict(other)
    with optimise(model.unet):
        first = call(model)
        model.unet.load_state_dict(other)
        assert off(call(model), call(plain)) < TOLERANCE
        assert off(first, call(plain)) > 0.01
    assert same(weights(model.unet), weights(plain.unet))
    assert torch.equal(call(model), call(plain))


def test_loaded_by_assignment_the_weights_are_used_one_by_one(sd: Model, call: Call, off: Off) -> None:
    other = {name: tensor * 1.5 for name, tensor in weights(sd.unet).items()}
    with optimise(sd.unet) as made:
        sd.unet.load_state_dict(other, assign=True)
        assert not any(fused.whole() for fused in made.shared.fused.values())
        fast = call(sd)
    assert off(fast, call(sd)) < TOLERANCE


def test_moved_or_cast_the_weights_are_laid_out_as_one_again(sd: Model, off: Off) -> None:
    with optimise(sd.unet) as made:
        sd.unet.to(torch.float64)
        assert all(fused.whole() and fused.weight.dtype == torch.float64 for fused in made.shared.fused.values())
        x, context = torch.randn(1, 4, 8, 8).double(), torch.randn(1, 77, 32).double()
        with torch.no_grad():
            fast = sd.unet(x, 3, context).sample
    with torch.no_grad():
        assert off(fast, sd.unet(x, 3, context).sample) < 1e-12


def test_a_copy_is_another_network(sd: Model, call: Call, off: Off) -> None:
    with optimise(sd.unet):
        other = replace(sd, unet=copy.deepcopy(sd.unet))
        fast = call(sd)
        with torch.no_grad():
            for parameter in other.unet.parameters():
                parameter.mul_(1.5)
        assert torch.equal(call(sd), fast)
        changed = call(other)
    plain = replace(sd, unet=copy.deepcopy(sd.unet))
    plain.unet.load_state_dict(other.unet.state_dict())
    assert off(changed, call(plain)) < TOLERANCE


def test_a_copy_is_undone_by_itself(sd: Model, call: Call) -> None:
    plain = call(sd)
    with optimise(sd.unet) as made:
        fast, other = call(sd), replace(sd, unet=copy.deepcopy(sd.unet))
        of_copy = fast_of(other.unet)
        assert of_copy is not None
        assert of_copy is not made
        assert of_copy.network is other.unet
        of_copy.undo()
        assert fast_of(other.unet) is None
        assert not any({"forward", "_apply"} & vars(m).keys() for m in other.unet.modules())
        assert torch.equal(call(other), plain)
        assert fast_of(sd.unet) is made
        assert torch.equal(call(sd), fast)


def test_a_forward_put_around_ours_stays(sd: Model, call: Call, off: Off) -> None:
    """accelerate's hooks of offloading are such."""
    plain, calls = call(sd), []
    with optimise(sd.unet):
        ours = sd.unet.forward

        def theirs(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            return ours(*args, **kwargs)

        sd.unet.forward = theirs
    assert off(call(sd), plain) < TOLERANCE
    assert calls == [1]


def test_a_fast_network_is_saved_as_any_other(sd: Model, call: Call, tmp_path: Path) -> None:
    before = weights(sd.unet)
    with optimise(sd.unet):
        sd.unet.save_pretrained(tmp_path)
    assert all(torch.equal(t, before[n]) for n, t in UNet2DConditionModel.from_pretrained(tmp_path).state_dict().items())


@pytest.mark.parametrize("wanted", ["input", "weights"])
def test_gradients(model: Model, off: Off, conditioning_of: Callable[..., Any], wanted: str) -> None:
    cond = conditioning_of(model, 0)
    start = torch.randn(1, 4, 16, 16)

    def gradients() -> list[Tensor]:
        x = start.clone().requires_grad_(wanted == "input")
        model.unet.zero_grad()
        model.unet.requires_grad_(wanted == "weights")
        model.denoiser(x, 2.0, 300.0, cond).out.square().sum().backward()  # type: ignore[no-untyped-call]
        if wanted == "input":
            assert x.grad is not None
            return [x.grad]
        return [p.grad.clone() for p in model.unet.parameters() if p.grad is not None]

    plain = gradients()
    with optimise(model.unet):
        fast = gradients()
    scale = max(float(g.abs().max()) for g in plain)
    assert len(fast) == len(plain) > 0
    assert max(float((a - b).abs().max()) for a, b in zip(fast, plain, strict=True)) < 1e-4 * scale


# --- arguments that few give


def test_a_controlnets_residuals_and_masks_are_honoured(sd: Model, off: Off) -> None:
    x, context, draw = torch.randn(1, 4, 8, 8), torch.randn(1, 77, 32), torch.Generator().manual_seed(1)

    def some(*shape: int) -> Tensor:
        return torch.randn(1, *shape, generator=draw)

    down = (some(32, 8, 8), some(32, 8, 8), some(32, 4, 4), some(64, 4, 4))
    given: list[dict[str, Any]] = [
        {"down_block_additional_residuals": down, "mid_block_additional_residual": some(64, 4, 4)},
        {"encoder_attention_mask": torch.arange(77)[None] < 9},
        {"return_dict": False},
    ]
    with torch.no_grad():
        bare = sd.unet(x, 3, context).sample
        for more in given:
            plain = sd.unet(x, 3, context, **more)[0]
            with optimise(sd.unet):
                assert off(sd.unet(x, 3, context, **more)[0], plain) < TOLERANCE
            assert torch.equal(plain, bare) == ("return_dict" in more)


def test_dropout_drops(sd: Model, call: Call) -> None:
    for m in sd.unet.modules():
        if isinstance(m, torch.nn.Dropout):
            m.p = 0.5
    sd.unet.train()
    with optimise(sd.unet), pytest.warns(match="the dropout behind it drops"):
        assert not torch.equal(call(sd), call(sd))


# --- errors


def test_a_network_is_optimised_once(sd: Model) -> None:
    with optimise(sd.unet), pytest.raises(BadInput, match="This UNet2DConditionModel is optimised already: undo that first"):
        optimise(sd.unet)


def test_a_backend_that_cannot_run_is_refused_at_once(sd: Model) -> None:
    with pytest.raises(BadInput, match="There is no attention 'flash'"):
        optimise(sd.unet, attention="flash")  # type: ignore[arg-type]
    assert fast_of(sd.unet) is None
