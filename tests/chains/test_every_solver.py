"""Whatever the solver remembers or draws: resumed, forked, replayed and reused, the pictures are the same to the byte."""

from __future__ import annotations

from pathlib import Path

import pytest
from unrolled.chains.cache import Cache
from unrolled.chains.chain import Chain, Stage, TextToImage
from unrolled.chains.fork import fork
from unrolled.chains.outputs import Result
from unrolled.chains.replay import replay
from unrolled.chains.run import resume, run
from unrolled.core.loading import Shelf
from unrolled.core.loop import Step
from unrolled.schedulers.config import SOLVERS

STEPS = 8
OF_OTHER_NETWORKS = {"edm-euler", "unclip"}
"""Solvers whose noise levels Stable Diffusion was not trained on."""


@pytest.fixture(scope="module")
def shelf() -> Shelf:
    return Shelf(device="cpu")


def pixels(result: Result) -> list[bytes]:
    return [picture.tobytes() for picture in result.pictures]


@pytest.mark.slow
@pytest.mark.parametrize("solver", sorted(SOLVERS.keys() - OF_OTHER_NETWORKS))
def test_a_run_is_a_run(solver: str, tiny_folder: Path, shelf: Shelf, tmp_path: Path) -> None:
    chain = Chain(stages=(TextToImage(name="text", model=str(tiny_folder), prompt="a castle", steps=STEPS, solver=solver),))
    cache = Cache(tmp_path / "cache")
    whole = run(chain, shelf, tmp_path / "whole", cache=cache)
    assert pixels(run(chain, shelf, cache=cache)) == pixels(whole)
    assert replay(whole.files[0]).same
    last = whole.trail["text"][-1][0].step
    for stop in {1, last // 2, last}:

        def watch(stage: Stage, step: Step, stop: int = stop) -> None:
            if step.index >= stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run(chain, shelf, tmp_path / f"{stop}", watch)
        assert pixels(resume(tmp_path / f"{stop}")) == pixels(whole)
        assert pixels(fork(chain, chain, shelf, stop).branch) == pixels(whole)
