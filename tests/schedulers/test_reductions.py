"""The zoo is small: which solvers are the same one, to rounding, on any denoiser and any levels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from unrolled.core.errors import BadInput
from unrolled.core.latents import Latents, LatentSpace
from unrolled.core.loop import steps
from unrolled.core.noise import Noise
from unrolled.core.prediction import Prediction
from unrolled.core.schedule import Schedule
from unrolled.core.solver import Draw, Evaluate, History, Solver
from unrolled.schedulers import (
    DDIM,
    DDPM,
    DEIS,
    DPM2,
    IPNDM,
    LCM,
    LMS,
    PLMS,
    TCD,
    Ancestral,
    Churned,
    Clipped,
    DPMpp2MSDE,
    DPMpp2S,
    DPMppSDE,
    DPMSolver,
    Euler,
    EulerAncestral,
    Heun,
    Renoised,
    SASolver,
    Singlestep,
    Thresholded,
    ToZero,
    UniPC,
)

SPACE = LatentSpace("test", 2, 1, 1.0, "")
UNEVEN = (10.0, 6.5, 4.0, 1.5, 0.9, 0.3, 0.1)
EVEN = (10.0, 8.5, 7.0, 5.5, 4.0, 2.5, 1.0)
TABLE = tuple(math.exp(-4 + 7 * i / 99) for i in range(100))


def crooked(x: Tensor, sigma: float, timestep: float = 0.0) -> Prediction:
    """No closed form, nothing special: what holds here holds anywhere."""
    return Prediction(0.7 * torch.tanh(x / (1 + sigma)) + 0.2 * x.flip(-1) / (1 + sigma**2) ** 0.5, x, sigma)


def run(solver: Solver, levels: Sequence[float] = UNEVEN) -> Tensor:
    x = Noise((0, 1))((2, 2, 3, 3), "latents").double() * levels[0]
    states = [step.x for step in steps(crooked, Latents(x, SPACE, levels[0], (0, 1)), Schedule.at(levels), solver)]
    return torch.stack(states)


def away(one: Solver, other: Solver, levels: Sequence[float] = UNEVEN) -> float:
    a, b = run(one, levels), run(other, levels)
    return float((a - b).abs().max() / b.abs().max())


def midpoint(
    denoise: Evaluate, x: Tensor, sigma: float, sigma_next: float, history: History, noise: Draw, /
) -> tuple[Tensor, History]:
    """The midpoint method in log sigma, as a textbook has it."""
    middle = math.exp((math.log(sigma) + math.log(sigma_next)) / 2)
    slope = denoise(x + (middle - sigma) * denoise(x, sigma).eps, middle).eps
    return x + (sigma_next - sigma) * slope, ()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        pytest.param(DDIM(), Euler(), id="DDIM is Euler"),
        pytest.param(DDPM(), EulerAncestral(), id="DDPM is ancestral Euler"),
        pytest.param(Renoised(Euler(), Ancestral(1.0)), DDPM(), id="which is Euler further down and noise"),
        pytest.param(Renoised(Euler(), Ancestral(0.4)), DDIM(0.4), id="with DDIM's eta too"),
        pytest.param(DPMSolver(1), Euler(), id="DPM-Solver++ 1 is Euler"),
        pytest.param(DPMSolver(1, predicts="eps"), Euler(), id="DPM-Solver 1 is Euler"),
        pytest.param(DPMSolver(1, tau=1.0), DDPM(), id="its SDE is DDPM"),
        pytest.param(Singlestep(1), Euler(), id="single-step 1 is Euler"),
        pytest.param(LMS(1), Euler(), id="LMS 1 is Euler"),
        pytest.param(IPNDM(1), Euler(), id="IPNDM 1 is Euler"),
        pytest.param(DEIS(1), Euler(), id="DEIS 1 is Euler"),
        pytest.param(UniPC(1, uncorrected=UNEVEN), Euler(), id="UniP 1 is Euler"),
        pytest.param(UniPC(2, uncorrected=UNEVEN), DPMSolver(2), id="UniP 2 is DPM-Solver++ 2M"),
        pytest.param(SASolver(1, 0), Euler(), id="SA-Solver 1 is Euler"),
        pytest.param(SASolver(1, 0, tau=0.5), DPMSolver(1, tau=0.5), id="with noise too"),
        pytest.param(SASolver(3, 0, predicts="eps"), DEIS(3), id="SA-Solver on the noise is DEIS"),
        pytest.param(DEIS(2), DPMSolver(2, predicts="eps", solver_type="heun"), id="DEIS 2 is DPM-Solver 2, exact"),
        pytest.param(DPM2(), midpoint, id="DPM2 is the midpoint method in log sigma"),
        pytest.param(DPM2(1.0), Renoised(midpoint, Ancestral(1.0)), id="DPM2 ancestral likewise"),
        pytest.param(DPMpp2S(), Singlestep(2), id="DPM++ 2S is single-step 2"),
        pytest.param(DPMppSDE(0.0), DPMpp2S(), id="DPM++ SDE without noise is DPM++ 2S"),
        pytest.param(TCD(0.0, UNEVEN[::-1]), Euler(), id="TCD without noise is Euler"),
        pytest.param(Churned(Heun(), 0.0), Heun(), id="no churn is none"),
    ],
)
def test_one_solver_is_another(one: Solver, other: Solver) -> None:
    assert away(one, other) < 1e-12


@pytest.mark.parametrize("order", [2, 3, 4])
def test_on_even_levels_lms_is_adams_bashforth_which_ipndm_and_plms_are_anywhere(order: int) -> None:
    assert away(LMS(order), IPNDM(order), EVEN) < 1e-12
    assert away(LMS(order), IPNDM(order)) > 1e-3


def test_plms_is_ipndm_but_for_its_first_step() -> None:
    start = next(iter(steps(crooked, _start(), Schedule.at(EVEN), IPNDM())))
    rest = Schedule.at(EVEN)[1:]
    one, other = (list(steps(crooked, start.latents, rest, solver))[-1].x for solver in (IPNDM(), PLMS()))
    assert torch.allclose(one, other, atol=1e-12)


def test_lcm_is_consistency_sampling_but_for_its_boundary() -> None:
    levels = (TABLE[90], TABLE[60], TABLE[20], 0.0)
    assert 0.0 < away(LCM(TABLE), Renoised(Euler(), ToZero()), levels) < 1e-4
    # At timestep 0 the boundary condition returns x itself.
    x = torch.ones(1, 1, 2, 2)
    end, _ = LCM(TABLE)(crooked, x, TABLE[0], 0.0, (), lambda *_: x)
    assert torch.allclose(end, x / (1 + TABLE[0] ** 2) ** 0.5)


def test_tcd_with_all_noise_goes_down_to_the_lowest_training_noise() -> None:
    levels = (TABLE[90], TABLE[60], TABLE[20], TABLE[0])
    one, other = run(TCD(1.0, TABLE), levels), run(Renoised(Euler(), lambda s, s_next: TABLE[0]), levels)
    assert torch.equal(one, other)


def _start() -> Latents:
    return Latents(Noise((0,))((1, 2, 3, 3), "latents").double() * EVEN[0], SPACE, EVEN[0], (0,))


def test_a_correction_keeps_what_was_edited_between_two_steps() -> None:
    """diffusers' UniPC forgets an edit of the latents; here it is the state, to the end."""
    for solver in (UniPC(2), SASolver(2, 2)):
        ends = []
        for nudge in (0.0, 1e-3):
            for step in steps(crooked, _start(), Schedule.at(UNEVEN), solver):
                if step.index == len(UNEVEN) - 3:
                    step.x = step.x + nudge
            ends.append(step.x)
        # The slope of x -> x0 is below 1, so that most of the nudge is left.
        assert float((ends[1] - ends[0]).abs().min()) > 2e-5


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: DPMSolver(4), r"DPM-Solver has orders 1 to 3, got 4: take one of them\."),
        (lambda: UniPC(0), r"UniPC has orders 1 to 3, got 0: take one of them\."),
        (lambda: Singlestep(5), r"Single-step DPM-Solver has orders 1 to 3, got 5: take one of them\."),
        (lambda: LMS(0), r"LMS has orders 1 to 4, got 0: take one of them\."),
        (lambda: IPNDM(5), r"IPNDM has orders 1 to 4, got 5: take one of them\."),
        (lambda: DEIS(9), r"DEIS has orders 1 to 4, got 9: take one of them\."),
        (lambda: DPMpp2MSDE(-1.0), r"eta goes from 0 \(deterministic\) to 1 \(ancestral\), got -1\."),
        (lambda: DPMppSDE(2.0), r"eta goes from 0 \(deterministic\) to 1 \(ancestral\), got 2\."),
        (lambda: Ancestral(2.0), r"eta goes from 0 \(deterministic\) to 1 \(ancestral\), got 2\."),
        (lambda: SASolver(2, tau=-1.0), r"tau is 0 \(no noise\) or more, 1 the reverse SDE, got -1\."),
        (lambda: DPMSolver(2, tau=-1.0), r"tau is 0 \(no noise\) or more, 1 the reverse SDE, got -1\."),
        (lambda: Clipped(Euler(), -1.0), r"x0 is clipped to a limit above 0, got -1\."),
        (
            lambda: Thresholded(Euler(), 2.0),
            r"x0 is thresholded at a quantile of 0 to 1, of at most 1 or more, got 2 and 1\.",
        ),
        (lambda: SASolver(0), r"SA-Solver's predictor takes 1 to 4 points, got 0\."),
        (lambda: SASolver(2, 5), r"SA-Solver's corrector takes 0 to 4 points, got 5\."),
        (lambda: TCD(1.5, TABLE), r"TCD's gamma goes from 0 \(deterministic\) to 1 \(new noise in every step\), got 1\.5\."),
        (lambda: DPM2(-0.1), r"eta goes from 0 \(deterministic\) to 1 \(ancestral\), got -0\.1\."),
        (lambda: Churned(Euler(), 0.5), r"Churn's gamma goes from 0 to sqrt\(2\) - 1 = 0\.414, got 0\.5\."),
    ],
)
def test_an_order_or_amount_that_there_is_not_is_refused(build: object, message: str) -> None:
    assert callable(build)
    with pytest.raises(BadInput, match=message):
        build()
