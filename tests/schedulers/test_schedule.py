"""Cutting a schedule, and what the UNet is told between its levels."""

from __future__ import annotations

import math
from typing import Any

import pytest
from unrolled.core.errors import BadInput
from unrolled.core.schedule import Schedule, timestep_of
from unrolled.schedulers.config import read_scheduler

SD15 = {"_class_name": "EulerDiscreteScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
TEN = Schedule(tuple(float(10 - i) for i in range(11)), tuple(float(900 - 100 * i) for i in range(10)))


@pytest.fixture(scope="module")
def twenty() -> Schedule:
    return read_scheduler(SD15, timestep_spacing="leading", steps_offset=1).schedule(20)


@pytest.mark.parametrize(
    ("cut", "index"),
    [
        ({"step": 0}, 0),
        ({"step": 7}, 7),
        ({"step": 10}, 10),
        ({"steps_fraction": 0.0}, 0),
        ({"steps_fraction": 0.72}, 7),
        ({"steps_fraction": 1.0}, 10),
        ({"sigma": 4.0}, 6),  # the step that starts at 4 lies after a cut at 4
        ({"sigma": 4.5}, 6),
        ({"sigma": 3.9}, 7),
        ({"sigma": 11.0}, 0),
        ({"sigma": 0.0}, 10),
    ],
)
def test_index(cut: dict[str, Any], index: int) -> None:
    assert TEN.index(**cut) == index


@pytest.mark.parametrize(
    ("options", "fraction", "index"),
    [
        ({"timestep_spacing": "leading", "steps_offset": 1}, 0.8, 16),
        ({"timestep_spacing": "leading", "steps_offset": 1}, 0.0, 0),
        ({"timestep_spacing": "leading", "steps_offset": 1}, 1.0, 20),
        ({"timestep_spacing": "linspace", "use_karras_sigmas": True}, 0.8, 12),  # diffusers' refiner split: 12 + 8
    ],
)
def test_index_by_training_time(options: dict[str, Any], fraction: float, index: int) -> None:
    schedule = read_scheduler(SD15, **options).schedule(20)
    assert schedule.index(training_time=fraction) == index
    assert sum(t >= round(1000 - fraction * 1000) for t in schedule.timesteps) == index


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        ({}, r"^A cut is given in exactly one way \(step, steps_fraction, sigma or training_time\), got none\.$"),
        ({"step": 3, "sigma": 1.0}, r"exactly one way .* got \['sigma', 'step'\]\.$"),
        ({"step": 11}, r"^A cut at step = 11 is outside what is allowed, 0 to 10\.$"),
        ({"step": -1}, r"^A cut at step = -1 is outside"),
        ({"steps_fraction": 1.2}, r"^A cut at steps_fraction = 1\.2 is outside what is allowed, 0 to 1\.$"),
        ({"sigma": -0.1}, r"^A cut at sigma = -0\.1 is outside what is allowed, 0 to inf\.$"),
        ({"sigma": math.nan}, r"^A cut at sigma = nan is outside"),
        ({"training_time": 1.5}, r"^A cut at training_time = 1\.5 is outside what is allowed, 0 to 1\.$"),
        (
            {"training_time": 0.5},
            r"^This schedule does not know its training timesteps: cut it by step, steps_fraction or sigma\.$",
        ),
    ],
)
def test_index_refuses(cut: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        TEN.index(**cut)


@pytest.mark.parametrize("at", range(21))
def test_parts_share_their_boundary(at: int, twenty: Schedule) -> None:
    before, after = twenty.split(at)
    assert (len(before), len(after)) == (at, 20 - at)
    assert before.sigmas[-1] == after.sigmas[0] == twenty.sigmas[at]
    assert before.sigmas + after.sigmas[1:] == twenty.sigmas
    assert before.timesteps + after.timesteps == twenty.timesteps
    assert (before.first, after.first) == (0, at)
    assert after.start_std is None or at == 0
    assert before.start_std == twenty.start_std


def test_a_part_of_a_part_counts_from_the_whole(twenty: Schedule) -> None:
    part = twenty[5:][3:6]
    assert (part.first, len(part), part.sigmas) == (8, 3, twenty.sigmas[8:12])
    assert part.origin == twenty.origin


@pytest.mark.parametrize("at", range(20))
@pytest.mark.parametrize("off", [1.0, 1 + 0.9e-4, 1 - 0.9e-4])
def test_starting_at_a_level_of_its_own(at: int, off: float, twenty: Schedule) -> None:
    assert twenty.starting_at(twenty.sigmas[at] * off) == twenty[at:]


@pytest.mark.parametrize(("sigma", "above"), [(11.5, 0), (5.0, 4), (1.0, 12), (0.02, 20)])
def test_starting_between_its_levels(sigma: float, above: int, twenty: Schedule) -> None:
    """What is left of the step that crosses the level comes first; it is that step, not one more."""
    left = twenty.starting_at(sigma)
    assert sum(level > sigma for level in twenty.sigmas) == above
    assert left.sigmas == (sigma, *twenty.sigmas[above:])
    assert left.timesteps == (timestep_of(sigma, twenty.training_sigmas), *twenty.timesteps[above:])
    assert (left.first, left.start_std, left.finished_at) == (max(0, above - 1), None, twenty.finished_at)
    assert left.first + len(left) == max(20, 21 - above)


@pytest.mark.parametrize("sigma", [0.0, -1.0, math.nan])
def test_nothing_is_left_below_the_last_level(sigma: float, twenty: Schedule) -> None:
    with pytest.raises(BadInput, match=r"^Nothing is left of Schedule\(20 steps, .*\) below sigma (nan|-?\d)"):
        twenty.starting_at(sigma)
    with pytest.raises(BadInput, match=r"^Nothing is left of Schedule\(9 steps, .* below sigma 1\.6\.$"):
        twenty[:9].starting_at(1.6)


@pytest.mark.parametrize("part", [slice(None, None, 2), slice(None, None, -1), slice(7, 3)])
def test_only_a_run_of_steps_can_be_cut(part: slice) -> None:
    with pytest.raises(BadInput, match=r"^A schedule can be cut to a run of steps, not to \["):
        TEN[part]


@pytest.mark.parametrize(
    ("sigmas", "timesteps", "message"),
    [
        ((2.0, 1.0), (5.0, 4.0), r"^A schedule of 2 timesteps needs one sigma more than that, got 2\.$"),
        ((2.0, 2.0, 0.0), (5.0, 4.0), r"^The sigmas of a schedule must fall strictly and end at 0 or above, got 2 2 0\.$"),
        ((2.0, math.nan, 0.0), (5.0, 4.0), r"must fall strictly .* got 2 nan 0\.$"),
        ((1.0, -1.0), (5.0,), r"must fall strictly and end at 0 or above, got 1 -1\.$"),
    ],
)
def test_bad_levels(sigmas: tuple[float, ...], timesteps: tuple[float, ...], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        Schedule(sigmas, timesteps)


def test_the_planned_timestep_is_told_at_planned_levels(twenty: Schedule) -> None:
    assert tuple(twenty.timestep_at(sigma) for sigma in twenty.sigmas[:-1]) == twenty.timesteps


def test_between_training_timesteps_it_is_interpolated_in_log_sigma(twenty: Schedule) -> None:
    table = twenty.training_sigmas
    assert len(table) == 1000
    for timestep in (0, 1, 500, 998):
        assert twenty.timestep_at(table[timestep]) == timestep
        middle = math.sqrt(table[timestep] * table[timestep + 1])
        assert twenty.timestep_at(middle) == pytest.approx(timestep + 0.5)
    assert (twenty.timestep_at(table[-1] * 2), twenty.timestep_at(table[0] / 2)) == (999, 0)


def test_without_a_table_it_is_not_known() -> None:
    assert math.isnan(timestep_of(3.0, ()))
    assert TEN.timestep_at(3.0) == 200
    assert math.isnan(TEN.timestep_at(3.5))


def test_repr(twenty: Schedule) -> None:
    assert repr(twenty).startswith("Schedule(20 steps, sigmas 11.")
    assert repr(TEN) == "Schedule(10 steps, sigmas 10 9 … 1 0, timesteps 900 800 … 100 0, custom)"
