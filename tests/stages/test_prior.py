"""Kandinsky's prior: prompts and pictures to image embeddings."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessorPil
from unrolled.core.conditioning import Conditioning
from unrolled.core.errors import BadInput, BadModel
from unrolled.core.loading import Model, Prior
from unrolled.core.loop import Step
from unrolled.stages.noise import noise
from unrolled.stages.prior import blend, embed_image, sample_prior, zero_image_embeds

SHORT: dict[str, Any] = {"steps": 3}


def embeds(conditioning: Conditioning) -> Tensor:
    assert conditioning.names() == {"image_embeds"}
    assert conditioning.image_embeds is not None
    return conditioning.image_embeds


def of(values: list[list[float]]) -> Conditioning:
    return Conditioning(image_embeds=torch.tensor(values))


def test_one_embedding_per_seed(tiny_prior: Prior) -> None:
    two = embeds(sample_prior(tiny_prior, "a castle", seeds=[1, 2], **SHORT))
    assert two.shape == (2, 32)
    assert two.dtype == torch.float32
    assert not torch.allclose(two[0], two[1], atol=0.1)


def test_an_embedding_depends_on_its_own_seed_and_prompt_alone(tiny_prior: Prior) -> None:
    batch = embeds(sample_prior(tiny_prior, ["a castle", "two cats"], seeds=[1, 2], **SHORT))
    alone = embeds(sample_prior(tiny_prior, "two cats", seeds=[2], **SHORT))
    torch.testing.assert_close(batch[1:], alone)
    assert not torch.allclose(
        embeds(sample_prior(tiny_prior, "two cats", seeds=[2], stream="other", **SHORT)), alone, atol=0.1
    )


def test_a_negative_prompt_in_the_same_batch_or_by_itself(tiny_prior: Prior) -> None:
    both = embeds(sample_prior(tiny_prior, ["a castle", "blurred"], negative_prompt="blurred", seeds=[1, 1], **SHORT))
    for i, prompt in enumerate(["a castle", "blurred"]):
        alone = sample_prior(tiny_prior, prompt, negative_prompt="blurred", seeds=[1], **SHORT)
        torch.testing.assert_close(both[i : i + 1], embeds(alone))
    assert not torch.allclose(both[:1], embeds(sample_prior(tiny_prior, "a castle", seeds=[1], **SHORT)), atol=1e-3)


def test_negative_prompts_of_their_own(tiny_prior: Prior) -> None:
    pair = sample_prior(tiny_prior, "a castle", negative_prompt=["blurred", "a house"], seeds=[1, 2], **SHORT)
    alone = sample_prior(tiny_prior, "a castle", negative_prompt="a house", seeds=[2], **SHORT)
    torch.testing.assert_close(embeds(pair)[1:], embeds(alone))


def test_the_decoder_does_not_start_from_the_priors_noise(tiny_prior: Prior, tiny_kandinsky: Model) -> None:
    """Drawn from one stream, the numbers of the one would be the first of the other."""
    seen = list[Step]()
    sample_prior(tiny_prior, "a castle", seeds=[1], hooks=[seen.append], **SHORT)
    assert [step.index for step in seen] == [0, 1, 2]
    mine = (seen[0].before / seen[0].before.std()).flatten()
    schedule = tiny_kandinsky.schedule(3)
    theirs = noise(tiny_kandinsky, schedule, seeds=[1]).x.flatten()[: len(mine)]
    assert abs(float(torch.corrcoef(torch.stack([mine, theirs]))[0, 1])) < 0.5


def test_a_hook_may_edit_the_run(tiny_prior: Prior) -> None:
    def halved(step: Step) -> None:
        step.x = step.x / 2

    plain, edited = (embeds(sample_prior(tiny_prior, "a castle", hooks=h, **SHORT)) for h in ([], [halved]))
    assert not torch.allclose(plain, edited, atol=0.1)


def test_the_embedding_is_taken_back_to_clips_coordinates(tiny_prior: Prior) -> None:
    last = list[Step]()
    found = embeds(sample_prior(tiny_prior, "a castle", hooks=[last.append], **SHORT))
    torch.testing.assert_close(found, last[-1].x.flatten(1) * tiny_prior.prior.clip_std + tiny_prior.prior.clip_mean)


def test_in_half_precision(tiny_prior: Prior) -> None:
    half = replace(
        tiny_prior,
        dtype=torch.bfloat16,
        **{name: _in_bfloat16(getattr(tiny_prior, name)) for name in ("prior", "text_encoder", "image_encoder")},
    )
    for found, exact in [
        (sample_prior(half, "a castle", **SHORT), sample_prior(tiny_prior, "a castle", **SHORT)),
        (zero_image_embeds(half), zero_image_embeds(tiny_prior)),
    ]:
        assert embeds(found).dtype == torch.float32
        torch.testing.assert_close(embeds(found), embeds(exact), atol=0.1, rtol=0.1)


def test_prompts_that_do_not_match_the_seeds(tiny_prior: Prior) -> None:
    with pytest.raises(BadInput, match=r"^2 prompts were given with 3 seeds: give one prompt for all, or one per seed\.$"):
        sample_prior(tiny_prior, ["a", "b"], seeds=[1, 2, 3])
    with pytest.raises(BadInput, match="2 prompts were given with 1 seeds"):
        sample_prior(tiny_prior, "a", negative_prompt=["b", "c"])
    with pytest.raises(BadInput, match="Text encoding needs at least one prompt"):
        sample_prior(tiny_prior, [])
    with pytest.raises(BadInput, match="Steps go from 1 to 1000"):
        sample_prior(tiny_prior, "a", steps=0)


def test_pictures_of_any_size(tiny_prior: Prior, picture: Image.Image) -> None:
    several = [picture, picture.resize((150, 90)), picture.convert("L")]
    found = embeds(embed_image(tiny_prior, several))
    processor = CLIPImageProcessorPil(**dict(tiny_prior.image_processor))
    theirs = tiny_prior.image_encoder(processor(several, return_tensors="pt").pixel_values).image_embeds
    torch.testing.assert_close(found, theirs)
    torch.testing.assert_close(embeds(embed_image(tiny_prior, picture)), found[:1])


def test_no_picture(tiny_prior: Prior) -> None:
    with pytest.raises(BadInput, match=r"^An image embedding needs at least one picture\.$"):
        embed_image(tiny_prior, [])


@pytest.mark.parametrize("options", [{"size": "large"}, {"image_mean": [0.5]}])
def test_a_processor_that_cannot_be_followed(tiny_prior: Prior, picture: Image.Image, options: dict[str, object]) -> None:
    broken = replace(tiny_prior, image_processor={**tiny_prior.image_processor, **options})
    with pytest.raises(BadModel, match=r"^The preprocessor_config\.json of .* cannot be followed \("):
        embed_image(broken, picture)


def test_nothing_for_several(tiny_prior: Prior) -> None:
    three = embeds(zero_image_embeds(tiny_prior, 3))
    assert three.shape == (3, 32)
    torch.testing.assert_close(three, embeds(zero_image_embeds(tiny_prior)).expand(3, -1))


def test_a_blend_is_a_weighted_sum() -> None:
    found = blend([of([[1.0, 2.0], [3.0, 4.0]]), of([[10.0, 20.0]])], [0.5, 0.25])
    assert embeds(found).tolist() == [[3.0, 6.0], [4.0, 7.0]]


@pytest.mark.parametrize("weights", [[], [1.0, 2.0]])
def test_a_weight_each(weights: list[float]) -> None:
    with pytest.raises(BadInput, match=rf"^A blend needs one weight per embedding, got 1 and {len(weights)}\.$"):
        blend([of([[1.0]])], weights)
    with pytest.raises(BadInput, match="got 0 and 0"):
        blend([], [])


@pytest.mark.parametrize(
    "other",
    [
        Conditioning(pooled=torch.zeros(1, 2)),
        Conditioning(image_embeds=torch.zeros(1, 2), pooled=torch.zeros(1, 2)),
        of([[1.0, 2.0, 3.0]]),
        of([[1.0, 2.0]] * 3),
    ],
)
def test_what_cannot_be_blended(other: Conditioning) -> None:
    with pytest.raises(BadInput, match=r"^These cannot be blended: Conditioning\(image_embeds=2x2\), .* one for all\.$"):
        blend([of([[1.0, 2.0]] * 2), other], [0.5, 0.5])


def _in_bfloat16(network: Any) -> Any:
    import copy

    return copy.deepcopy(network).to(torch.bfloat16)
