"""On a CUDA device: the same pictures as on the CPU, in every precision. Run with `pytest -m gpu`."""

import numpy as np
import pytest
import torch
from unrolled.chains.chain import Chain, Inpaint, TextToImage
from unrolled.chains.run import run
from unrolled.core.loading import Shelf
from unrolled.core.source import MINIATURES

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

TEXT = TextToImage(prompt="a castle", steps=20, solver="dpm++2m")
MASK = str(MINIATURES.parent / "chains" / "inputs" / "mask.png")


@pytest.mark.parametrize(("dtype", "mean_difference"), [(torch.float32, 0.5), (torch.float16, 3.0), (torch.bfloat16, 12.0)])
def test_the_picture_of_the_cpu(dtype: torch.dtype, mean_difference: float) -> None:
    chain = Chain(stages=(TEXT,), batch=2)
    pairs = zip(
        run(chain, Shelf(device="cuda", dtype=dtype)).pictures, run(chain, Shelf(device="cpu")).pictures, strict=True
    )
    for ours, theirs in pairs:
        difference = np.abs(np.asarray(ours).astype(int) - np.asarray(theirs).astype(int))
        assert difference.mean() <= mean_difference, "the noise is drawn on the CPU, so only rounding may differ"


def test_inpainting_runs_in_half_precision() -> None:
    chain = Chain(stages=(TEXT, Inpaint(prompt="a castle", mask=MASK, fit=True, steps=10, solver="dpm++2m")))
    result = run(chain, Shelf(device="cuda", dtype=torch.float16))
    assert result.pictures[0].size == (64, 64)
    assert result.notes == []


def test_a_step_does_not_wait_for_the_device() -> None:
    shelf = Shelf(device="cuda", dtype=torch.float16)
    run(Chain(stages=(TEXT,)), shelf)  # warm up: loading copies and synchronises
    from unrolled import Euler, classifier_free, encode_text, noise, steps

    model = shelf.load("sd-1.5")
    cond, uncond = encode_text(model, "a castle"), encode_text(model, "")
    schedule = model.schedule(5, "euler")
    latents, denoiser = noise(model, schedule), classifier_free(model.denoiser, cond, uncond)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        seen = [step.index for step, _ in zip(steps(denoiser, latents, schedule, Euler()), range(4), strict=False)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert seen == [0, 1, 2, 3]
