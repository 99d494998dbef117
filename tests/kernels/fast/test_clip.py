"""An optimised CLIP encoder answers as it did: what looks back looks back only, and what is put on it is honoured."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)
from unrolled.core.errors import Note
from unrolled.core.loading import Shelf
from unrolled.core.source import MINIATURES
from unrolled.kernels.attention import attention
from unrolled.kernels.fast import clip, optimise
from unrolled.stages.text import encode_text

TOLERANCE = 1e-5
Off = Callable[[Tensor, Tensor], float]
SIZES: dict[str, int] = {
    "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 3, "projection_dim": 24,
}  # fmt: skip


def encoder(kind: str, **options: Any) -> Any:
    """A random one, whose attention is far from even."""
    torch.manual_seed(0)
    if kind == "picture":
        made: Any = CLIPVisionModelWithProjection(CLIPVisionConfig(**SIZES, image_size=24, patch_size=8, **options))
    else:
        classes = {"text": CLIPTextModel, "text, projected": CLIPTextModelWithProjection}
        made = classes[kind](CLIPTextConfig(**SIZES, vocab_size=99, max_position_embeddings=20, eos_token_id=98, **options))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.normal_(std=0.25).add_("norm" in name and name.endswith("weight"))
    return made.eval()


def inputs(kind: str, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    if kind == "picture":
        return torch.randn(2, 3, 24, 24, generator=draw)
    return torch.randint(0, 98, (2, 17), generator=draw).index_fill(1, torch.tensor([16]), 98)


def answer(network: Any, given: Tensor, **options: Any) -> list[Tensor]:
    """All that it returns."""
    with torch.no_grad():
        parts = network(given, output_hidden_states=True, return_dict=True, **options)
    pooled = parts.get("text_embeds", parts.get("image_embeds", parts.get("pooler_output")))
    return [parts.last_hidden_state, pooled, *parts.hidden_states]


def furthest(off: Off, ours: list[Tensor], theirs: list[Tensor]) -> float:
    return max(off(a, b) for a, b in zip(ours, theirs, strict=True))


KINDS = ["text", "text, projected", "picture"]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every attention that ours computed, with its options."""
    made: list[Any] = []
    plain = attention

    def counted(*args: Any, **options: Any) -> Tensor:
        made.append(options)
        return plain(*args, **options)

    monkeypatch.setattr(clip, "attention", counted)
    return made


@pytest.mark.parametrize("hidden_act", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("fuse_qkv", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_it_answers_the_same(off: Off, calls: list[Any], kind: str, fuse_qkv: bool, hidden_act: str) -> None:
    network, given = encoder(kind, hidden_act=hidden_act), inputs(kind)
    plain = answer(network, given)
    weights = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with optimise(network, fuse_qkv=fuse_qkv) as made:
        assert made.replaced["CLIPAttention"] == 3
        assert len(made.shared.fused) == 3 * fuse_qkv
        fast = answer(network, given)
        assert furthest(off, fast, plain) < TOLERANCE
        assert len(calls) == 3
        assert all((call["bias"] is not None) == kind.startswith("text") for call in calls)
        assert all(map(torch.equal, fast, answer(network, given))), "twice the same, bit for bit"
        assert network.state_dict().keys() == weights.keys()
        assert all(torch.equal(tensor, weights[name]) for name, tensor in network.state_dict().items())
    assert all(map(torch.equal, answer(network, given), plain)), "undone, bit for bit"
    assert len(calls) == 6


@pytest.mark.parametrize("backend", ["sdpa", "chunked", "reference"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_backend(off: Off, kind: str, backend: Any) -> None:
    network, given = encoder(kind), inputs(kind)
    plain = answer(network, given)
    with optimise(network, attention=backend):
        assert furthest(off, answer(network, given), plain) < TOLERANCE


def test_our_kernel(off: Off, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the bias of what looks back, in Triton's interpreter."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    network, given = encoder("text"), inputs("text")
    plain = answer(network, given)
    with optimise(network, attention="triton", norms="triton"):
        assert furthest(off, answer(network, given), plain) < TOLERANCE


def test_what_comes_later_is_not_seen(off: Off) -> None:
    network, given = encoder("text"), inputs("text")
    other = given.index_fill(1, torch.arange(9, 16), 5)
    with optimise(network):
        first, second = answer(network, given)[0], answer(network, other)[0]
    assert torch.equal(first[:, :9], second[:, :9])
    assert off(first[:, 9:], second[:, 9:]) > 1e-2


@pytest.mark.parametrize("name", sorted(folder.parent.name for folder in MINIATURES.glob("*/text_encoder")))
def test_trained_miniatures(off: Off, calls: list[Any], name: str) -> None:
    shelf = Shelf(device="cpu")
    model: Any = shelf.load_prior(name) if name.endswith("prior") else shelf.load(name)
    encoders = [found for part in ("text_encoder", "text_encoder_2") if (found := getattr(model, part, None)) is not None]
    plain = encode_text(model, ["a castle", "a much longer prompt of a boat"])
    for network in encoders:
        optimise(network)
    fast = encode_text(model, ["a castle", "a much longer prompt of a boat"])
    assert calls
    assert all(off(getattr(fast, part), getattr(plain, part)) < TOLERANCE for part in plain.names() - {"context_mask"})


# --- what is left to transformers


def test_a_mask_of_padding(off: Off, calls: list[Any]) -> None:
    network, given = encoder("text"), inputs("text")
    mask = torch.arange(17)[None] < torch.tensor([[17], [6]])
    plain = answer(network, given, attention_mask=mask)
    with optimise(network), warnings.catch_warnings():
        warnings.simplefilter("error", Note)
        assert furthest(off, answer(network, given, attention_mask=mask), plain) < TOLERANCE
        assert off(answer(network, given)[0], plain[0]) > 1e-3
    assert len(calls) == 3, "of the call without a mask"


def test_other_options_of_attention(off: Off, calls: list[Any]) -> None:
    network, given = encoder("picture"), inputs("picture")
    bias = torch.randn(1, 3, 10, 10, generator=torch.Generator().manual_seed(0))
    plain = answer(network, given, position_bias=bias)
    with optimise(network):
        assert furthest(off, answer(network, given, position_bias=bias), plain) < TOLERANCE
        assert not calls
        assert len(answer(network, given, output_attentions=False)) == len(plain)
    assert len(calls) == 3, "what is not asked for is no option"


def test_gradients(off: Off) -> None:
    """Of textual inversion, say."""
    network, given = encoder("text"), inputs("text")

    def gradient() -> Tensor:
        network.zero_grad()
        network(given).last_hidden_state.square().sum().backward()
        return network.get_input_embeddings().weight.grad.clone()  # type: ignore[no-any-return]

    plain = gradient()
    with optimise(network):
        with torch.inference_mode():
            network(given)  # what is kept of a call without gradients is not in the way
        assert off(gradient(), plain) < 1e-4


@pytest.mark.parametrize("before", [True, False])
def test_attention_that_returns_its_weights(off: Off, calls: list[Any], before: bool) -> None:
    network, given = encoder("text"), inputs("text")
    plain = copy.deepcopy(network)
    plain.set_attn_implementation("eager")
    if before:
        network.set_attn_implementation("eager")
    with optimise(network), warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        network.set_attn_implementation("eager")
        fast = network(given, output_attentions=True).attentions
        assert furthest(off, fast, plain(given, output_attentions=True).attentions) < TOLERANCE
    said = [str(w.message) for w in caught if issubclass(w.category, Note)]
    assert len(said) == (not before)
    assert before or "runs as transformers wrote it and not fused, because its attention is 'eager'" in said[0]
    assert not calls


def test_attention_of_somebody(off: Off) -> None:
    from transformers import AttentionInterface

    def even(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **_: Any) -> tuple[Tensor, None]:
        return value.mean(2, keepdim=True).expand_as(query).transpose(1, 2).contiguous(), None

    AttentionInterface.register("even", even)
    network, given = encoder("picture"), inputs("picture")
    plain = copy.deepcopy(network)
    plain.set_attn_implementation("even")
    wanted = answer(plain, given)
    with optimise(network):
        network.set_attn_implementation("even")
        with pytest.warns(Note, match="its attention is 'even'"):
            fast = answer(network, given)
        assert furthest(off, fast, wanted) < TOLERANCE


def test_dropout_drops() -> None:
    network, given = encoder("text", attention_dropout=0.5), inputs("text")
    with optimise(network):
        network.train()
        assert not torch.equal(answer(network, given)[0], answer(network, given)[0])


class Twice(nn.Module):
    """An adapter in the place of a projection."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.base(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("part", "how", "note"),
    [
        ("q_proj", "adapter", "of q_proj: it is a "),
        ("v_proj", "hook", "of v_proj: it has a hook"),
        ("k_proj", "forward", "of k_proj: its forward was replaced"),
        ("out_proj", "hook", None),
        ("fc1", "adapter", None),
        ("self_attn", "hook", None),
        ("final_layer_norm", "hook", None),
    ],
)
def test_what_is_put_on_it_later(off: Off, part: str, how: str, note: str | None) -> None:
    def change(network: Any) -> None:
        for path, module in list(network.named_modules()):
            if not path.endswith(part):
                continue
            if how == "adapter":
                parent, _, name = path.rpartition(".")
                setattr(network.get_submodule(parent), name, Twice(module))
            elif how == "forward":
                module.forward = Twice(copy.deepcopy(module)).forward
            else:
                module.register_forward_hook(
                    lambda _, __, out: (2 * out[0], *out[1:]) if isinstance(out, tuple) else 2 * out
                )

    network, given = encoder("text"), inputs("text")
    before, plain = answer(network, given), copy.deepcopy(network)
    change(plain)
    wanted = answer(plain, given)
    assert off(wanted[0], before[0]) > 1e-2
    with optimise(network), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        change(network)
        assert furthest(off, answer(network, given), wanted) < TOLERANCE
        answer(network, given)
    said = [str(w.message) for w in caught if issubclass(w.category, Note)]
    assert len(said) == (note is not None), "once for all layers and calls"
    assert note is None or note in said[0]


def test_other_weights_are_used(off: Off) -> None:
    network, given = encoder("text"), inputs("text")
    other = copy.deepcopy(network)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.2)
    with optimise(network):
        network.load_state_dict(other.state_dict())
        assert furthest(off, answer(network, given), answer(other, given)) < TOLERANCE
        network.to(torch.float64)
        assert furthest(off, answer(network, given), answer(other.double(), given)) < 1e-12
