"""Prompt weights in the syntax of AUTOMATIC1111's web UI, and what they do to a context.

Its rules, from ``modules/prompt_parser.py`` and ``modules/sd_emphasis.py`` ("Original") of its source, written anew.
"""

from __future__ import annotations

import math
import re
import warnings
from itertools import groupby

from torch import Tensor

from ..core.errors import BadInput, Note

Letter = tuple[int, float]
"""A character of a prompt that is text: its place, and its weight."""

_MARK = re.compile(r"\\[\\()\[\]]|:\s*(?P<weight>[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+))\s*\)|.", re.DOTALL)
_BREAK = re.compile(r"\bBREAK\b")


def parse_weights(prompt: str) -> list[tuple[str, float]]:
    r"""A prompt's text in pieces of one weight each.

    ``(word)`` is 1.1, ``[word]`` 1 / 1.1, ``(word:1.3)`` 1.3; what is nested multiplies. After a backslash a bracket or
    backslash is text; a backslash before anything else is left out. A bracket that is never closed goes to the end, one
    that was never opened is text, and so is ``:1.3`` that ends no round bracket or is no number.

    Raises:
        BadInput: a weight is not finite.
    """
    pieces = groupby(weighted_letters(prompt), key=lambda letter: letter[1])
    return [("".join(prompt[place] for place, _ in letters), weight) for weight, letters in pieces]


def weighted_letters(prompt: str) -> list[Letter]:
    """What of a prompt is text, by character; raises as :func:`parse_weights`."""
    places, weights = list[int](), list[float]()
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def close(bracket: str, factor: float) -> None:
        start = opened[bracket].pop()
        weights[start:] = [weight * factor for weight in weights[start:]]

    for found in _MARK.finditer(prompt):
        mark, number = found[0], found["weight"]
        if mark in opened:
            opened[mark].append(len(weights))
        elif number is not None and opened["("]:
            close("(", float(number))
        elif mark == ")" and opened["("]:
            close("(", 1.1)
        elif mark == "]" and opened["["]:
            close("[", 1 / 1.1)
        else:  # of a backslash alone nothing is left
            text = range(found.start() + mark.startswith("\\"), found.end())
            places += text
            weights += [1.0] * len(text)
    for bracket, factor in (("(", 1.1), ("[", 1 / 1.1)):
        while opened[bracket]:
            close(bracket, factor)
    for place, weight in zip(places, weights, strict=True):
        if not math.isfinite(weight):
            raise BadInput(f"The weight of {prompt[place : place + 20]!r} is {weight}: give a finite one, such as 1.3.")
    return list(zip(places, weights, strict=True))


def sections(prompt: str) -> list[list[Letter]]:
    """The same, cut at each ``BREAK``, which is left out; raises as :func:`parse_weights`."""
    letters = weighted_letters(prompt)
    text = "".join(prompt[place] for place, _ in letters)
    edges = [0, *(edge for found in _BREAK.finditer(text) for edge in found.span()), len(text)]
    return [letters[start:stop] for start, stop in zip(edges[::2], edges[1::2], strict=True)]


def emphasised(context: Tensor, weights: Tensor) -> Tensor:
    """A context with its tokens multiplied by their weights, and then all of them by one number that restores its mean.

    Where the tokens' own means cancel, as SDXL's can, that number is far from 1 or negative and ruins pictures (the web UI's
    issue 14867). So if the mean changes by more than any weight and more than a factor of two, or is but rounding error, the
    context is left as multiplied ("No norm" there).

    Args:
        context: of shape (prompts, tokens, width); each prompt has its own mean, in the web UI a batch has one.
        weights: of shape (prompts, tokens).

    Raises:
        BadInput: a weight is more than the context's type holds.

    Warns:
        Note: a mean is not restored.
    """
    wide = context.double()
    scaled = wide * weights[..., None].to(wide)
    before, after = (states.mean(dim=(1, 2), keepdim=True) for states in (wide, scaled))
    change, least, most = after / before, *(bound[:, None, None] for bound in weights.to(wide).aminmax(dim=1))
    sound = (change > 0.0) & (change >= least.clamp(max=0.5)) & (change <= most.clamp(min=2.0))
    sound &= before.abs() > 1e-5 * wide.square().mean(dim=(1, 2), keepdim=True).sqrt()
    for old, new in zip(before[~sound].tolist(), after[~sound].tolist(), strict=True):
        moved = f"from {old:.3g} to {new:.3g}"
        warnings.warn(f"Weights change the mean of a prompt {moved}, too much to be restored.", Note, stacklevel=2)
    restored = (scaled / change.where(sound, 1.0)).to(context.dtype)
    if not restored.isfinite().all():
        given = f"{weights.abs().max():g}"
        raise BadInput(f"A weight of {given} is more than {context.dtype} can hold of a context: give weights such as 1.3.")
    return restored
