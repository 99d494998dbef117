"""A prompt's tokens, and the chunks that they are encoded in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from ..core.textual_inversion import pieces
from .weights import Letter, sections

Encoder = tuple[Any, Any]
"""A tokenizer and the text encoder it is for."""


class Token(NamedTuple):
    """One token of a prompt, or one vector of a learned word.

    Args:
        text: what it stands for; of a learned word, the word.
        start: the first of the prompt's characters that it is of; ``stop``, the one after the last.
        ends_word: whether the next one belongs to another word.
    """

    id: int
    text: str
    start: int
    stop: int
    weight: float
    ends_word: bool


def length(encoder: Encoder) -> int:
    """How many tokens an encoder takes at a time: 77, of which two are the start and the end."""
    # A tokenizer without a tokenizer_config.json believes that there is no limit.
    return int(min(encoder[0].model_max_length, encoder[1].config.max_position_embeddings))


class Layout(NamedTuple):
    """A prompt's tokens in the chunks that are encoded, and those that are not, with the text they are of."""

    chunks: list[list[Token]]
    lost: list[Token]
    dropped: str


def lay_out(encoder: Encoder, prompt: str, chunks: bool, weights: bool) -> Layout:
    """Put a prompt's tokens in chunks, or in one and drop the rest.

    Args:
        weights: read the prompt as AUTOMATIC1111's web UI does, also that ``BREAK`` begins a chunk.

    Raises:
        BadInput: a weight is not finite.
    """
    room, plain = length(encoder) - 2, [(place, 1.0) for place in range(len(prompt))]
    parts = [list(_tokens(encoder, prompt, letters)) for letters in (sections(prompt) if weights else [plain])]
    if chunks:
        return Layout([chunk for part in parts for chunk in _cut(part, room)], [], "")
    lost = [*parts[0][room:], *(token for part in parts[1:] for token in part)]
    return Layout([parts[0][:room]], lost, prompt[lost[0].start :].strip() if lost else "")


def _cut(tokens: Sequence[Token], room: int) -> Iterator[list[Token]]:
    """Cut after a comma among the last 20, as the web UI does, else after a word, else where the chunk is full."""
    while len(tokens) > room:
        words = [i + 1 for i, token in enumerate(tokens[:room]) if token.ends_word]
        commas = [i for i in words if i > room - 20 and tokens[i - 1].text == ","]
        at = max(commas or words or [room])
        yield list(tokens[:at])
        tokens = tokens[at:]
    yield list(tokens)


def _tokens(encoder: Encoder, prompt: str, letters: Sequence[Letter]) -> Iterator[Token]:
    tokenizer, network = encoder
    for weight, group in groupby(letters, key=lambda letter: letter[1]):
        places = [place for place, _ in group]
        for piece, taught in pieces(network, "".join(prompt[place] for place in places)):
            here, places = places[: len(piece)], places[len(piece) :]
            if taught:
                yield from (Token(i, piece, here[0], here[-1] + 1, weight, i == taught[-1]) for i in taught)
                continue
            told = tokenizer(piece, add_special_tokens=False, truncation=False, verbose=False, return_offsets_mapping=True)
            names = tokenizer.convert_ids_to_tokens(told.input_ids)
            for i, name, (first, end) in zip(told.input_ids, names, told.offset_mapping, strict=True):
                yield Token(i, piece[first:end], here[first], here[end - 1] + 1, weight, name.endswith("</w>"))
