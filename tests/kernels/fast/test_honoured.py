"""Whatever is put into a fast network later is honoured, and a Note says what runs unfused for it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import (
    Attention,
    AttnAddedKVProcessor,
    AttnProcessor,
    IPAdapterAttnProcessor2_0,
    SlicedAttnProcessor,
)
from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection
from torch import Tensor, nn
from unrolled.core.errors import Note
from unrolled.core.loading import Model
from unrolled.core.schedule import Schedule
from unrolled.kernels.fast import optimise, prepared

TOLERANCE = 1e-5
Call = Callable[..., Tensor]
Off = Callable[[Tensor, Tensor], float]
Change = Callable[[nn.Module], None]
SCHEDULE = Schedule((3.0, 1.0, 0.0), (400.0, 200.0))


class Lora(nn.Module):
    """What peft puts in the place of a layer: its base and a low-rank rest with a scale of its own."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base, self.scale = base, 2.0
        rows, columns = base.weight.flatten(1).shape  # type: ignore[operator]
        draw = torch.Generator().manual_seed(rows + columns)
        self.weight = nn.Parameter(0.1 * torch.randn(rows, columns, generator=draw))

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        out: Tensor = self.base(x, *args)
        if x.ndim == 4:
            return out + self.scale * nn.functional.conv2d(x, self.weight.view_as(self.base.weight))  # type: ignore[arg-type]
        return out + self.scale * nn.functional.linear(x, self.weight)


def adapt(*names: str) -> Change:
    """Put an adapter on every layer whose name ends so."""

    def change(network: nn.Module) -> None:
        for path in [n for n, m in network.named_modules() if n.endswith(names) and isinstance(m, nn.Linear | nn.Conv2d)]:
            parent, _, name = path.rpartition(".")
            owner = network.get_submodule(parent)
            setattr(owner, name, Lora(getattr(owner, name)))

    return change


def check(model: Model, change: Change, call: Call, off: Off, note: str | None) -> None:
    """Fast and then changed, the network is the plain one changed; with what is kept for a run as well."""
    before = call(model)
    plain = replace(model, unet=copy.deepcopy(model.unet))
    change(plain.unet)
    wanted = call(plain)
    assert off(wanted, before) > 1e-3, "the change changes something"
    with optimise(model.unet), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        kept = prepared(model.denoiser, SCHEDULE)
        call(model, denoiser=kept)
        change(model.unet)
        assert off(call(model), wanted) < TOLERANCE
        assert off(call(model, denoiser=kept), wanted) < TOLERANCE
    said = [str(w.message) for w in caught if issubclass(w.category, Note)]
    if note is None:
        assert said == [], "nothing runs unfused for it"
    else:
        assert any(note in sentence for sentence in said), said
        assert len(said) == len(set(said)), "each reason once"
    assert off(call(model), wanted) < TOLERANCE, "undone it is still there"


LORA = "it is a {} Lora".format(Lora.__module__.split(".")[0])


@pytest.mark.parametrize(
    ("names", "note"),
    [
        (("to_q",), f"to_q in it is not what it was: {LORA}"),
        (("to_k", "to_v"), f"to_k in it is not what it was: {LORA}"),
        (("attn2.to_v",), f"to_v in it is not what it was: {LORA}"),
        (("to_out.0", "net.0.proj", "net.2"), None),
        (("time_emb_proj", "linear_1"), None),
        (("proj_in", "proj_out"), f"proj_in: {LORA}"),
        (("conv_shortcut",), None),
    ],
    ids=str,
)
@pytest.mark.parametrize("model", ["tiny", "tiny_sdxl"], indirect=True)
def test_lora(model: Model, call: Call, off: Off, names: tuple[str, ...], note: str | None) -> None:
    check(model, adapt(*names), call, off, note)


@pytest.mark.parametrize("model", ["tiny_kandinsky"], indirect=True)
@pytest.mark.parametrize(
    ("name", "note"), [("add_v_proj", f"add_v_proj in it is not what it was: {LORA}"), ("image_embeds", None)]
)
def test_lora_on_kandinsky(model: Model, call: Call, off: Off, name: str, note: str | None) -> None:
    check(model, adapt(name), call, off, note)


def test_loras_scale_may_change_between_steps(sd: Model, call: Call, off: Off) -> None:
    adapt("to_k", "time_emb_proj", "linear_2")(sd.unet)
    plain = replace(sd, unet=copy.deepcopy(sd.unet))
    with optimise(sd.unet), pytest.warns(Note, match="to_k in it is not what it was"):  # noqa: PT031
        kept = prepared(sd.denoiser, SCHEDULE)
        for scale in (1.0, 3.0, 0.0):
            for network in (sd.unet, plain.unet):
                for m in network.modules():
                    if isinstance(m, Lora):
                        m.scale = scale
            assert off(call(sd, denoiser=kept), call(plain)) < TOLERANCE


# --- attention processors


class Cold:
    """Somebody's own processor: attention at a tenth of the temperature."""

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any) -> Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (
            part.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for part in (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context))
        )
        out = nn.functional.scaled_dot_product_attention(10 * q, k, v).transpose(1, 2).flatten(2)
        return attn.to_out[0](out)  # type: ignore[no-any-return]


def test_somebodys_processor(sd: Model, call: Call, off: Off) -> None:
    def change(network: Any) -> None:
        network.set_attn_processor(Cold())

    check(sd, change, call, off, "its attention processor is a Cold")


@pytest.mark.parametrize(
    ("processor", "name"), [(AttnProcessor(), "AttnProcessor"), (SlicedAttnProcessor(1), "SlicedAttnProcessor")]
)
def test_diffusers_other_processors(sd: Model, call: Call, off: Off, processor: Any, name: str) -> None:
    plain = call(sd)
    with optimise(sd.unet):
        sd.unet.set_attn_processor(processor)
        with pytest.warns(Note, match=f"its attention processor is a {name}"):
            fast = call(sd)
    assert off(fast, plain) < TOLERANCE


def test_a_processor_set_before_is_left_alone(sd: Model, call: Call) -> None:
    sd.unet.set_attn_processor(Cold())
    plain = call(sd)
    with optimise(sd.unet) as made:
        assert "Attention" not in made.replaced
        torch.testing.assert_close(call(sd), plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model", ["tiny_kandinsky"], indirect=True)
def test_a_processor_for_added_keys(model: Model, call: Call, off: Off) -> None:
    plain = call(model)
    with optimise(model.unet):
        model.unet.set_attn_processor(AttnAddedKVProcessor())
        with pytest.warns(Note, match="its attention processor is a AttnAddedKVProcessor"):
            fast = call(model)
    assert off(fast, plain) < TOLERANCE


def test_an_ip_adapter(sd: Model, off: Off) -> None:
    """Put on as diffusers' load_ip_adapter does: processors that are modules, another context, another configuration."""
    draw = torch.Generator().manual_seed(0)
    x, context, picture = (torch.randn(1, *shape, generator=draw) for shape in [(4, 8, 8), (77, 32), (1, 24)])

    def put_on(network: Any) -> None:
        torch.manual_seed(5)
        for name, layer in network.named_modules():
            if isinstance(layer, Attention) and name.endswith("attn2"):
                layer.set_processor(IPAdapterAttnProcessor2_0(layer.inner_dim, 32, num_tokens=(4,), scale=1.0))
        projection = ImageProjection(image_embed_dim=24, cross_attention_dim=32, num_image_text_embeds=4)
        network.encoder_hid_proj = MultiIPAdapterImageProjection([projection])
        network.config.encoder_hid_dim_type = "ip_image_proj"

    def out(network: Any) -> Tensor:
        given = {"image_embeds": [picture]}
        with torch.no_grad():
            return network(x, 3, context, added_cond_kwargs=given).sample  # type: ignore[no-any-return]

    plain = copy.deepcopy(sd.unet)
    without = out(plain)
    put_on(plain)
    with optimise(sd.unet):
        put_on(sd.unet)
        with pytest.warns(Note, match="its attention processor is a IPAdapterAttnProcessor2_0"):
            fast = out(sd.unet)
    assert off(fast, out(plain)) < TOLERANCE
    assert off(fast, without) > 1e-3


# --- hooks

HOOKED = [
    ("to_k", "to_k in it is not what it was: it has a hook"),
    ("conv1", None),
    ("norm2", "it has a hook"),
    ("nonlinearity", "of nonlinearity: it has a hook"),
    ("conv_norm_out", None),
    ("attn1", None),
    ("norm3", "of norm3: it has a hook"),
    ("proj_in", "of proj_in: it has a hook"),
    ("time_embedding", None),
    ("time_emb_proj", None),
    ("down_blocks.1", None),
]


@pytest.mark.parametrize(("name", "note"), HOOKED)
def test_a_hook_sees_and_changes_what_it_would(sd: Model, call: Call, off: Off, name: str, note: str | None) -> None:
    seen: list[list[Tensor]] = []

    def change(network: nn.Module) -> None:
        mine: list[Tensor] = []
        seen.append(mine)

        def hook(_: nn.Module, __: Any, out: Any) -> Any:
            first = out[0] if isinstance(out, tuple) else out
            mine.append(first)
            return (1.1 * first, *out[1:]) if isinstance(out, tuple) else 1.1 * first

        for path, m in network.named_modules():
            if path == name or path.endswith(f".{name}"):
                m.register_forward_hook(hook)

    check(sd, change, call, off, note)
    plain, fast = seen
    assert len(plain) > 0
    assert all(off(a, b) < 1e-4 for a, b in zip(fast, plain, strict=False))


@pytest.mark.parametrize("model", ["tiny_kandinsky"], indirect=True)
@pytest.mark.parametrize(
    ("name", "note"),
    [
        ("encoder_hid_proj", None),
        ("add_embedding", None),
        ("add_v_proj", "add_v_proj in it is not what it was: it has a hook"),
        ("group_norm", "a norm in it is not what it was: it has a hook"),
    ],
)
def test_a_hook_in_kandinskys(model: Model, call: Call, off: Off, name: str, note: str | None) -> None:
    def change(network: nn.Module) -> None:
        for path, m in network.named_modules():
            if path == name or path.endswith(f".{name}"):
                m.register_forward_hook(lambda _, __, out: 1.2 * out)

    check(model, change, call, off, note)


def test_a_hook_on_all_modules(sd: Model, call: Call, off: Off) -> None:
    seen: list[str] = []

    def names() -> list[str]:
        seen.clear()
        handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(type(m).__name__))
        try:
            out.append(call(sd))
        finally:
            handle.remove()
        return sorted(seen)

    out: list[Tensor] = []
    plain = names()
    with optimise(sd.unet), pytest.warns(Note, match="a hook is registered for all modules"):
        assert names() == plain
    assert off(out[1], out[0]) < TOLERANCE


def test_a_hook_that_is_taken_off_again_leaves_the_layer_fused(sd: Model, call: Call) -> None:
    with optimise(sd.unet):
        fast = call(sd)
        layer = next(m for n, m in sd.unet.named_modules() if n.endswith("to_q"))
        handle = layer.register_forward_pre_hook(lambda *_: None)
        with pytest.warns(Note, match="has a hook"):
            call(sd)
        handle.remove()
        assert torch.equal(call(sd), fast)


# --- quantised layers


class Tagged(Tensor):
    """A weight of a type of its own, as torchao's are."""


class Int8(nn.Linear):
    """What a library of quantised layers puts in place of a Linear."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None)
        self.bias = base.bias
        self.step = base.weight.detach().abs().max() / 7
        del self.weight
        self.register_buffer("codes", (base.weight.detach() / self.step).round().to(torch.int8))

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.codes * self.step, self.bias)  # type: ignore[operator]


@pytest.mark.parametrize("model", ["tiny", "tiny_sdxl"], indirect=True)
def test_layers_quantised_later(model: Model, call: Call, off: Off) -> None:
    def change(network: nn.Module) -> None:
        for path in [name for name, m in network.named_modules() if type(m) is nn.Linear]:
            parent, _, name = path.rpartition(".")
            setattr(network.get_submodule(parent), name, Int8(network.get_submodule(path)))  # type: ignore[arg-type]

    check(model, change, call, off, f"to_q in it is not what it was: it is a {Int8.__module__.split('.')[0]} Int8")


def test_a_weight_of_another_type(sd: Model, call: Call, off: Off) -> None:
    plain = call(sd)
    with optimise(sd.unet):
        for m in sd.unet.modules():
            if isinstance(m, Attention):
                m.to_k._parameters["weight"] = m.to_k.weight.detach().clone().as_subclass(Tagged)
        with pytest.warns(Note, match="its weight is a Tagged"):
            fast = call(sd)
    assert off(fast, plain) < TOLERANCE
