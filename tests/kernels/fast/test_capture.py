"""A captured step is the step: with its solver, its hooks, its edits, its changes of mind."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from unrolled.core.denoiser import PriorDenoiser, edited
from unrolled.core.errors import BadInput, Note
from unrolled.core.guidance import classifier_free, per_step, within
from unrolled.core.latents import Latents
from unrolled.core.loading import Model
from unrolled.core.loop import denoise, steps
from unrolled.core.prediction import Kind, Preconditioned, Prediction
from unrolled.core.schedule import Schedule
from unrolled.kernels.fast import captured, fast_of, optimise
from unrolled.kernels.fast.recorded import AT_MOST
from unrolled.schedulers import DPMpp2M, Euler, EulerAncestral, Heun

TOLERANCE = 1e-5
Off = Callable[[Tensor, Tensor], float]
Conditions = Callable[..., Any]
QUICK = ["tiny", "tiny_kandinsky"]
SLOW = ["tiny_inpaint", "tiny_sdxl", "tiny_refiner", "tiny_kandinsky_inpaint", "tiny_x2", "tiny_x4"]
SCHEDULE = Schedule((8.0, 3.0, 1.0, 0.3), (800.0, 500.0, 300.0), last_timestep=100.0)


def latents(model: Model, batch: int = 1, side: int = 16) -> Latents:
    x = 8 * torch.randn(batch, 4, side, side, generator=torch.Generator().manual_seed(7))
    return Latents(x, model.space, sigma=8.0, seeds=tuple(range(batch)))


class Sides:
    """A plain run and a captured one of a model, with prompts of their own."""

    def __init__(self, model: Model, conditioning_of: Conditions, solver: Any = None, scale: Any = 3.0) -> None:
        self.model, self.solver, self.scale, self.rescale = model, solver or Euler(), scale, 0.0
        self.cond, self.uncond = conditioning_of(model, 1), conditioning_of(model, 2)

    def plain(self, hooks: Any = (), batch: int = 1, **size: int) -> Tensor:
        guided = classifier_free(self.model.denoiser, self.cond, self.uncond, self.scale, rescale=self.rescale)
        return denoise(guided, latents(self.model, batch, **size), SCHEDULE, self.solver, hooks).x

    def step(self, mode: Any = "graph", **options: Any) -> Any:
        given = self.model.denoiser, self.cond, self.uncond, self.scale, SCHEDULE, self.solver
        return captured(*given, rescale=self.rescale, mode=mode, **options)

    def run(self, step: Any, hooks: Any = (), batch: int = 1, **size: int) -> Tensor:
        return denoise(step.denoiser, latents(self.model, batch, **size), SCHEDULE, step.solver, hooks).x


@pytest.fixture
def sides(sd: Model, conditioning_of: Conditions) -> Sides:
    return Sides(sd, conditioning_of)


@pytest.mark.parametrize("solver", [Euler(), EulerAncestral(), Heun(), DPMpp2M()], ids=lambda s: type(s).__name__)
def test_every_solver_gives_the_same(sides: Sides, off: Off, solver: Any) -> None:
    sides.solver = solver
    plain = sides.plain(batch=2)
    with optimise(sides.model.unet):
        assert off(sides.run(sides.step(), batch=2), plain) < TOLERANCE


@pytest.mark.parametrize("kind", ["epsilon", "v", "x0", Preconditioned(0.5), Preconditioned(0.5, -1)], ids=str)
@pytest.mark.parametrize("scale_input", [True, False])
def test_every_kind_of_network_gives_the_same(sides: Sides, off: Off, kind: Kind, scale_input: bool) -> None:
    network = sides.model.denoiser_of(kind, scale_input=scale_input)
    start = latents(sides.model)
    guided = classifier_free(network, sides.cond, sides.uncond, 3.0)
    plain = denoise(guided, start, SCHEDULE, sides.solver).x
    with optimise(sides.model.unet):
        step = captured(network, sides.cond, sides.uncond, 3.0, SCHEDULE, sides.solver, mode="graph")
        assert off(denoise(step.denoiser, start, SCHEDULE, step.solver).x, plain) < TOLERANCE


@pytest.mark.parametrize("mode", ["auto", "graph"])
def test_every_system_gives_the_same(model: Model, off: Off, conditioning_of: Conditions, mode: Any) -> None:
    sides = Sides(model, conditioning_of)
    plain = [sides.plain(batch=batch) for batch in (1, 2)]
    with optimise(model.unet), warnings.catch_warnings():
        warnings.simplefilter("error", Note)
        step = sides.step(mode)
        for batch, wanted in zip((1, 2, 1), (plain[0], plain[1], plain[0]), strict=True):
            fast = sides.run(step, batch=batch)
            assert off(fast, wanted) < TOLERANCE
        assert torch.equal(fast, sides.run(sides.step(mode)))
        assert (step.seconds > 0) == (mode == "graph"), "the first call's cost is known"


@pytest.mark.parametrize("name", ["euler", "dpm++2m", "pndm", "ddim", "ddpm", "heun"])
def test_solvers_of_a_checkpoint(sides: Sides, off: Off, name: str) -> None:
    """Six steps, in which multistep methods reach their order and are tapered again."""
    schedule, solver = sides.model.schedule(6, name), sides.model.solver(6, name)
    start = replace(latents(sides.model), sigma=schedule.sigmas[0])
    start = replace(start, x=start.x * schedule.sigmas[0] / 8)
    plain = denoise(classifier_free(sides.model.denoiser, sides.cond, sides.uncond, 3.0), start, schedule, solver).x
    with optimise(sides.model.unet):
        step = captured(sides.model.denoiser, sides.cond, sides.uncond, 3.0, schedule, solver, mode="graph")
        assert off(denoise(step.denoiser, start, schedule, step.solver).x, plain) < TOLERANCE


def test_a_solver_that_can_is_part_of_the_piece(sides: Sides, off: Off) -> None:
    """Its own update is not called."""

    class Never:
        def __init__(self, solver: Any) -> None:
            self.row, self.remembering, self.order = solver.row, solver.remembering, getattr(solver, "order", 1)

        def __call__(self, *_: Any) -> Any:
            raise AssertionError("the solver was called")

    for solver in (Euler(), DPMpp2M()):
        sides.solver = solver
        plain = sides.plain()
        sides.solver = Never(solver)
        with optimise(sides.model.unet):
            assert off(sides.run(sides.step()), plain) < TOLERANCE


def test_a_piece_is_made_once_for_a_shape(sides: Sides) -> None:
    with optimise(sides.model.unet) as made:
        first = sides.step()
        sides.run(first)
        assert len(made.pieces) == 1
        (piece,) = made.pieces.values()
        sides.cond, sides.uncond = sides.uncond, sides.cond
        again = sides.step()
        sides.run(again)
        assert list(made.pieces.values()) == [piece], "another prompt and another run take the same"
        assert again.seconds == 0.0
        for side in (8, 12, 20, 24, 28):
            sides.run(again, side=side)
        assert len(made.pieces) == AT_MOST
    assert made.pieces == {}


def test_prompts_do_not_stick_to_a_piece(model: Model, off: Off, conditioning_of: Conditions) -> None:
    sides = Sides(model, conditioning_of)
    plain = sides.plain()
    sides.cond, sides.uncond = sides.uncond, sides.cond
    swapped = sides.plain()
    with optimise(model.unet):
        other = sides.step()
        assert off(sides.run(other), swapped) < TOLERANCE
        sides.cond, sides.uncond = sides.uncond, sides.cond
        assert off(sides.run(sides.step()), plain) < TOLERANCE
        assert off(sides.run(other), swapped) < TOLERANCE
    assert off(swapped, plain) > 1e-3


def test_predictions_stay_what_they_were(sides: Sides) -> None:
    """A replay writes over its buffers; what was handed out is not among them."""
    with optimise(sides.model.unet):
        step = sides.step()
        seen: list[tuple[Tensor, Tensor]] = []
        for s in steps(step.denoiser, latents(sides.model), SCHEDULE, step.solver):
            for tensor in (s.x, s.x0, s.prediction.out, s.prediction.cond, s.prediction.uncond):
                assert tensor is not None
                seen.append((tensor, tensor.clone()))
    assert all(torch.equal(now, then) for now, then in seen)


@pytest.mark.parametrize("batch", [1, 2])
def test_an_edit_of_the_prompt_in_place(sides: Sides, off: Off, batch: int) -> None:
    context = sides.cond.context
    assert context is not None
    first = context.clone()

    def change(step: Any) -> None:
        context.mul_(0.5)

    plain = sides.plain([change], batch)
    context.copy_(first)
    unchanged = sides.plain(batch=batch)
    for mode in ("auto", "graph"):
        context.copy_(first)
        with optimise(sides.model.unet):
            assert off(sides.run(sides.step(mode), [change], batch), plain) < TOLERANCE
    assert off(plain, unchanged) > 1e-3


# --- what a researcher does


def test_edits_of_a_step(sides: Sides, off: Off) -> None:
    hooks = [lambda step: setattr(step, "x", step.x.clamp(-3, 3) + 0.1 * step.x0)]
    plain = sides.plain(hooks)
    with optimise(sides.model.unet):
        assert off(sides.run(sides.step(), hooks), plain) < 10 * TOLERANCE
    assert off(plain, sides.plain()) > 1e-3


@pytest.mark.parametrize("where", ["prediction", "x"])
def test_a_wrapper_around_the_denoiser(sides: Sides, off: Off, where: str) -> None:
    def wrapped(denoiser: Any) -> Any:
        if where == "prediction":
            return edited(denoiser, lambda p: replace(p, out=0.8 * p.out))
        return lambda x, sigma, timestep: denoiser(0.9 * x, sigma, timestep)

    guided = classifier_free(sides.model.denoiser, sides.cond, sides.uncond, 3.0)
    plain = denoise(wrapped(guided), latents(sides.model), SCHEDULE, Euler()).x
    with optimise(sides.model.unet), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step = sides.step()
        fast = denoise(wrapped(step.denoiser), latents(sides.model), SCHEDULE, step.solver).x
    assert off(fast, plain) < TOLERANCE
    said = [str(w.message) for w in caught if issubclass(w.category, Note)]
    assert len(said) == (where == "prediction")
    assert where == "x" or "between the denoiser and the solver changes the prediction" in said[0]


def test_a_wrapper_that_only_looks_costs_nothing(sides: Sides, off: Off) -> None:
    seen: list[float] = []

    def look(prediction: Prediction) -> Prediction:
        seen.append(prediction.sigma)
        return prediction

    with optimise(sides.model.unet), warnings.catch_warnings():
        warnings.simplefilter("error", Note)
        step = sides.step()
        looked = edited(step.denoiser, look)
        fast = denoise(looked, latents(sides.model), SCHEDULE, step.solver).x
        assert torch.equal(fast, sides.run(step))
    assert seen == [8.0, 3.0, 1.0]


def test_a_hook_put_on_in_the_middle(sides: Sides, off: Off) -> None:
    layer = sides.model.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_v

    def hooked(step: Any) -> None:
        if step.index == 0:
            handles.append(layer.register_forward_hook(lambda _, __, out: 2 * out))
        if step.index == 1:
            handles.pop().remove()

    handles: list[Any] = []
    plain = sides.plain([hooked])
    assert off(plain, sides.plain()) > 1e-4
    with optimise(sides.model.unet) as made:
        with pytest.warns(Note, match=r"to_v has a hook: the step runs in parts"):
            fast = sides.run(sides.step(), [hooked])
        assert off(fast, plain) < TOLERANCE
        assert len(made.pieces) == 1, "the first and the last step are one piece"


def test_a_processor_set_in_the_middle(sides: Sides, off: Off) -> None:
    from diffusers.models.attention_processor import AttnProcessor

    plain = sides.plain()

    def change(step: Any) -> None:
        sides.model.unet.set_attn_processor(AttnProcessor())

    with optimise(sides.model.unet), pytest.warns(Note, match="has a AttnProcessor: the step runs in parts"):
        assert off(sides.run(sides.step(), [change]), plain) < TOLERANCE


@pytest.mark.parametrize("assign", [False, True])
def test_other_weights_in_the_middle(model: Model, off: Off, conditioning_of: Conditions, assign: bool) -> None:
    sides = Sides(model, conditioning_of)
    own = {name: tensor.clone() for name, tensor in model.unet.state_dict().items()}
    other = {name: 1.3 * tensor for name, tensor in own.items()}

    def change(step: Any) -> None:
        if step.index == 0:
            model.unet.load_state_dict({n: t.clone() for n, t in other.items()}, assign=assign)

    unchanged = sides.plain()
    plain = sides.plain([change])
    model.unet.load_state_dict(own)
    with optimise(model.unet):
        assert off(sides.run(sides.step(), [change]), plain) < TOLERANCE
    assert off(plain, unchanged) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("end", ["to_k.weight", "to_v.weight"])
def test_other_weights_of_cross_attention_alone(sides: Sides, off: Off, end: str) -> None:
    """Compiled code, as a graph does, reads keys and values that were made before it."""
    with optimise(sides.model.unet):
        step = sides.step(**COMPILED)
        before = sides.run(step)
        with torch.no_grad():
            for name, parameter in sides.model.unet.named_parameters():
                if name.endswith(f"attn2.{end}"):
                    parameter.mul_(3.0)
        after = sides.run(step)
    assert off(after, sides.plain()) < TOLERANCE
    assert off(after, before) > 1e-3


def test_free_u_put_on_later_is_captured_anew(sides: Sides, off: Off) -> None:
    with optimise(sides.model.unet) as made:
        before = sides.run(sides.step())
        (first,) = made.pieces.values()
        sides.model.unet.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
        after = sides.run(sides.step())
        (second,) = made.pieces.values()
        assert second is not first, "a graph would not see it"
    assert off(after, sides.plain()) < TOLERANCE
    assert off(after, before) > 1e-3


def test_inference_mode_now_and_then(sides: Sides, off: Off) -> None:
    plain = sides.plain()
    with optimise(sides.model.unet) as made, warnings.catch_warnings():
        warnings.simplefilter("error", Note)
        for inference in (True, False, True):
            step = sides.step()
            with torch.inference_mode(inference):
                assert off(sides.run(step), plain) < TOLERANCE
            (piece,) = made.pieces.values()
            assert step.fast.kept == [piece.source], "it did not run in parts"


COMPILED: dict[str, Any] = {"mode": "compile", "compiler": {"backend": "eager", "fullgraph": True}}
HOW = [{"mode": "auto"}, {"mode": "graph"}, pytest.param(COMPILED, marks=pytest.mark.slow)]


@pytest.mark.parametrize("how", HOW, ids=lambda how: how["mode"])
def test_rescaled_guidance(sides: Sides, off: Off, how: dict[str, Any]) -> None:
    """Two images of unlike contrast, each rescaled by its own."""
    plain = sides.plain(batch=2)
    with optimise(sides.model.unet) as made:
        for sides.rescale in (0.7, 1.0):
            rescaled = sides.plain(batch=2)
            assert off(sides.run(sides.step(**how), batch=2), rescaled) < TOLERANCE
            assert off(rescaled, plain) > 1e-3
        assert len(made.pieces) == (0 if how["mode"] == "auto" else 2), "one for each"


@pytest.mark.parametrize("how", HOW, ids=lambda how: how["mode"])
def test_a_scale_that_changes(sides: Sides, off: Off, how: dict[str, Any]) -> None:
    """By step, in an interval of steps (no guidance elsewhere), and none at all; rescaled where there is guidance."""
    sides.rescale = 0.5
    for sides.scale in (per_step(SCHEDULE, [5.0, 1.0, 2.0]), within(SCHEDULE, 1, 2, 4.0), 1.0):
        plain = sides.plain(batch=2)
        with optimise(sides.model.unet):
            assert off(sides.run(sides.step(**how), batch=2), plain) < TOLERANCE


def test_prompts_of_unequal_length(sides: Sides, off: Off) -> None:
    assert sides.cond.context is not None
    sides.cond = replace(sides.cond, context=torch.cat([sides.cond.context, sides.cond.context], 1))
    plain = sides.plain()
    with optimise(sides.model.unet):
        assert off(sides.run(sides.step()), plain) < TOLERANCE


def test_gradients_run_in_parts(sides: Sides, off: Off) -> None:
    x = latents(sides.model).x.requires_grad_()

    def gradient(denoiser: Any) -> Tensor:
        return torch.autograd.grad(denoiser(x, 3.0, 500.0).out.square().sum(), x)[0]

    plain = gradient(classifier_free(sides.model.denoiser, sides.cond, sides.uncond, 3.0))
    with (
        optimise(sides.model.unet),
        pytest.warns(Note, match=r"Gradients may be wanted: the step runs in parts, unless under"),
    ):
        assert off(gradient(sides.step().denoiser), plain) < 1e-4


def test_undone_in_the_middle(sides: Sides, off: Off) -> None:
    plain = sides.plain()
    made = optimise(sides.model.unet)
    assert off(sides.run(sides.step(), [lambda step: made.undo()]), plain) < TOLERANCE
    assert fast_of(sides.model.unet) is None


def test_what_cannot_be_captured_runs_in_parts(sides: Sides, off: Off, monkeypatch: pytest.MonkeyPatch) -> None:
    from unrolled.kernels.fast import capture

    tried: list[int] = []

    def broken(*_: Any) -> None:
        tried.append(1)
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(capture, "Piece", broken)
    plain = sides.plain()
    with (
        optimise(sides.model.unet),
        pytest.warns(Note, match=r"not be captured \(CUDA error: operation not permitted"),
    ):
        assert off(sides.run(sides.step()), plain) < TOLERANCE
    assert len(tried) == 1, "not at every step"


def test_errors(sides: Sides) -> None:
    with pytest.raises(BadInput, match=r"Only the denoiser of an optimised UNet can be captured: call optimise\("):
        sides.step()
    with optimise(sides.model.unet):
        with pytest.raises(BadInput, match="There is no mode 'fast' of capturing: use auto, eager, graph, compile, compile"):
            sides.step("fast")
        sides.rescale = 1.5
        with pytest.raises(BadInput, match=r"Guidance rescale goes from 0 \(off\) to 1, got 1\.5"):
            sides.step()
        with pytest.raises(BadInput, match="Only the denoiser of an optimised UNet"):
            captured(PriorDenoiser(None), sides.cond, sides.uncond, 3.0, SCHEDULE, Euler())


# --- compiled


@pytest.mark.parametrize("model", [*QUICK, *(pytest.param(s, marks=pytest.mark.slow) for s in SLOW)], indirect=True)
def test_the_piece_compiles_whole(model: Model, off: Off, conditioning_of: Conditions) -> None:
    """Without a break, and without a compiler: torch.compile's own interpreter of what it captured."""
    sides = Sides(model, conditioning_of)
    plain = sides.plain()
    with optimise(model.unet), warnings.catch_warnings():
        warnings.simplefilter("error", Note)
        step = sides.step("compile", compiler={"backend": "eager", "fullgraph": True})
        assert off(sides.run(step), plain) < TOLERANCE
        assert off(sides.run(step), plain) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("freezing", [False, True])
def test_compiled_by_inductor(sides: Sides, off: Off, freezing: bool) -> None:
    plain = sides.plain()
    with optimise(sides.model.unet), warnings.catch_warnings():
        warnings.simplefilter("error", Note)
        step = sides.step("compile", compiler={"options": {"freezing": freezing}})
        assert off(sides.run(step), plain) < TOLERANCE


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_graph_on_a_card(model: Model, off: Off, conditioning_of: Conditions, dtype: torch.dtype) -> None:
    on_card = replace(model, unet=model.unet.to("cuda", dtype))
    sides = Sides(on_card, lambda m, seed: conditioning_of(m, seed).to("cuda", torch.float32))
    start = replace(latents(model), x=latents(model).x.cuda())
    guided = classifier_free(on_card.denoiser, sides.cond, sides.uncond, 3.0)
    plain = denoise(guided, start, SCHEDULE, Euler()).x
    with optimise(on_card.unet), warnings.catch_warnings():
        warnings.simplefilter("error", Note)
        for mode in ("graph", "compile+graph"):
            step = sides.step(mode)
            seen: list[tuple[Tensor, Tensor]] = []
            for s in steps(step.denoiser, start, SCHEDULE, step.solver):
                seen += [(t, t.clone()) for t in (s.x, s.x0, s.prediction.out, s.prediction.cond) if t is not None]
            assert all(torch.equal(now, then) for now, then in seen), "no replay wrote over what was handed out"
            fast = s.x
            assert off(fast, plain) < (1e-4 if dtype == torch.float32 else 0.1)
            assert torch.equal(fast, denoise(step.denoiser, start, SCHEDULE, step.solver).x)
