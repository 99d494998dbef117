from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from unrolled.core.conditioning import Conditioning
from unrolled.core.denoiser import Denoiser, edited
from unrolled.core.errors import BadInput, NonFinite
from unrolled.core.guidance import classifier_free
from unrolled.core.latents import Latents, LatentSpace
from unrolled.core.loop import Step, denoise, steps
from unrolled.core.noise import Noise
from unrolled.core.prediction import Prediction
from unrolled.core.schedule import Schedule
from unrolled.core.solver import Draw, Evaluate, History, Past

TABLE = tuple(0.01 * 1.007**i for i in range(1000))
SCHEDULE = Schedule((8.0, 4.0, 2.0, 1.0, 0.0), (900.0, 600.0, 300.0, 100.0), TABLE)


def euler(
    denoise: Evaluate, x: Tensor, sigma: float, sigma_next: float, history: History, noise: Draw, /
) -> tuple[Tensor, History]:
    """A solver is any function of this form; this one remembers the last two points."""
    prediction = denoise(x, sigma)
    return prediction.x0 + sigma_next * prediction.eps, (*history, Past(sigma, x, prediction.x0))[-2:]


def midpoint(
    denoise: Evaluate, x: Tensor, sigma: float, sigma_next: float, history: History, noise: Draw, /
) -> tuple[Tensor, History]:
    middle = (sigma + sigma_next) / 2
    first = denoise(x, sigma)
    second = denoise(x + (middle - sigma) * first.eps, middle)
    new = noise(sigma, sigma_next) - noise(sigma, sigma_next)
    return x + (sigma_next - sigma) * second.eps + 0.1 * sigma_next * new, ()


def network(x: Tensor, sigma: float, timestep: float, conditioning: Conditioning, /) -> Prediction:
    context = conditioning.expand(len(x)).context
    assert context is not None
    push = context.mean((1, 2)).view(-1, 1, 1, 1) + timestep / 1000
    return Prediction(torch.tanh(x / (1 + sigma) * push), x, sigma)


COND, UNCOND = (Conditioning(context=torch.full((1, 3, 2), value)) for value in (0.8, 0.2))


@pytest.fixture
def denoiser() -> Denoiser:
    return classifier_free(network, COND, UNCOND, 3.0)


@pytest.fixture
def start(space: LatentSpace) -> Latents:
    return Latents(8.0 * Noise((0, 1))((2, 4, 4, 4), "latents"), space, 8.0, (0, 1))


def test_every_intermediate_is_shown(denoiser: Denoiser, start: Latents) -> None:
    x = start.x
    seen = list(steps(denoiser, start, SCHEDULE, euler))
    assert [s.index for s in seen] == [0, 1, 2, 3]
    for i, step in enumerate(seen):
        sigma, sigma_next, timestep = SCHEDULE.sigmas[i], SCHEDULE.sigmas[i + 1], SCHEDULE.timesteps[i]
        assert (step.sigma, step.sigma_next, step.timestep, step.total) == (sigma, sigma_next, timestep, 4)
        cond, uncond = (network(x, sigma, timestep, c).out for c in (COND, UNCOND))
        guided = uncond + 3.0 * (cond - uncond)
        x0 = x - sigma * guided
        x_next = x0 + sigma_next * guided
        wanted = {"before": x, "cond": cond, "uncond": uncond, "out": guided, "x0": x0, "x": x_next}
        for name, value in wanted.items():
            shown = getattr(step, name) if hasattr(step, name) else getattr(step.prediction, name)
            torch.testing.assert_close(shown, value, msg=lambda m, n=name, i=i: f"{n} of step {i}: {m}")  # type: ignore[misc]
        assert step.latents.sigma == sigma_next
        assert step.latents.x is step.x
        assert step.preview.is_clean
        assert torch.equal(step.preview.x, step.x0)
        x = step.x


def test_repr_of_a_step(denoiser: Denoiser, start: Latents) -> None:
    step = next(iter(steps(denoiser, start, SCHEDULE, euler)))
    assert repr(step) == "Step(1/4, sigma 8 -> 4, timestep 900, 1 evaluations)"


def test_every_evaluation_inside_a_step_is_shown(denoiser: Denoiser, start: Latents) -> None:
    for step in steps(denoiser, start, SCHEDULE, midpoint):
        first, second = step.predictions
        assert (first.sigma, second.sigma) == (step.sigma, (step.sigma + step.sigma_next) / 2)
        assert step.prediction is first
        assert torch.equal(first.x, step.before)
        assert not torch.equal(second.x, step.before)


def test_an_edit_of_x_is_the_new_state(denoiser: Denoiser, start: Latents) -> None:
    plain = denoise(denoiser, start, SCHEDULE, euler)
    run = []
    for step in steps(denoiser, start, SCHEDULE, euler):
        if step.index == 1:
            step.x = step.x * 0.5
            halved = step.x
        run.append(step)
    assert run[2].before is halved
    assert not torch.allclose(run[-1].x, plain.x)
    again = denoise(denoiser, replace(start, x=halved, sigma=2.0), SCHEDULE[2:], euler)
    torch.testing.assert_close(run[-1].x, again.x)


def test_an_edit_of_the_starting_latents(denoiser: Denoiser, start: Latents) -> None:
    moved = replace(start, x=start.x + 1)
    first = next(iter(steps(denoiser, moved, SCHEDULE, euler)))
    assert torch.equal(first.before, start.x + 1)
    assert not torch.allclose(denoise(denoiser, moved, SCHEDULE, euler).x, denoise(denoiser, start, SCHEDULE, euler).x)


def guided_out(p: Prediction) -> Prediction:
    return replace(p, out=p.out * 0.5)


def clamped_x0(p: Prediction) -> Prediction:
    return p.with_x0(p.x0.clamp(-0.1, 0.1))


def clamped_x0_keeping_eps(p: Prediction) -> Prediction:
    return p.with_x0(p.x0.clamp(-0.1, 0.1), keep_eps=True)


def cond_again(p: Prediction) -> Prediction:
    assert p.cond is not None
    assert p.uncond is not None
    return replace(p, out=p.uncond + 9.0 * (p.cond - p.uncond))


@pytest.mark.parametrize("edit", [guided_out, clamped_x0, clamped_x0_keeping_eps, cond_again])
def test_an_edit_of_a_prediction(denoiser: Denoiser, start: Latents, edit: Callable[[Prediction], Prediction]) -> None:
    for step in steps(edited(denoiser, edit), start, SCHEDULE, euler):
        wanted = edit(denoiser(step.before, step.sigma, step.timestep))
        torch.testing.assert_close(step.x0, wanted.x0)
        torch.testing.assert_close(step.x, wanted.x0 + step.sigma_next * wanted.eps)
        assert not torch.allclose(step.x0, denoiser(step.before, step.sigma, step.timestep).x0)


def test_keep_eps_leaves_the_direction(start: Latents) -> None:
    prediction = Prediction(torch.ones(1), torch.full((1,), 10.0), 4.0)
    assert float(prediction.with_x0(torch.ones(1)).eps) == pytest.approx(9 / 4)
    assert float(prediction.with_x0(torch.ones(1), keep_eps=True).eps) == 1.0


@pytest.mark.parametrize("which", [COND, UNCOND])
def test_an_edit_before_guidance(start: Latents, which: Conditioning) -> None:
    """Wrapping the network changes one of the two predictions and leaves the other."""

    def doubled(x: Tensor, sigma: float, timestep: float, conditioning: Conditioning, /) -> Prediction:
        p = network(x, sigma, timestep, conditioning)
        return replace(p, out=2 * p.out) if conditioning is which else p

    step = next(iter(steps(classifier_free(doubled, COND, UNCOND, 3.0, batched=False), start, SCHEDULE, euler)))
    cond, uncond = (doubled(start.x, 8.0, 900.0, c).out for c in (COND, UNCOND))
    assert step.prediction.cond is not None
    assert step.prediction.uncond is not None
    torch.testing.assert_close(step.prediction.cond, cond)
    torch.testing.assert_close(step.prediction.uncond, uncond)
    torch.testing.assert_close(step.prediction.out, uncond + 3.0 * (cond - uncond))


@pytest.mark.parametrize("solver", [euler, midpoint])
@pytest.mark.parametrize("way", ["break", "stop", "hook"])
def test_stopped_and_continued_as_if_never_stopped(
    denoiser: Denoiser, start: Latents, way: str, solver: Callable[..., tuple[Tensor, History]]
) -> None:
    whole = denoise(denoiser, start, SCHEDULE, solver)

    def stop(step: Step) -> None:
        step.stop = step.index == 1

    if way == "hook":
        stopped = denoise(denoiser, start, SCHEDULE, solver, [stop])
    else:
        for step in steps(denoiser, start, SCHEDULE, solver):
            stopped = step.latents
            if way == "stop":
                stop(step)
            elif step.index == 1:
                break
    assert (stopped.sigma, stopped.is_clean) == (2.0, False)
    assert stopped.seeds == (0, 1)
    assert torch.equal(denoise(denoiser, stopped, SCHEDULE[2:], solver).x, whole.x)


def test_stop_runs_no_further_step(denoiser: Denoiser, start: Latents) -> None:
    calls: list[float] = []

    def counted(x: Tensor, sigma: float, timestep: float) -> Prediction:
        calls.append(sigma)
        return denoiser(x, sigma, timestep)

    for step in steps(counted, start, SCHEDULE, euler):
        step.stop = True
    assert calls == [8.0]


def test_hooks_see_every_step_in_order_and_may_edit(denoiser: Denoiser, start: Latents) -> None:
    order: list[tuple[str, int]] = []

    def first(step: Step) -> None:
        order.append(("first", step.index))
        step.x = torch.zeros_like(step.x)

    def second(step: Step) -> None:
        order.append(("second", step.index))
        assert not step.x.any()

    end = denoise(denoiser, start, SCHEDULE, euler, [first, second])
    assert order == [(name, i) for i in range(4) for name in ("first", "second")]
    assert end.is_clean
    assert not end.x.any()


def test_a_cut_run_counts_on_in_the_whole(denoiser: Denoiser, start: Latents) -> None:
    later = replace(start, x=start.x / 4, sigma=2.0)
    assert [(s.index, s.total) for s in steps(denoiser, later, SCHEDULE[2:], euler)] == [(2, 4), (3, 4)]


def test_the_noise_is_the_seeds_own_unless_given(denoiser: Denoiser, start: Latents) -> None:
    own = denoise(denoiser, start, SCHEDULE, midpoint)
    assert torch.equal(denoise(denoiser, start, SCHEDULE, midpoint, noise=Noise((0, 1))).x, own.x)
    assert not torch.allclose(denoise(denoiser, start, SCHEDULE, midpoint, noise=Noise((5, 6))).x, own.x)
    assert not torch.allclose(denoise(denoiser, replace(start, stream="b"), SCHEDULE, midpoint).x, own.x)


def test_an_image_does_not_change_with_the_batch(denoiser: Denoiser, start: Latents) -> None:
    whole = denoise(denoiser, start, SCHEDULE, midpoint)
    torch.testing.assert_close(denoise(denoiser, start[1:], SCHEDULE, midpoint).x, whole.x[1:])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_not_finite_names_the_step(denoiser: Denoiser, start: Latents, value: float) -> None:
    def faulty(x: Tensor, sigma: float, timestep: float) -> Prediction:
        p = denoiser(x, sigma, timestep)
        out = p.out.clone()
        out[1, 0, 0, 0] = value if sigma == 2.0 else 0.0
        return replace(p, out=out)

    run = iter(steps(faulty, start, SCHEDULE, euler))
    assert [next(run).index, next(run).index] == [0, 1]
    with pytest.raises(NonFinite, match=r"NaN or infinity appeared in step 3 of 4 \(sigma 2\): run in float32"):
        next(run)


@pytest.mark.parametrize(("sigma", "part"), [(0.0, slice(None)), (8.01, slice(None)), (8.0, slice(1, None))])
def test_a_schedule_must_start_where_the_latents_are(denoiser: Denoiser, start: Latents, sigma: float, part: slice) -> None:
    schedule = SCHEDULE[part]
    message = (
        rf"The latents are at sigma {sigma:g} but the schedule starts at {schedule.sigmas[0]:g}: cut the schedule there"
    )
    with pytest.raises(BadInput, match=message):
        next(iter(steps(denoiser, replace(start, sigma=sigma), schedule, euler)))


def test_an_empty_schedule_changes_nothing(denoiser: Denoiser, start: Latents) -> None:
    assert list(steps(denoiser, start, SCHEDULE[:0], euler)) == []
    assert denoise(denoiser, start, SCHEDULE[:0], euler) is start


def test_no_gradients_are_recorded(start: Latents) -> None:
    weight = torch.ones(1, requires_grad=True)
    for step in steps(lambda x, sigma, _: Prediction(x * weight / 10, x, sigma), start, SCHEDULE, euler):
        assert not step.x.requires_grad
        assert not step.prediction.out.requires_grad


def test_history_is_state_too() -> None:
    """Dropping the history in a step is what a saved and resumed run would see."""
    import unrolled

    x = torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    space = unrolled.LatentSpace("none", 4, 1, 1.0, "")
    schedule = unrolled.Schedule.at([8.0, 4.0, 2.0, 1.0, 0.5, 0.0])

    def denoiser(x: Tensor, sigma: float, timestep: float) -> unrolled.Prediction:
        return unrolled.Prediction.from_x0(torch.sin(x) / (1 + sigma), x, sigma)

    def run(drop: bool) -> Tensor:
        for step in unrolled.steps(denoiser, unrolled.Latents(x, space, 8.0), schedule, unrolled.DPMpp2M()):
            if drop and step.index == 2:
                step.history = ()
        return step.x

    assert not torch.equal(run(drop=True), run(drop=False))
