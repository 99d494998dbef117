"""Guidance and step in one pass against the parts they are made of, and the embeddings of timesteps."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor
from unrolled.core.conditioning import Conditioning
from unrolled.core.errors import BadInput
from unrolled.core.guidance import classifier_free
from unrolled.core.prediction import Kind, Preconditioned, Prediction
from unrolled.core.solver import Past
from unrolled.kernels import guided_step as module
from unrolled.kernels import timestep_embedding as embedding_module
from unrolled.kernels.guided_step import guided_step, reference, step_numbers
from unrolled.kernels.timestep_embedding import timestep_embedding
from unrolled.schedulers.euler import Euler
from unrolled.schedulers.multistep import Multistep, Row

pytest.importorskip("triton")

Draw = Callable[..., Tensor]
Agree = Callable[..., None]
HALF, SINGLE = torch.float16, torch.float32
KINDS: list[Kind] = ["epsilon", "v", "x0", Preconditioned(0.5)]
ROWS = [Row(0.5, (0.7,)), Row(0.9, (0.7, -0.2), 0.3), Row(1.0, (2.0, -1.0, 0.3, 0.1, -0.4)), Row(0.0, (1.0,), 1.0)]


def check(agree: Agree, x: Tensor, cond: Tensor, uncond: Tensor | None, times: float = 3.0, **rest: Any) -> None:
    """Ours is what the same formulas give in float64; sums of several terms are rounded in between."""
    x_next, x0 = guided_step(x, cond, uncond, backend="triton", **rest)
    wide: Any = {
        "guidance_scale": 1.0, "kind": "epsilon", "predicts": "x0", "history": (), "noise": None, **rest,
    }  # fmt: skip
    wide["history"] = [past.double() for past in wide["history"]]
    wide["noise"] = None if wide["noise"] is None else wide["noise"].double()
    exact, exact_x0 = reference(x.double(), cond.double(), None if uncond is None else uncond.double(), **wide)
    for ours, theirs in ((x_next, exact), (x0, exact_x0)):
        assert ours.dtype == x.dtype
        assert ours.is_contiguous()
        agree(ours, theirs, times)


@pytest.mark.parametrize("predicts", ["x0", "eps"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{len(row.points)} points")
@pytest.mark.parametrize("sigma", [0.03, 2.5])
def test_every_kind_and_row(predicts: str, kind: Kind, row: Row, sigma: float, draw: Draw, agree: Agree) -> None:
    x, cond, uncond, noise = (draw(2, 4, 9, 7) for _ in range(4))
    history = [draw(2, 4, 9, 7) for _ in row.points[1:]]
    rest = {"kind": kind, "sigma": sigma, "row": row, "predicts": predicts, "history": history, "noise": noise}
    # From x0 the noise is had by a division by sigma, which has the differences' rounding grow.
    times = 3.0 if sigma > 1 else 30.0
    check(agree, x, cond, uncond, times, guidance_scale=7.5, **rest)
    check(agree, x, cond, None, times, **rest)


@pytest.mark.parametrize("dtypes", [(SINGLE, HALF), (HALF, HALF), (HALF, SINGLE)], ids=str)
def test_dtypes(dtypes: tuple[torch.dtype, torch.dtype], draw: Draw, agree: Agree) -> None:
    kept, network = dtypes
    x, noise, past = (draw(1, 4, 16, 16, dtype=kept) for _ in range(3))
    cond, uncond = (draw(1, 4, 16, 16, dtype=network) for _ in range(2))
    row = Row(0.5, (0.7, -0.3), 0.2)
    check(agree, x, cond, uncond, guidance_scale=5.0, sigma=2.0, row=row, history=[past], noise=noise)


@pytest.mark.parametrize("scale", [0.0, 0.3, 1.0, 30.0])
def test_guidance_scales(scale: float, draw: Draw, agree: Agree) -> None:
    x, cond, uncond = (draw(1, 4, 16, 16) for _ in range(3))
    check(agree, x, cond, uncond, guidance_scale=scale, sigma=2.0, row=ROWS[0])


@pytest.mark.parametrize(
    "shape", [(1, 1), (3, 4, 5), (1, 4, 1, 1), (2, 4, 33, 31), (1, 4, 128, 128), (2, 3, 2, 3, 5)], ids=str
)
def test_every_size(shape: tuple[int, ...], draw: Draw, agree: Agree) -> None:
    x, cond, uncond = (draw(*shape) for _ in range(3))
    check(agree, x, cond, uncond, guidance_scale=3.0, sigma=2.0, row=ROWS[0])


def test_outputs_as_networks_leave_them(draw: Draw, agree: Agree) -> None:
    x, past, noise = draw(2, 4, 6, 5), draw(2, 6, 4, 5).transpose(1, 2), draw(2, 4, 6, 10)[..., ::2]
    rest: dict[str, Any] = {
        "guidance_scale": 3.0,
        "sigma": 2.0,
        "row": Row(0.5, (0.7, 0.1), 0.2),
        "history": [past],
        "noise": noise,
    }
    both = draw(4, 8, 6, 5)  # a batch of two halves that says the variance too
    uncond, cond = both[:, :4].chunk(2)
    check(agree, x, cond, uncond, **rest)
    uncond, cond = both.to(memory_format=torch.channels_last)[:, :4].chunk(2)
    check(agree, x, cond, uncond, **rest)
    check(agree, x.to(memory_format=torch.channels_last), cond, both[2:, 4:], **rest)
    check(agree, x, draw(2, 4, 12, 5)[:, :, ::2], draw(2, 4, 6, 10)[..., ::2], **rest)  # one of them copied


def test_it_is_guidance_and_solver(draw: Draw) -> None:
    """The same step by classifier_free, Prediction and the solvers."""
    x, outs = draw(2, 4, 8, 8), {1.0: draw(2, 4, 8, 8), 0.0: draw(2, 4, 8, 8)}

    class Network:
        def __call__(self, x: Tensor, sigma: float, timestep: float, conditioning: Conditioning) -> Prediction:
            assert conditioning.context is not None
            return Prediction(outs[float(conditioning.context.mean())], x, sigma)

    cond, uncond = Conditioning(context=torch.ones(2, 1, 1)), Conditioning(context=torch.zeros(2, 1, 1))
    denoiser = classifier_free(Network(), cond, uncond, 7.5, batched=False)
    past = Past(4.0, draw(2, 4, 8, 8), draw(2, 4, 8, 8))
    row = Row(0.4, (0.8, -0.2))
    solver = Multistep(lambda *_: row, order=2)
    wanted, _ = solver(lambda x, sigma: denoiser(x, sigma, 0.0), x, 3.0, 1.2, (past,), lambda *_: x)
    options: dict[str, Any] = {"guidance_scale": 7.5, "sigma": 3.0}
    for backend in ("reference", "triton", "auto"):
        ours, x0 = guided_step(
            x, outs[1.0], outs[0.0], row=row, history=[past.x0], backend=backend, **options
        )  # fmt: skip
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(x0, denoiser(x, 3.0, 0.0).x0, rtol=1e-5, atol=1e-4)
        if backend == "reference":
            assert torch.equal(ours, wanted), "these are the very same formulas"
    wanted, _ = Euler()(lambda x, sigma: denoiser(x, sigma, 0.0), x, 3.0, 1.2, (), lambda *_: x)
    row = Row(1.0, (1.2 - 3.0,))
    ours, _ = guided_step(x, outs[1.0], outs[0.0], row=row, predicts="eps", backend="triton", **options)
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-4)


def test_a_table_of_steps_on_the_device(draw: Draw, device: torch.device) -> None:
    """As a captured step runs it: the same launch, other numbers."""
    x, cond, uncond = (draw(1, 4, 8, 8) for _ in range(3))
    steps = [(3.0, Row(0.5, (0.7,))), (0.4, Row(0.1, (0.9,)))]
    table = torch.tensor([step_numbers(7.5, "v", sigma, row) for sigma, row in steps], device=device)
    for numbers, (sigma, row) in zip(table, steps, strict=True):
        wanted = guided_step(x, cond, uncond, guidance_scale=7.5, kind="v", sigma=sigma, row=row, backend="triton")
        for ours, theirs in zip(module.fused(x, cond, uncond, [], None, numbers), wanted, strict=True):
            assert torch.equal(ours, theirs)


def test_what_comes_out_is_nobody_elses(draw: Draw) -> None:
    x, cond = draw(1, 4, 8, 8), draw(1, 4, 8, 8)
    for backend in ("reference", "triton"):
        for kind in KINDS:
            before = x.clone(), cond.clone()
            for out in guided_step(x, cond, kind=kind, sigma=1.0, row=ROWS[0], backend=backend):
                out.fill_(7.0)
            assert torch.equal(x, before[0])
            assert torch.equal(cond, before[1])


def test_opcheck(draw: Draw, device: torch.device) -> None:
    x, cond, uncond, past, noise = (draw(1, 4, 3, 5) for _ in range(5))
    numbers = torch.tensor(step_numbers(7.5, "epsilon", 2.0, Row(0.5, (0.7, 0.1), 0.2)), device=device)
    torch.library.opcheck(module.fused, (x, cond, uncond, [past], noise, numbers))
    torch.library.opcheck(module.fused, (x, cond.half(), None, [], None, numbers))
    torch.library.opcheck(embedding_module.fused, (draw(3), 8, True, 0.0, 1e4))


X = torch.zeros(1, 4, 2, 2)


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        (
            {"kind": "score"},
            "A network's output is epsilon, v or x0 and a method extrapolates x0 or eps, not 'score' and 'x0'.",
        ),
        (
            {"predicts": "v"},
            "A network's output is epsilon, v or x0 and a method extrapolates x0 or eps, not 'epsilon' and 'v'.",
        ),
        ({"x": torch.zeros(4)}, "Latents are (batch, channels, …), but were given as (4,)."),
        ({"cond": X[:, :3]}, "cond is like x, (1, 4, 2, 2), but was given as (1, 3, 2, 2)."),
        ({"uncond": X[0]}, "uncond is like x, (1, 4, 2, 2), but was given as (4, 2, 2)."),
        ({"noise": X[0]}, "noise is like x, (1, 4, 2, 2), but was given as (4, 2, 2)."),
        ({"history": [X, X[0]]}, "history[1] is like x, (1, 4, 2, 2), but was given as (4, 2, 2)."),
        ({"history": [X]}, "A row of 1 points takes one less of earlier estimates, but 1 were given."),
        (
            {"row": Row(1.0, (1.0,), 0.5)},
            "This row adds 0.5 of noise, but none was given: give noise of unit variance like x.",
        ),
        ({"backend": "sdpa"}, "There is no guided_step 'sdpa': use auto, triton, torch, reference."),
        (
            {"backend": "triton", "history": [X] * 5, "row": Row(1.0, (1.0,) * 6)},
            "Our kernel of guided_step takes up to 4 earlier estimates, but was given 5.",
        ),
    ],
)
def test_errors(rest: dict[str, Any], message: str, device: torch.device) -> None:
    given = {"x": X.to(device), "cond": X.to(device), "sigma": 1.0, "row": Row(1.0, (1.0,)), **rest}
    with pytest.raises(BadInput) as raised:
        guided_step(**given)
    assert str(raised.value) == message


# --- timesteps


@pytest.mark.parametrize("dim", [320, 256, 2, 7, 1024])
@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_embeddings_of_timesteps(dim: int, flip: bool, shift: float, device: torch.device) -> None:
    timesteps = torch.tensor([0.0, 1.0, 250.25, 500.5, 999.0], device=device)
    wide = embedding_module.reference(timesteps.double(), dim, flip, shift, 1e4).float()
    theirs = get_timestep_embedding(timesteps, dim, flip, shift)
    for backend in ("auto", "reference", "triton"):
        for given in (timesteps, torch.stack([timesteps, timesteps], 1)[:, 0]):
            ours = timestep_embedding(given, dim, flip_sin_to_cos=flip, freq_shift=shift, backend=backend)
            assert ours.is_contiguous()
            # An angle of 999 is known to 6e-5 in float32, theirs likewise.
            torch.testing.assert_close(ours, wide, rtol=0, atol=2e-4)
            torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-4)


def test_embeddings_of_whole_timesteps_and_of_none(device: torch.device) -> None:
    whole = torch.tensor([3, 981], device=device)
    ours = timestep_embedding(whole, 64, backend="triton")
    torch.testing.assert_close(ours, timestep_embedding(whole.float(), 64), rtol=0, atol=2e-4)
    assert timestep_embedding(whole[:0], 64, backend="triton").shape == (0, 64)


@pytest.mark.parametrize(("shape", "dim", "shift"), [((2, 1), 8, 0.0), ((), 8, 0.0), ((2,), 1, 0.0), ((2,), 2, 1.0)])
def test_embeddings_that_cannot_be(shape: tuple[int, ...], dim: int, shift: float) -> None:
    with pytest.raises(BadInput) as raised:
        timestep_embedding(torch.zeros(shape), dim, freq_shift=shift)
    assert str(raised.value) == (
        "Embeddings are of (n,) timesteps and of 2 numbers or more, twice the shift of frequencies, but were asked for "
        f"{shape} in {dim} with a shift of {shift:g}."
    )
