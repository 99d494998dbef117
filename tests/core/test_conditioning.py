import pytest
import torch
from unrolled.core.conditioning import Conditioning, stack
from unrolled.core.errors import BadInput


def conditioning(batch: int = 1, tokens: int = 3) -> Conditioning:
    return Conditioning(context=torch.rand(batch, tokens, 2), class_labels=torch.arange(batch))


def test_repr_and_length() -> None:
    assert repr(conditioning(2)) == "Conditioning(context=2x3x2, class_labels=2)"
    assert len(conditioning(2)) == 2
    assert len(Conditioning()) == 0


def test_expand_repeats_a_batch_of_one() -> None:
    one = conditioning()
    many = one.expand(3)
    assert many.context is not None
    assert one.context is not None
    assert all(torch.equal(row, one.context[0]) for row in many.context)
    assert len(many) == 3
    assert repr(conditioning(3).expand(3)) == repr(many)


def test_expand_to_another_size_is_refused() -> None:
    with pytest.raises(BadInput, match=r"context=2x3x2.* cannot condition 3 images: its batch must be 1 or 3\."):
        conditioning(2).expand(3)


def test_to_casts_what_is_floating() -> None:
    half = conditioning().to("cpu", torch.float16)
    assert half.context is not None
    assert half.class_labels is not None
    assert (half.context.dtype, half.class_labels.dtype) == (torch.float16, torch.int64)


def test_stack_keeps_the_order() -> None:
    a, b = conditioning(1), conditioning(2)
    both = stack([a, b])
    for name in ("context", "class_labels"):
        assert torch.equal(getattr(both, name), torch.cat([getattr(a, name), getattr(b, name)]))


@pytest.mark.parametrize("other", [conditioning(tokens=4), Conditioning(context=torch.rand(1, 3, 2)), Conditioning()])
def test_what_cannot_be_one_batch(other: Conditioning) -> None:
    assert not conditioning().stackable(other)
    with pytest.raises(BadInput, match=r"These cannot be one batch: Conditioning\(context=1x3x2, class_labels=1\), Cond"):
        stack([conditioning(), other])
