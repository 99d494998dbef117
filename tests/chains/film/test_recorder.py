"""What a film says of a step is what the step held; and filming changes nothing."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from unrolled import Latents, Model, classifier_free, decode, encode_text, noise, steps
from unrolled.chains.film import recorder
from unrolled.chains.film.colours import coloured, fitted, glow, small, webp
from unrolled.chains.film.heat import Heat
from unrolled.chains.film.recorder import Preview, Recorder
from unrolled.chains.film.values import Frame
from unrolled.core.errors import BadInput, NonFinite
from unrolled.core.loop import Step
from unrolled.kernels.attending import attending
from unrolled.schedulers.heun import Heun
from unrolled.stages.text import token_positions

PROMPT = "a red castle"


def filmed(
    model: Model,
    preview: Preview | None = None,
    heat: Heat | None = None,
    see: Callable[[Recorder, Step], object] = Recorder.see,
    **options: Any,
) -> tuple[tuple[Frame, ...], list[Step]]:
    cond, uncond = encode_text(model, PROMPT), encode_text(model, "")
    schedule, solver = model.sampling(steps=4, solver="euler")
    made = Recorder(preview or Preview(lambda latents: decode(model, latents)), 3.0, heat)
    taken = []
    denoiser = classifier_free(model.denoiser, cond, uncond, guidance_scale=3.0, **options)
    with attending(model.unet, (heat or Heat({})).edit, lambda place: place.cross and heat is not None):
        for step in steps(denoiser, noise(model, schedule, seeds=[5, 6]), schedule, solver):
            see(made, step)
            taken.append(step)
    return made.frames(), taken


def rms(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor[0].double())) / math.sqrt(tensor[0].numel())


def pixels(file: bytes) -> np.ndarray:
    import io

    return np.asarray(Image.open(io.BytesIO(file))).astype(int)


def test_a_frame_says_what_the_step_held(tiny: Model) -> None:
    frames, taken = filmed(tiny)
    assert [frame.index for frame in frames] == [0, 1, 2, 3]
    for frame, step in zip(frames, taken, strict=True):
        said = (frame.total, frame.sigma, frame.sigma_next, frame.timestep, frame.evaluations)
        assert said == (4, step.sigma, step.sigma_next, step.timestep, 1)
        prediction = step.prediction
        assert prediction.cond is not None
        assert prediction.uncond is not None
        assert frame.norms.x == pytest.approx(rms(step.x))
        assert frame.norms.x0 == pytest.approx(rms(step.x0))
        assert frame.norms.eps == frame.norms.out == pytest.approx(rms(prediction.out))
        assert frame.guided is not None
        assert frame.guided.scale == 3.0
        assert frame.guided.cond == pytest.approx(rms(prediction.cond))
        assert frame.guided.uncond == pytest.approx(rms(prediction.uncond))
        assert frame.guided.added == pytest.approx(rms(3.0 * (prediction.cond - prediction.uncond)))
        assert frame.guided.moved == pytest.approx(rms(2.0 * (prediction.cond - prediction.uncond)), rel=1e-4)
        assert frame.seconds >= step.seconds > 0
        assert frame.memory is not None
        assert frame.memory > 50e6


def test_pictures_are_the_decoders_and_the_last_x_is_the_finished_one(tiny: Model) -> None:
    frames, taken = filmed(tiny)
    for file, latents in ((frames[1].x0, taken[1].preview), (frames[-1].x, taken[-1].latents)):
        assert file == webp(decode(tiny, latents)[0])
    assert [frame.finished for frame in frames] == [False, False, False, True]
    assert pixels(frames[0].x).shape == (8, 8, 3), "noise is shown cell by cell"


def test_every_so_many_previews_are_decoded_and_the_last(tiny: Model) -> None:
    asked = list[float]()

    def count(latents: Latents) -> list[Image.Image]:
        asked.append(latents.sigma)
        return decode(tiny, latents)

    frames, _ = filmed(tiny, Preview(count, every=3))
    assert [frame.decoded for frame in frames] == [True, False, False, True]
    frames, _ = filmed(tiny, Preview(count, every=2))
    assert [frame.decoded for frame in frames] == [True, False, True, True]
    assert len(asked) == 3 + 4, "and the finished picture"
    with pytest.raises(BadInput, match="every so many steps, 1 or more, got 0"):
        Preview(count, every=0)


def test_every_preview_is_shown(tiny: Model) -> None:
    shown = list[tuple[tuple[int, int], str]]()
    preview = Preview(lambda latents: decode(tiny, latents), 2, lambda picture, words: shown.append((picture.size, words)))
    filmed(tiny, preview)
    assert [size for size, _ in shown] == [(64, 64), (8, 8), (64, 64), (8, 8)]
    assert shown[3][1].startswith("x0 in step 4 of 4, sigma 0.")


def test_a_decoder_that_gives_nan_leaves_the_latents_colours(tiny: Model) -> None:
    def nan(latents: Latents) -> list[Image.Image]:
        raise NonFinite("no")

    frames, _ = filmed(tiny, Preview(nan))
    assert not any(frame.decoded or frame.finished for frame in frames)
    assert pixels(frames[-1].x0).std() > 10, "and it is a picture of something"


def test_numbers_that_are_not_finite_are_none(tiny: Model) -> None:
    def broken(made: Recorder, step: Step) -> None:
        made.see(replace(step, x=step.x * math.nan))

    frames, _ = filmed(tiny, see=broken)
    assert all(frame.norms.x is None and frame.norms.x0 is not None for frame in frames)


def test_an_edited_prediction_is_no_output_to_compare(tiny: Model) -> None:
    def edited(made: Recorder, step: Step) -> None:
        made.see(replace(step, predictions=[step.prediction.with_x0(step.x0.clamp(-1, 1))]))

    frames, _ = filmed(tiny, see=edited)
    assert all(frame.guided and frame.guided.moved is None and frame.guided.added for frame in frames)


def test_the_same_latents_have_the_same_digest(tiny: Model) -> None:
    one, other = filmed(tiny)[0], filmed(tiny, rescale=0.5)[0]
    assert [frame.digest for frame in one] == [frame.digest for frame in filmed(tiny)[0]]
    assert not {frame.digest for frame in one} & {frame.digest for frame in other}


def test_a_gpus_memory_is_the_most_of_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[str]()

    def most(device: torch.device) -> int:
        asked.append("most")
        return 7

    monkeypatch.setattr(torch.cuda, "max_memory_allocated", most)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: asked.append("reset"))
    assert recorder._memory(torch.device("cuda")) == 7
    assert asked == ["most", "reset"]


# --- heat


def words(model: Model) -> dict[str, list[int]]:
    spans = {word: (PROMPT.index(word), PROMPT.index(word) + len(word)) for word in ("red", "castle")}
    return {word: token_positions(model, PROMPT, *span) for word, span in spans.items()}


@pytest.mark.parametrize("batched", [True, False])
def test_heat_is_the_prompts_attention_averaged_over_heads_and_layers(tiny: Model, batched: bool) -> None:
    """Against the probabilities written out, of a UNet called with the prompt alone."""
    heat = Heat(words(tiny), images=2)
    seen = list[dict[str, Tensor]]()

    def see(made: Recorder, step: Step) -> None:
        seen.append(heat.taken((8, 8), guided=True))
        if step.index == 0:
            inside.append((step.before, step.sigma, step.timestep))

    inside = list[tuple[Tensor, float, float]]()
    filmed(tiny, heat=heat, see=see, batched=batched)
    maps = list[Tensor]()

    def written_out(place: Any, q: Tensor, k: Tensor, v: Tensor, attend: Callable[..., Tensor]) -> Tensor:
        scores = torch.einsum("bmhd,bnhd->bhmn", q, k) / math.sqrt(q.shape[-1])
        side = math.isqrt(q.shape[1])
        maps.append(scores.softmax(-1).mean(1)[0, :, words(tiny)["castle"]].sum(-1).view(side, side))
        return attend(q, k, v)

    with attending(tiny.unet, written_out, lambda place: place.cross):
        tiny.denoiser(*inside[0], encode_text(tiny, PROMPT))
    assert torch.allclose(seen[0]["castle"], torch.stack(maps).mean(0), atol=1e-6)
    assert list(seen[0]) == ["red", "castle"]


def test_heat_is_that_of_the_steps_first_prediction(tiny: Model) -> None:
    """Heun asks twice a step."""
    cond, schedule = encode_text(tiny, PROMPT), tiny.schedule(2, "euler")
    heat, seen = Heat(words(tiny)), list[Tensor]()
    denoiser = classifier_free(tiny.denoiser, cond, encode_text(tiny, ""), 3.0)
    with attending(tiny.unet, heat.edit, lambda place: place.cross):
        run = steps(denoiser, noise(tiny, schedule, seeds=[1]), schedule, Heun())
        step = next(run)
        assert len(step.predictions) == 2
        seen.append(heat.taken((8, 8), guided=True)["castle"])
        denoiser(step.before, step.sigma, step.timestep)
        seen.append(heat.taken((8, 8), guided=True)["castle"])
    assert torch.equal(*seen)


def test_heat_on_film_changes_nothing(tiny: Model) -> None:
    plain, heated = filmed(tiny)[0], filmed(tiny, heat=Heat(words(tiny), images=2))[0]
    assert [frame.digest for frame in plain] == [frame.digest for frame in heated]
    assert [list(frame.heat) for frame in heated] == [["red", "castle"]] * 4
    assert not any(frame.heat for frame in plain)
    brightest = max(pixels(frame.heat["red"]).max() for frame in heated)
    assert brightest > 200, "the most of a stage is the end of the scale"


def test_nothing_attended_is_no_heat() -> None:
    assert Heat({"red": [1]}).taken((8, 8), guided=False) == {}


def test_an_adapters_picture_is_not_taken_for_the_prompt() -> None:
    from unrolled.kernels.attending import Place

    heat, place = Heat({"red": [1]}), Place("one", True)
    q, prompt, picture = torch.rand(1, 16, 2, 4), torch.rand(1, 7, 2, 4), torch.rand(1, 3, 2, 4)
    heat.edit(place, q, prompt, prompt, lambda q, k, v: q)
    alone = heat.taken((4, 4), guided=False)["red"]
    for keys in (torch.rand(1, 7, 2, 4), picture, prompt, picture):  # without the prompt, and with it
        heat.edit(place, q, keys, keys, lambda q, k, v: q)
    assert torch.equal(heat.taken((4, 4), guided=True)["red"], alone)


def test_odd_sizes_are_halved_as_the_unet_does() -> None:
    from unrolled.kernels.attending import Place

    heat, key = Heat({"red": [0]}), torch.rand(1, 7, 2, 4)
    heat.edit(Place("fine", True), torch.rand(1, 5 * 9, 2, 4), key, key, lambda q, k, v: q)
    heat.edit(Place("coarse", True), torch.rand(1, 3 * 5, 2, 4), key, key, lambda q, k, v: q)
    assert heat.taken((10, 18), guided=False)["red"].shape == (5, 9)


def test_coarse_layers_count_as_much_as_fine_ones() -> None:
    from unrolled.kernels.attending import Place

    heat, key = Heat({"red": [0]}), torch.zeros(1, 2, 1, 1)
    key[0, 0] = 1.0
    for name, side, score in (("fine", 4, 0.0), ("coarse", 2, 100.0)):  # half of the attention, and all of it
        heat.edit(Place(name, True), torch.full((1, side * side, 1, 1), score), key, key, lambda q, k, v: q)
    assert torch.allclose(heat.taken((4, 4), guided=False)["red"], torch.full((4, 4), 0.75))


# --- colours


def test_a_decoder_that_is_linear_is_found() -> None:
    torch.manual_seed(0)
    z, linear = torch.randn(4, 16, 16), torch.tensor([[0.1, 0, 0.05], [0, 0.1, 0], [0.02, 0, 0.1], [0, 0.05, 0], [0.5] * 3])
    picture = coloured(z, linear.double())
    found = fitted(z, picture.resize((128, 128), Image.Resampling.NEAREST))
    assert (found - linear).abs().max() < 0.01


def test_heat_gets_brighter_all_the_way() -> None:
    grey = np.asarray(glow(torch.linspace(0, 1, 50)[None]).convert("L")).astype(int)[0]
    assert (np.diff(grey) >= 0).all()
    assert (grey[0], grey[-1]) == (0, 244)


def test_pictures_are_made_small_and_the_original_is_left() -> None:
    large = Image.new("RGB", (600, 300))
    assert (small(large).size, large.size) == ((256, 128), (600, 300))
    assert coloured(torch.randn(4, 200, 100), torch.rand(5, 3).double()).size == (64, 128)
