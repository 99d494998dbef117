"""A captured call is the call: of a VAE's decoder, of a CLIP encoder, whatever is changed in between."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from unrolled.core.errors import BadInput, Note
from unrolled.core.latents import Latents
from unrolled.core.loading import Model
from unrolled.kernels.fast import captured_call, fast_of, optimise
from unrolled.kernels.fast.recorded import AT_MOST, Recorded
from unrolled.stages.decode import decode_tensor
from unrolled.stages.text import encode_text

TOLERANCE = 1e-5
Off = Callable[[Tensor, Tensor], float]
MODES: list[dict[str, Any]] = [
    {"mode": "graph"}, {"mode": "compile", "compiler": {"backend": "eager", "fullgraph": True}},
]  # fmt: skip


@pytest.fixture
def text(tiny: Model) -> Model:
    return replace(tiny, text_encoder=copy.deepcopy(tiny.text_encoder))


def latents(model: Model, batch: int = 1, side: int = 8, seed: int = 0) -> Latents:
    x = torch.randn(batch, 4, side, side, generator=torch.Generator().manual_seed(seed))
    return Latents(x, model.space, sigma=0.0, seeds=tuple(range(batch)))


def pixels(model: Model, **of: int) -> Tensor:
    return decode_tensor(model, latents(model, **of), tiled=False)


def context(model: Model, prompt: str = "a castle", **options: Any) -> Tensor:
    made = encode_text(model, prompt, **options).context
    assert made is not None
    return made


@pytest.mark.parametrize(
    ("model", "how"),
    [
        pytest.param(system, how, marks=[pytest.mark.slow] if how is MODES[1] and system != "tiny" else [])
        for system in ("tiny", "tiny_sdxl", "tiny_kandinsky", "tiny_x2", "tiny_x4")
        for how in MODES
    ],
    indirect=["model"],
    ids=lambda given: given["mode"] if isinstance(given, dict) else given,
)
def test_every_vae_decodes_the_same(model: Model, off: Off, how: dict[str, Any]) -> None:
    of: list[dict[str, int]] = [{}, {"side": 12}, {"batch": 2, "seed": 1}]  # which are decoded one by one
    plain = [pixels(model, **each) for each in of]
    with optimise(model.vae) as made, warnings.catch_warnings():
        warnings.simplefilter("error", Note)
        call = captured_call(model.vae, **how)
        fast = [pixels(model, **each) for each in of]
        assert all(off(ours, theirs) < TOLERANCE for ours, theirs in zip(fast, plain, strict=True))
        assert torch.equal(fast[0], pixels(model)), "twice the same, bit for bit"
        assert len(made.pieces) == 2, "one for each shape"
        spent = call.seconds
        pixels(model)
        assert call.seconds == spent > 0, "the first call's cost is known"
    assert torch.equal(pixels(model), plain[0]), "undone, bit for bit"
    assert fast_of(model.vae) is None
    assert not any("forward" in vars(module) for module in model.vae.modules())


@pytest.mark.parametrize("how", [MODES[0], pytest.param(MODES[1], marks=pytest.mark.slow)], ids=lambda how: how["mode"])
@pytest.mark.parametrize("system", ["tiny", "tiny_sdxl", "tiny_x2"])
def test_text_is_encoded_the_same(system: str, off: Off, how: dict[str, Any], request: pytest.FixtureRequest) -> None:
    given: Model = request.getfixturevalue(system)
    names = [name for name in ("text_encoder", "text_encoder_2") if getattr(given, name) is not None]
    model = replace(given, **{name: copy.deepcopy(getattr(given, name)) for name in names})
    plain = [encode_text(model, prompt) for prompt in ("a castle", "a boat")]
    assert plain[0].context is not None
    for name in names:
        optimise(getattr(model, name))
        captured_call(getattr(model, name), **how)
    with warnings.catch_warnings():
        warnings.simplefilter("error", Note)
        fast = [encode_text(model, prompt) for prompt in ("a castle", "a boat", "a castle")]
    for ours, theirs in zip(fast, [*plain, plain[0]], strict=True):
        assert all(off(getattr(ours, part), getattr(theirs, part)) < TOLERANCE for part in theirs.names())
    for name in names:
        made = fast_of(getattr(model, name))
        assert made is not None
        assert len(made.pieces) == 1, "of one shape"
        made.undo()
        assert not any("forward" in vars(module) for module in getattr(model, name).modules())


class Replayed:
    """What a CUDA graph does: it writes over the outputs it has."""

    def __init__(self, recorded: Recorded) -> None:
        self.recorded, self.replays = recorded, 0

    def replay(self) -> None:
        self.replays += 1
        with torch.no_grad():
            for buffer, fresh in zip(tree_leaves(self.recorded.outputs), tree_leaves(self.recorded.body()), strict=True):
                buffer.copy_(fresh)


def test_a_replay_writes_over_nothing_that_was_handed_out(text: Model, off: Off) -> None:
    network, prompts = text.text_encoder, [torch.arange(start, start + 6)[None] for start in (0, 9, 18)]
    with torch.no_grad():
        plain = [network(ids, output_hidden_states=True).hidden_states for ids in prompts]
        with optimise(network) as made:
            captured_call(network, mode="graph")
            network(prompts[2], output_hidden_states=True)
            (piece,) = made.pieces.values()
            piece.recorded.graph = graph = Replayed(piece.recorded)
            fast = [network(ids, output_hidden_states=True).hidden_states for ids in prompts]
    assert graph.replays == 3
    assert all(
        off(a, b) < TOLERANCE for ours, theirs in zip(fast, plain, strict=True) for a, b in zip(ours, theirs, strict=True)
    )


def test_more_pieces_are_compiled_than_torch_compiles_of_one_function() -> None:
    def piece(number: str) -> Recorded:
        options: dict[str, Any] = {"backend": "eager", "fullgraph": True}
        return Recorded(lambda: torch.ones(1) * int(number), torch.nn.Identity(), torch.device("cpu"), "compile", options)

    pieces = [piece(str(number)) for number in range(9)]
    assert [int(piece()) for piece in pieces] == list(range(9))


def test_pieces_do_not_grow_without_end(tiny: Model) -> None:
    vae = copy.deepcopy(tiny.vae)
    with optimise(vae) as made, torch.no_grad():
        captured_call(vae, mode="graph")
        for side in range(4, 5 + AT_MOST):
            vae.decode(torch.randn(1, 4, side, side))
        assert len(made.pieces) == AT_MOST
    assert made.pieces == {}


def test_tiles_are_pieces(sd: Model, off: Off) -> None:
    z = latents(sd, side=16).x
    sd.vae.enable_tiling()
    sd.vae.tile_latent_min_size = sd.vae.tile_sample_min_size = 8
    with torch.no_grad():
        plain = sd.vae.decode(z).sample
        with optimise(sd.vae) as made:
            captured_call(sd.vae, mode="graph")
            assert off(sd.vae.decode(z).sample, plain) < TOLERANCE
            assert 0 < len(made.pieces) <= 4


# --- what is changed in between


def test_other_weights(text: Model, off: Off) -> None:
    plain, other = copy.deepcopy(text.text_encoder), copy.deepcopy(text.text_encoder)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.3)
    changed = context(replace(text, text_encoder=other))
    for assign in (False, True):
        with optimise(text.text_encoder):
            captured_call(text.text_encoder, mode="graph")
            context(text)
            text.text_encoder.load_state_dict({n: t.clone() for n, t in other.state_dict().items()}, assign=assign)
            assert off(context(text), changed) < TOLERANCE
            text.text_encoder.load_state_dict(plain.state_dict())
    assert off(context(text), changed) > 1e-3


def test_a_hook(sd: Model, off: Off) -> None:
    plain = pixels(sd)
    with optimise(sd.vae) as made:
        captured_call(sd.vae, mode="graph")
        assert off(pixels(sd), plain) < TOLERANCE
        handle = sd.vae.decoder.conv_in.register_forward_hook(lambda _, __, out: 2 * out)
        with pytest.warns(Note, match=r"^Decoder\.conv_in has a hook: the call runs as it is"):
            hooked = pixels(sd)
        assert off(hooked, plain) > 1e-3
        handle.remove()
        assert off(pixels(sd), plain) < TOLERANCE
        assert len(made.pieces) == 1


def test_a_hook_on_an_encoder_that_returns_all_its_states(text: Model, off: Off) -> None:
    """transformers collects them with hooks of its own, which are no reason not to capture."""
    with optimise(text.text_encoder) as made:
        context(text, clip_skip=1)
        captured_call(text.text_encoder, mode="graph")
        context(text, clip_skip=1)
        assert len(made.pieces) == 1
        text.text_encoder.register_forward_hook(lambda *_: None)
        with pytest.warns(Note, match="^The network has a hook: the call runs as it is, and is not captured"):
            context(text)


def test_what_is_asked_for_besides(text: Model) -> None:
    network, ids = text.text_encoder, torch.arange(6)[None]
    with optimise(network) as made, torch.no_grad():
        captured_call(network, mode="graph")
        assert network(ids).hidden_states is None
        assert len(network(ids, output_hidden_states=True).hidden_states) == 6, "before and behind five layers"
        assert isinstance(network(ids, return_dict=False), tuple)
        network.config.output_hidden_states = True
        assert len(network(ids).hidden_states) == 6
        assert len(made.pieces) == 4, "one for each, as a graph returns what it did"


def test_gradients(sd: Model, off: Off) -> None:
    z = latents(sd).x.requires_grad_()

    def gradient() -> Tensor:
        return torch.autograd.grad(sd.vae.decode(z).sample.square().sum(), z)[0]

    plain = gradient()
    with optimise(sd.vae):
        captured_call(sd.vae, mode="graph")
        with pytest.warns(Note, match=r"^Gradients may be wanted: the call runs as it is, unless under torch\.no_grad\(\)"):
            assert off(gradient(), plain) < 1e-4


def test_a_copy_is_another_network(sd: Model, off: Off) -> None:
    with optimise(sd.vae) as made:
        captured_call(sd.vae, mode="graph")
        other = replace(sd, vae=copy.deepcopy(sd.vae))
        with torch.no_grad():
            for parameter in other.vae.decoder.parameters():
                parameter.mul_(1.5)
        fast, changed = pixels(sd), pixels(other)
        assert len(made.pieces) == 1
    plain = replace(sd, vae=copy.deepcopy(sd.vae))
    assert off(fast, pixels(sd)) < TOLERANCE
    plain.vae.load_state_dict(other.vae.state_dict())
    assert off(changed, pixels(plain)) < TOLERANCE


def test_a_network_that_comes_only_for_its_calls(tiny_folder: Any, off: Off) -> None:
    """Whose weights are somewhere else every time."""
    from unrolled.core.loading import Shelf

    plain = pixels(Shelf(device="cpu").load(str(tiny_folder)))
    model = Shelf(device="cpu", fast=True, offload="model").load(str(tiny_folder))
    captured_call(model.vae, mode="graph")
    with pytest.warns(Note, match="^The network has a hook: the call runs as it is"):
        assert off(pixels(model), plain) < TOLERANCE


@pytest.mark.parametrize("inference", [True, False])
def test_inference_mode_now_and_then(sd: Model, off: Off, inference: bool) -> None:
    plain = pixels(sd)
    with optimise(sd.vae) as made:
        captured_call(sd.vae, mode="graph")
        for mode in (inference, not inference):
            with torch.inference_mode(mode):
                assert off(pixels(sd), plain) < TOLERANCE
        assert len(made.pieces) == 1


def test_what_cannot_be_captured_runs_as_it_is(sd: Model, off: Off, monkeypatch: pytest.MonkeyPatch) -> None:
    from unrolled.kernels.fast import call

    def broken(*_: Any) -> None:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(call, "Recorded", broken)
    plain = pixels(sd)
    with optimise(sd.vae):
        captured_call(sd.vae, mode="graph")
        with pytest.warns(Note, match=r"^The call could not be captured \(CUDA error: .* capturing\), and runs as it is"):
            assert off(pixels(sd), plain) < TOLERANCE


@pytest.mark.parametrize("mode", ["auto", "eager"])
def test_modes_that_capture_nothing(sd: Model, mode: Any) -> None:
    with optimise(sd.vae) as made:
        fast = pixels(sd)
        call = captured_call(sd.vae, mode=mode)
        assert torch.equal(pixels(sd), fast)
        assert made.pieces == {}
        assert call.seconds == 0.0


def test_errors(sd: Model) -> None:
    with pytest.raises(BadInput, match=r"Only calls of an optimised VAE or CLIP encoder can be captured: call optimise\("):
        captured_call(sd.vae)
    with optimise(sd.unet), pytest.raises(BadInput, match="Only calls of an optimised VAE or CLIP encoder can be captured"):
        captured_call(sd.unet)
    with optimise(sd.vae):
        with pytest.raises(BadInput, match="There is no mode 'fast' of capturing: use auto, eager, graph"):
            captured_call(sd.vae, mode="fast")  # type: ignore[arg-type]
        captured_call(sd.vae)
        with pytest.raises(
            BadInput, match="The calls of this AutoencoderKL are captured already, or its forward is another's"
        ):
            captured_call(sd.vae)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mode", ["graph", "compile+graph"])
def test_on_a_card(model: Model, off: Off, mode: Any) -> None:
    on_card = replace(model, vae=model.vae.to("cuda"), device=torch.device("cuda"))
    plain = [pixels(on_card, seed=seed) for seed in (0, 1)]
    with optimise(on_card.vae) as made:
        captured_call(on_card.vae, mode=mode)
        fast = [pixels(on_card, seed=seed) for seed in (0, 1)]
        assert all(piece.recorded.graph is not None for piece in made.pieces.values())
        assert all(off(ours, theirs) < 1e-3 for ours, theirs in zip(fast, plain, strict=True))
