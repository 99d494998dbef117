"""What a run keeps is computed once, and anew as soon as anything it was made of changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from unrolled.core.denoiser import PriorDenoiser, conditioned, edited
from unrolled.core.guidance import classifier_free, per_step
from unrolled.core.latents import Latents
from unrolled.core.loading import Model
from unrolled.core.loop import denoise, steps
from unrolled.core.schedule import Schedule
from unrolled.kernels.fast import FastDenoiser, attention_layer, optimise, prepared
from unrolled.kernels.fast.kept import AT_MOST
from unrolled.schedulers import DPMpp2M, Euler, Heun

TOLERANCE = 1e-5
Off = Callable[[Tensor, Tensor], float]
Conditions = Callable[..., Any]
SCHEDULE = Schedule((8.0, 3.0, 1.0, 0.3), (800.0, 500.0, 300.0), last_timestep=100.0)


def latents(model: Model, batch: int = 1) -> Latents:
    x = 8 * torch.randn(batch, 4, 16, 16, generator=torch.Generator().manual_seed(7))
    return Latents(x, model.space, sigma=8.0, seeds=tuple(range(batch)))


@pytest.fixture
def made_keys(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Which layers computed keys and values of a context."""
    made: list[Any] = []
    plain = attention_layer.keys_values

    def counted(layer: Any, shared: Any, context: Tensor) -> Any:
        made.append(layer)
        return plain(layer, shared, context)

    monkeypatch.setattr(attention_layer, "keys_values", counted)
    return made


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("solver", [Heun(), DPMpp2M()], ids=lambda s: type(s).__name__)
def test_a_run_is_the_plain_one(model: Model, off: Off, conditioning_of: Conditions, solver: Any, batched: bool) -> None:
    cond, uncond = conditioning_of(model, 1), conditioning_of(model, 2)
    start = latents(model, 2)

    def run(network: Any) -> Tensor:
        return denoise(classifier_free(network, cond, uncond, 3.0, batched=batched), start, SCHEDULE, solver).x

    plain = run(model.denoiser)
    with optimise(model.unet):
        fast = run(prepared(model.denoiser, SCHEDULE))
        assert off(fast, plain) < TOLERANCE
        assert torch.equal(fast, run(prepared(model.denoiser, SCHEDULE)))
    assert torch.equal(run(model.denoiser), plain)


def test_keys_and_values_are_made_once_a_run(model: Model, conditioning_of: Conditions, made_keys: list[Any]) -> None:
    cond, uncond = conditioning_of(model, 1), conditioning_of(model, 2)
    with optimise(model.unet):
        network = prepared(model.denoiser, SCHEDULE)
        guided = classifier_free(network, cond, uncond, 3.0)
        denoise(guided, latents(model), SCHEDULE, Euler())
        assert len(made_keys) == len(set(made_keys)) > 0, "each layer once, not at each of three steps"
        denoise(guided, latents(model), SCHEDULE, Euler())
        assert len(made_keys) == len(set(made_keys)), "nor in a second run of the same denoiser"


def test_embeddings_are_made_ahead(model: Model, conditioning_of: Conditions) -> None:
    rows: list[int] = []
    with optimise(model.unet):
        network = prepared(model.denoiser, SCHEDULE)
        # A hook would be honoured, so that it would see what it wants to see; this is not looked at.
        forward = model.unet.get_time_embed

        def counted(sample: Tensor, timestep: Any) -> Any:
            rows.append(len(sample))
            return forward(sample, timestep)

        model.unet.get_time_embed = counted
        denoise(conditioned(network, conditioning_of(model, 1)), latents(model), SCHEDULE, Euler())
    assert rows == [4], "one batch of all levels"


def test_a_level_the_schedule_does_not_have(model: Model, off: Off, conditioning_of: Conditions) -> None:
    cond, x = conditioning_of(model, 1), latents(model).x
    with torch.no_grad():
        plain = [model.denoiser(x, sigma, t, cond).out for sigma, t in [(8.0, 800.0), (2.2, 431.7), (3.0, 500.0)]]
        with optimise(model.unet):
            network = prepared(model.denoiser, SCHEDULE)
            for (sigma, t), wanted in zip([(8.0, 800.0), (2.2, 431.7), (3.0, 500.0)], plain, strict=True):
                assert off(network(x, sigma, t, cond).out, wanted) < TOLERANCE


# --- what makes it compute anew


def each_step(network: Any, model: Model, cond: Any, change: Callable[[int], Any]) -> list[Tensor]:
    """The predictions of three steps at one x, with a change before each."""
    out = []
    with torch.no_grad():
        for i, (sigma, timestep) in enumerate(zip(SCHEDULE.sigmas, SCHEDULE.timesteps, strict=False)):
            now = change(i) or cond
            out.append(network(latents(model).x, sigma, timestep, now).out)
    return out


def test_an_edit_of_the_prompt_between_steps(model: Model, off: Off, conditioning_of: Conditions) -> None:
    def edited_in_place(network: Any) -> list[Tensor]:
        cond = conditioning_of(model, 1)
        own = [t for t in vars(cond).values() if t is not None and t.is_floating_point()]

        def change(i: int) -> None:
            for tensor in own:
                tensor.mul_(1.0 - 0.3 * i)

        return each_step(network, model, cond, change)

    plain = edited_in_place(model.denoiser)
    with optimise(model.unet):
        network = prepared(model.denoiser, SCHEDULE)
        assert isinstance(network, FastDenoiser)
        fast = edited_in_place(network)
        assert len(network.kept) == 1
    assert all(off(a, b) < TOLERANCE for a, b in zip(fast, plain, strict=True))


def test_another_prompt_at_every_step(model: Model, off: Off, conditioning_of: Conditions) -> None:
    def travelling(network: Any) -> list[Tensor]:
        out = []
        for _ in range(3):
            out += each_step(network, model, None, lambda i: conditioning_of(model, i))
        return out

    plain = travelling(model.denoiser)
    with optimise(model.unet):
        network = prepared(model.denoiser, SCHEDULE)
        assert isinstance(network, FastDenoiser)
        fast = travelling(network)
        assert len(network.kept) <= AT_MOST, "a run that changes its prompt does not grow"
    assert all(off(a, b) < TOLERANCE for a, b in zip(fast, plain, strict=True))


@pytest.mark.parametrize(
    "part", ["to_k.weight", "add_v_proj.bias", "time_emb_proj.weight", "linear.weight", "linear_1.bias"]
)
def test_other_weights_of_one_part_between_steps(model: Model, off: Off, conditioning_of: Conditions, part: str) -> None:
    chosen = [parameter for name, parameter in model.unet.named_parameters() if name.endswith(part)]
    kept, cond = [parameter.detach().clone() for parameter in chosen], conditioning_of(model, 1)

    def change(i: int) -> None:
        for parameter, first in zip(chosen, kept, strict=True):
            parameter.copy_(first * (1.0 + i))

    plain = each_step(model.denoiser, model, cond, change)
    with optimise(model.unet):
        fast = each_step(prepared(model.denoiser, SCHEDULE), model, cond, change)
    assert all(off(a, b) < TOLERANCE for a, b in zip(fast, plain, strict=True))


@pytest.mark.parametrize("how", ["in place", "loaded", "assigned", "data"])
def test_other_weights_between_steps(model: Model, off: Off, conditioning_of: Conditions, how: str) -> None:
    weights = {name: tensor.clone() for name, tensor in model.unet.state_dict().items()}

    def change(i: int) -> None:
        wanted = {name: tensor * (1.0 + 0.2 * i) for name, tensor in weights.items()}
        if how in ("loaded", "assigned"):
            model.unet.load_state_dict(wanted, assign=how == "assigned")
            return
        for name, parameter in model.unet.named_parameters():
            if how == "data":
                parameter.data = wanted[name]
            else:
                parameter.copy_(wanted[name])

    cond = conditioning_of(model, 1)
    plain = each_step(model.denoiser, model, cond, change)
    model.unet.load_state_dict(weights)
    with optimise(model.unet):
        fast = each_step(prepared(model.denoiser, SCHEDULE), model, cond, change)
    assert all(off(a, b) < TOLERANCE for a, b in zip(fast, plain, strict=True))
    assert off(plain[2], plain[0]) > 1e-3


def test_undone_in_the_middle_of_a_run(model: Model, off: Off, conditioning_of: Conditions) -> None:
    cond = conditioning_of(model, 1)
    plain = each_step(model.denoiser, model, cond, lambda _: None)
    made = optimise(model.unet)
    network = prepared(model.denoiser, SCHEDULE)
    fast = each_step(network, model, cond, lambda i: made.undo() if i == 1 else None)
    assert off(fast[0], plain[0]) < TOLERANCE
    assert torch.equal(fast[1], plain[1])
    assert torch.equal(fast[2], plain[2])


def test_two_runs_in_turn_do_not_meet(model: Model, off: Off, conditioning_of: Conditions) -> None:
    conds = [conditioning_of(model, seed) for seed in (1, 2)]
    plain = [each_step(model.denoiser, model, cond, lambda _: None) for cond in conds]
    with optimise(model.unet):
        runs = [
            steps(conditioned(prepared(model.denoiser, SCHEDULE), cond), latents(model), SCHEDULE, Euler()) for cond in conds
        ]
        for one, other in zip(*runs, strict=True):
            one.x, other.x = latents(model).x, latents(model).x
            for step, wanted in [(one, plain[0]), (other, plain[1])]:
                assert off(step.prediction.out, wanted[step.index]) < TOLERANCE


# --- wrappers, and what is not wrapped


def test_wrappers_and_schedules_of_guidance(sd: Model, off: Off, conditioning_of: Conditions) -> None:
    cond, uncond = conditioning_of(sd, 1), conditioning_of(sd, 2)
    scales = per_step(SCHEDULE, [5.0, 1.0, 3.0])

    def run(network: Any) -> Tensor:
        guided = edited(classifier_free(network, cond, uncond, scales, rescale=0.7), lambda p: replace(p, out=0.9 * p.out))
        return denoise(guided, latents(sd), SCHEDULE, Euler(), [lambda step: setattr(step, "x", step.x * 0.99)]).x

    plain = run(sd.denoiser)
    with optimise(sd.unet):
        assert off(run(prepared(sd.denoiser, SCHEDULE)), plain) < TOLERANCE


def test_gradients_through_a_prepared_denoiser(sd: Model, off: Off, conditioning_of: Conditions) -> None:
    cond, x = conditioning_of(sd, 1), latents(sd).x.requires_grad_()

    def gradient(network: Any) -> Tensor:
        return torch.autograd.grad(network(x, 3.0, 500.0, cond).out.square().sum(), x)[0]

    plain = gradient(sd.denoiser)
    with optimise(sd.unet):
        network = prepared(sd.denoiser, SCHEDULE)
        with torch.no_grad():
            network(x, 3.0, 500.0, cond)
        assert off(gradient(network), plain) < 1e-4


def test_what_cannot_be_kept_is_not(sd: Model, off: Off, conditioning_of: Conditions) -> None:
    assert prepared(sd.denoiser, SCHEDULE) == sd.denoiser, "nothing was optimised"
    prior = PriorDenoiser(None)
    assert prepared(prior, SCHEDULE) is prior
    with torch.inference_mode():
        cond = conditioning_of(sd, 1)
    with optimise(sd.unet), torch.no_grad():
        network = prepared(sd.denoiser, SCHEDULE)
        assert isinstance(network, FastDenoiser)
        fast = network(latents(sd).x, 3.0, 500.0, cond).out
        assert network.kept == [], "nobody counts the edits of a tensor made in inference mode"
    with torch.no_grad():
        assert off(fast, sd.denoiser(latents(sd).x, 3.0, 500.0, cond).out) < TOLERANCE
