"""What happens where our kernels cannot run: named, they are refused with the reason; else everything runs without them.

| | no triton | no GPU | old card | heads of another size |
|---|---|---|---|---|
| ``optimise``, ``Shelf(fast=True)`` with attention or norms named | refused | refused | refused | refused (attention) |
| ``optimise``, ``prepared``, ``captured``, ``--fast`` as they come | torch's | torch's | torch's | torch's |
"""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner
from unrolled.__main__ import app
from unrolled.core.errors import BadInput, Note
from unrolled.core.guidance import classifier_free
from unrolled.core.loading import Model, Shelf
from unrolled.core.schedule import Schedule
from unrolled.kernels import backends
from unrolled.kernels.fast import captured, fast_of, optimise, prepared
from unrolled.schedulers import Euler

Off = Callable[[Tensor, Tensor], float]
SCHEDULE = Schedule((8.0, 3.0, 1.0), (800.0, 500.0), last_timestep=300.0)
WHY = {
    "no triton": "triton is not installed",
    "no GPU": "it has no kernel for cpu: TRITON_INTERPRET=1 runs ours there, slowly",
    "old card": "our kernels need compute capability 8.0 or more, and this card has 7.5",
    "heads": "our kernels take heads of 16 to 512 numbers, not 8",
}


@pytest.fixture(params=WHY)
def lacking(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A machine that lacks something, as the backends see it; what a CPU computes is the same on all of them."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    lack = str(request.param)
    monkeypatch.setattr(backends, "find_spec", lambda name: None if lack == "no triton" else object())
    if lack == "heads":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    if lack == "old card":
        plain = backends.fault
        card = torch.device("cuda")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        monkeypatch.setattr(backends, "fault", lambda name, device, *more, **options: plain(name, card, *more, **options))
    return lack


def test_named_it_is_refused_with_the_reason(sd: Model, lacking: str) -> None:
    """Before anything is changed."""
    asked: list[tuple[Any, dict[str, Any]]] = [(sd.text_encoder, {"attention": "triton"})]
    if lacking != "heads":  # the UNet's are of 16
        asked += [(sd.unet, {"attention": "triton"}), (sd.unet, {"norms": "triton"}), (sd.text_encoder, {"norms": "triton"})]
    for network, options in asked:
        with pytest.raises(BadInput) as raised:
            optimise(network, **options)
        assert f"cannot run on cpu ({WHY[lacking]}): use auto, or see unrolled doctor." in str(raised.value)
        assert fast_of(network) is None
        assert not any("forward" in vars(module) for module in network.modules())


def test_a_shelf_refuses_it_too(tiny_folder: Path, lacking: str) -> None:
    if lacking == "heads":
        pytest.skip("a shelf makes UNets and VAEs fast, and theirs are of 16")
    with pytest.raises(BadInput) as raised:
        Shelf(device="cpu", fast=True, attention="triton").load(str(tiny_folder))
    assert str(raised.value) == f"Attention 'triton' cannot run on cpu ({WHY[lacking]}): use auto, or see unrolled doctor."


def test_the_command_refuses_it_and_runs_without(tiny_folder: Path, tmp_path: Path, lacking: str) -> None:
    file = tmp_path / "chain.toml"
    file.write_text(f'[[stage]]\ndo = "text-to-image"\nmodel = "{tiny_folder}"\nprompt = "a castle"\nsteps = 2\n')
    given = ["run", str(file), "--output", str(tmp_path / "out"), "--device", "cpu", "--fast"]
    if lacking != "heads":
        refused = CliRunner().invoke(app, [*given, "--attention", "triton"])
        assert refused.exit_code != 0
        assert WHY[lacking] in f"{' '.join(refused.output.split())} {refused.exception}"
    assert CliRunner().invoke(app, given).exit_code == 0


def test_unnamed_it_is_not_missed(sd: Model, off: Off, lacking: str, conditioning_of: Callable[..., Any]) -> None:
    cond, uncond = conditioning_of(sd, 1), conditioning_of(sd, 2)
    x = 8 * torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(7))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", Note)
        plain = classifier_free(sd.denoiser, cond, uncond, 3.0)(x, 8.0, 800.0).out
        with optimise(sd.unet):
            for denoiser in (
                classifier_free(sd.denoiser, cond, uncond, 3.0),
                classifier_free(prepared(sd.denoiser, SCHEDULE), cond, uncond, 3.0),
                captured(sd.denoiser, cond, uncond, 3.0, SCHEDULE, Euler(), mode="graph").denoiser,
            ):
                assert off(denoiser(x, 8.0, 800.0).out, plain) < 1e-5


WITHOUT_TRITON = """
import sys
from dataclasses import replace
sys.modules["triton"] = None
import importlib.util
plain = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name == "triton" else plain(name, *more)
import torch
from unrolled.core.loading import Shelf
from unrolled.kernels.fast import captured_call
from unrolled.stages.decode import decode
from unrolled.stages.noise import noise
model = Shelf(device="cpu", fast=True).load(sys.argv[1])
captured_call(model.vae, mode="graph")
latents = replace(noise(model, model.schedule(2), seeds=[0]), sigma=0.0)
print(len(decode(model, latents)))
"""


def test_without_triton_all_of_it_is_imported_and_runs(tiny_folder: Path) -> None:
    """In a process of its own, where it cannot be imported at all."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRITON, str(tiny_folder)], capture_output=True, text=True, check=False
    )
    assert done.stdout == "1\n", done.stderr
