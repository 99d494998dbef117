"""ControlNets beside a UNet: when they act, what they are given, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image
from unrolled.core.conditioning import Conditioning
from unrolled.core.control import Control, between, controlled, require_control_fits
from unrolled.core.denoiser import ConditionalDenoiser, UNetDenoiser, UpscalerDenoiser
from unrolled.core.errors import BadInput
from unrolled.core.guidance import classifier_free
from unrolled.core.loading import Model
from unrolled.core.prediction import Prediction
from unrolled.core.schedule import Schedule
from unrolled.stages.control import with_control
from unrolled.stages.text import encode_text


class Constant(torch.nn.Module):
    """A ControlNet that says the same of everything, and remembers what it was asked."""

    def __init__(self, like: Any, value: float = 1.0) -> None:
        super().__init__()
        self.config, self.value, self.asked = like.config, value, list[dict[str, Any]]()
        with torch.no_grad():
            blank = torch.zeros(1, 3, 64, 64), torch.zeros(1, 4, 8, 8), torch.zeros(1, 77, 32)
            self.like = like(blank[1], 1, blank[2], blank[0], return_dict=False)

    def forward(self, scaled: Any, timestep: Any, *, conditioning_scale: float, **given: Any) -> Any:
        self.asked.append({"scaled": scaled, "timestep": float(timestep), "scale": conditioning_scale, **given})
        down, mid = self.like
        by = self.value * conditioning_scale
        return [torch.full_like(d, by).expand(len(scaled), *d.shape[1:]) for d in down], torch.full_like(mid, by)


@pytest.fixture(scope="session")
def network(tiny: Model) -> Any:
    from diffusers import ControlNetModel

    return ControlNetModel.from_unet(tiny.unet)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def cond(tiny: Model, picture: Image.Image) -> Conditioning:
    return with_control(tiny, encode_text(tiny, "a castle"), [picture, picture])


def test_the_residuals_of_several_add_up(tiny: Model, network: Any, cond: Conditioning, x: torch.Tensor) -> None:
    def asked(*controls: Control, cond: Conditioning = cond) -> torch.Tensor:
        return controlled(tiny.denoiser, controls)(x, 2.0, 300.0, cond).out

    one = replace(cond, control=None if cond.control is None else cond.control[:, :1])
    sum_of_two = asked(Control(Constant(network, 0.5), 0.4), Control(Constant(network, 2.0), 0.3))
    torch.testing.assert_close(sum_of_two, asked(Control(Constant(network), 0.8), cond=one))
    assert not torch.allclose(sum_of_two, tiny.denoiser(x, 2.0, 300.0, replace(cond, control=None)).out, atol=0.01)


def test_what_a_network_is_given(tiny: Model, network: Any, cond: Conditioning, x: torch.Tensor) -> None:
    first, second = Constant(network), Constant(network)
    steered = controlled(tiny.denoiser, [Control(first, 0.5), Control(second, lambda sigma: sigma)])
    assert cond.control is not None
    pictures = torch.stack([cond.control[0], 1 - cond.control[0]])
    steered(x, 3.0, 300.0, replace(cond, control=pictures))
    (given,), (other,) = first.asked, second.asked
    torch.testing.assert_close(given["scaled"], x / 10**0.5)
    assert (given["timestep"], given["scale"], other["scale"]) == (300.0, 0.5, 3.0)
    torch.testing.assert_close(given["controlnet_cond"], pictures[:, 0])
    torch.testing.assert_close(other["controlnet_cond"], pictures[:, 1])
    assert given["encoder_hidden_states"].shape == (2, 77, 32)


@pytest.mark.parametrize("batched", [True, False])
def test_only_the_conditional_pass_is_controlled_if_only_it_has_pictures(
    batched: bool, tiny: Model, network: Any, cond: Conditioning, x: torch.Tensor
) -> None:
    net = Constant(network)
    uncond = encode_text(tiny, "")
    both = [Control(net), Control(net, 0.0)]
    out = classifier_free(controlled(tiny.denoiser, both), cond, uncond, 5.0, batched=batched)(x, 2.0, 300.0)
    assert [len(given["scaled"]) for given in net.asked] == [2]
    torch.testing.assert_close(out.uncond, tiny.denoiser(x, 2.0, 300.0, uncond).out)


def test_guidance_hands_both_halves_their_picture(tiny: Model, network: Any, cond: Conditioning, x: torch.Tensor) -> None:
    net = Constant(network)
    assert cond.control is not None
    uncond = replace(encode_text(tiny, ""), control=cond.control / 2)
    classifier_free(controlled(tiny.denoiser, [Control(net), Control(net, 0.0)]), cond, uncond, 5.0)(x, 2.0, 300.0)
    (given,) = net.asked
    expected = torch.cat([cond.control[:, 0] / 2] * 2 + [cond.control[:, 0]] * 2)
    torch.testing.assert_close(given["controlnet_cond"], expected)


def test_a_network_at_scale_zero_is_not_called(tiny: Model, network: Any, cond: Conditioning, x: torch.Tensor) -> None:
    net = Constant(network)
    out = controlled(tiny.denoiser, [Control(net, 0.0), Control(net, lambda sigma: 0.0)])(x, 2.0, 300.0, cond)
    assert not net.asked
    torch.testing.assert_close(out.out, tiny.denoiser(x, 2.0, 300.0, replace(cond, control=None)).out)


def test_without_controls_the_network_is_itself(tiny: Model) -> None:
    denoiser = tiny.denoiser
    assert controlled(denoiser, []) is denoiser


@pytest.mark.parametrize(
    ("part", "acts"),
    [((0.0, 1.0), [1, 1, 1, 1, 1]), ((0.5, 1.0), [0, 0, 0, 1, 1]), ((0.0, 0.5), [1, 1, 0, 0, 0]), ((0.3, 0.39), [0] * 5)],
)
def test_between_fractions_of_the_steps(part: tuple[float, float], acts: list[int], tiny: Model) -> None:
    """Step i of n acts if i / n >= start and (i + 1) / n <= end."""
    schedule = tiny.schedule(5, "euler")
    control = Control(None, between(schedule, 0.7, *part))
    assert [control.at(sigma) for sigma in schedule.sigmas[:-1]] == [0.7 * act for act in acts]


@pytest.mark.parametrize("part", [(0.5, 0.5), (0.7, 0.2), (-0.1, 1.0), (0.0, 1.1)])
def test_fractions_that_make_no_sense(part: tuple[float, float]) -> None:
    with pytest.raises(BadInput, match=r"acts from a fraction of the steps to a later one, 0 to 1, got"):
        between(Schedule.at((2.0, 1.0, 0.0), (0.1, 1.0, 2.0)), 1.0, *part)


def test_too_few_pictures(tiny: Model, network: Any, cond: Conditioning, x: torch.Tensor) -> None:
    steered = controlled(tiny.denoiser, [Control(Constant(network))])
    with pytest.raises(BadInput, match=r"2 images under 1 ControlNets were given control pictures for 1 under 2: with_con"):
        steered(x, 2.0, 300.0, cond)


def test_pictures_of_another_size(tiny: Model, network: Any, cond: Conditioning, x: torch.Tensor) -> None:
    steered = controlled(tiny.denoiser, [Control(Constant(network))] * 2)
    with pytest.raises(BadInput, match=r"control pictures are 64x64 where 48x64 is painted: they must be of one size"):
        steered(x[..., :6], 2.0, 300.0, cond)


def test_a_network_that_is_no_plain_unet(tiny: Model, network: Any) -> None:
    def other(*_: Any) -> Prediction:
        raise AssertionError

    those: list[tuple[ConditionalDenoiser, str]] = [(UpscalerDenoiser(tiny.unet), "UpscalerDenoiser"), (other, "function")]
    for denoiser, name in those:
        with pytest.raises(BadInput, match=rf"UNets of Stable Diffusion and SDXL, not a {name}\."):
            controlled(denoiser, [Control(Constant(network))])


def test_a_controlnet_for_another_unet(network: Any, tiny_sdxl: Model) -> None:
    with pytest.raises(BadInput, match=r"made for a UNet whose cross_attention_dim is 32, and this one's is 80: take"):
        controlled(UNetDenoiser(tiny_sdxl.unet), [Control(network)])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"global_pool_conditions": True}, r"shuffle pools its picture \(global_pool_conditions\), which is for guess mode"),
        ({"conditioning_channels": 4}, r"shuffle takes pictures of 4 channels, and only those that take 3 are run"),
        ({"block_out_channels": [32, 48]}, r"whose block_out_channels is \[32, 48\], and this one's is \[32, 64\]"),
    ],
)
def test_configs_that_are_refused(more: dict[str, Any], message: str, network: Any, tiny: Model) -> None:
    with pytest.raises(BadInput, match=message):
        require_control_fits({**network.config, **more}, tiny.unet.config, "shuffle")


def test_an_uncontrolled_network_takes_no_pictures(tiny: Model, cond: Conditioning, x: torch.Tensor) -> None:
    with pytest.raises(BadInput, match=r"conditioned by context, it cannot take control\."):
        tiny.denoiser(x, 2.0, 300.0, cond)


# --- with_control


def test_pictures_by_image_and_network(tiny: Model, picture: Image.Image) -> None:
    turned = picture.rotate(90)
    many = with_control(tiny, encode_text(tiny, "a castle"), [picture, [picture, turned]])
    assert repr(many) == "Conditioning(context=2x77x32, control=2x2x3x64x64)"
    assert many.control is not None
    assert torch.equal(many.control[0, 0], many.control[1, 0])
    assert torch.equal(many.control[0, 1], many.control[0, 0])
    assert torch.equal(many.control[1, 1], many.control[0, 0].rot90(1, (1, 2)))
    red, green, blue = many.control[0, 0, :, 25, 15] * 255
    assert picture.getpixel((15, 25)) == (round(float(red)), round(float(green)), round(float(blue)))


@pytest.mark.parametrize(
    ("pictures", "message"),
    [
        (lambda p: [], r"a picture for each ControlNet, or one for each image"),
        (lambda p: [p, []], r"a picture for each ControlNet, or one for each image"),
        (lambda p: [[p, p], [p, p, p]], r"given for 2, 3 images: give each ControlNet one for all, or one per image"),
        (lambda p: [p.resize((60, 64))], r"The control picture is 60x64, but sides must be multiples of 8"),
        (lambda p: [p, p.resize((32, 64))], r"must be of one size, got 64x64, 32x64"),
    ],
)
def test_pictures_that_do_not_go_together(
    pictures: Callable[[Image.Image], Any], message: str, tiny: Model, picture: Image.Image
) -> None:
    with pytest.raises(BadInput, match=message):
        with_control(tiny, encode_text(tiny, "a castle"), pictures(picture))


def test_more_pictures_than_prompts_fit(tiny: Model, picture: Image.Image) -> None:
    with pytest.raises(BadInput, match=r"control=3x1x3x64x64\) cannot condition 3 images"):
        with_control(tiny, encode_text(tiny, ["a castle", "a boat"]), [[picture] * 3])


def test_models_that_take_no_control(tiny_kandinsky: Model, tiny_x4: Model, picture: Image.Image) -> None:
    for model in (tiny_kandinsky, tiny_x4):
        with pytest.raises(BadInput, match=r"ControlNets steer the UNets of Stable Diffusion and SDXL, and .* is neither\."):
            with_control(model, Conditioning(context=torch.zeros(1, 77, 32)), [picture])
