"""Noise levels by name, and of one's own, in a chain."""

from __future__ import annotations

from pathlib import Path

import pytest
from unrolled.chains.chain import Chain, TextToImage
from unrolled.chains.plan import plan
from unrolled.chains.read import read_chain
from unrolled.chains.runs import Run
from unrolled.core.errors import BadChain
from unrolled.core.loading import Shelf


def run(folder: Path, keys: str) -> Run:
    (folder / "chain.toml").write_text(f'[[stage]]\ndo = "text-to-image"\nsolver = "euler"\n{keys}')
    (stage,) = plan(read_chain(folder / "chain.toml"), Shelf(device="cpu"))
    assert stage.run is not None
    return stage.run


def test_a_spacing_by_name(tmp_path: Path) -> None:
    schedule = run(tmp_path, 'spacing = "kl-optimal"\nsteps = 12').schedule
    assert (len(schedule), schedule.origin) == (12, "euler, kl-optimal")


@pytest.mark.parametrize("last", ["", ", 0", ", 0.0"])
def test_as_many_steps_as_sigmas(last: str, tmp_path: Path) -> None:
    schedule = run(tmp_path, f"sigmas = [14, 5, 1.5, 0.3{last}]").schedule
    assert schedule.sigmas == (14, 5, 1.5, 0.3, 0)


def test_as_many_steps_as_timesteps(tmp_path: Path) -> None:
    assert run(tmp_path, "timesteps = [999, 500.5, 20]").schedule.timesteps == (999, 500.5, 20)
    assert len(run(tmp_path, "timesteps = [999, 500, 20]\nsteps = 3").schedule) == 3


def test_a_strength_cuts_levels_of_ones_own(tmp_path: Path) -> None:
    text = '[[stage]]\ndo = "text-to-image"\n[[stage]]\ndo = "image-to-image"\nstrength = 0.5\nsigmas = [9, 4, 2, 1]'
    (tmp_path / "chain.toml").write_text(text)
    second = plan(read_chain(tmp_path / "chain.toml"), Shelf(device="cpu"))[1]
    assert second.run is not None
    assert second.run.schedule.sigmas[:2] == (2, 1)


@pytest.mark.parametrize("sigmas", [[14.0, 5.0, 0.0], (14.0, 5.0)])
def test_a_chain_made_in_python_or_read_back_says_the_same(sigmas: list[float]) -> None:
    stage = TextToImage(sigmas=sigmas)
    chain = Chain(stages=(stage,))
    assert chain.stages[0].steps == stage.steps == 2  # type: ignore[union-attr]
    assert Chain.model_validate(chain.model_dump()) == chain


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ('spacing = "cosine"', r"There is no spacing 'cosine': use one of align-your-steps, "),
        ("sigmas = [5, 1]\nsteps = 3", r"3 steps were asked for, but levels for 2 given: leave steps out\.$"),
        ("timesteps = [5, 1]\nsteps = 3", r"3 steps were asked for, but levels for 2 given: leave steps out\.$"),
        ('spacing = "beta"\nsigmas = [5, 1]', r"given by one of spacing, sigmas and timesteps: leave the others out\.$"),
        (
            "sigmas = []",
            r"The sigmas of a run begin above 0 and at most at 1e\+07 and fall strictly, to 0 at the lowest, got none\.$",
        ),
        ("sigmas = [0]", r"The sigmas of a run begin above 0 .* got 0\.$"),
        ("timesteps = [1000, 3]", r"The timesteps of a run begin above 0 and at most at 999 .* got 1000 3\.$"),
        ("sigmas = [nan]", r"finite number"),
    ],
)
def test_levels_that_are_none(keys: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(BadChain, match=message):
        run(tmp_path, keys)
