"""Textual inversion: words of one's own, with learned vectors in place of their tokens', known for a while.

(Gal et al., arXiv:2208.01618, sec. 4.) The tokenizer is left alone: a word's vectors have negative ids, which no token has.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import BadInput, BadModel
from .model import Model
from .weights import read_tensors

_ENCODERS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
"""The encoders of prompts, and what files for SDXL call what is for them."""


class Taught(nn.Module):
    """An encoder's token embedding, and the vectors of words that it was taught.

    Attributes:
        words: by word, its vectors of shape (count, width).
        ids: by word, their ids: -1, -2, …
    """

    def __init__(self, base: Any, words: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.base, self.words = base, dict(words)
        bounds = accumulate((len(vectors) for vectors in words.values()), initial=0)
        self.ids = {word: [-1 - i for i in range(*ends)] for word, ends in zip(words, pairwise(bounds), strict=True)}
        self.register_buffer("rows", torch.cat(list(words.values())))

    @property
    def weight(self) -> Any:
        """The tokens' own, for who asks its shape or type."""
        return self.base.weight

    def forward(self, ids: Tensor) -> Tensor:
        """Vectors of shape (…, width) for ids of either kind."""
        rows: Any = self.rows
        return torch.where((ids < 0)[..., None], rows[(-1 - ids).clamp(min=0)], self.base(ids.clamp(min=0)))


@contextmanager
def textual_inversion(model: Model, word: str, file: str | Path, *, allow_pickle: bool = False) -> Iterator[None]:
    """Have a model's text encoders know a word, for a ``with`` block; several blocks, several words.

    It is known to everybody who has these encoders, as models from one Shelf do; afterwards they are exactly what they were.

    Args:
        word: what stands in prompts, upper or lower case; a word within another is not meant.
        file: as diffusers or AUTOMATIC1111's web UI write it, of one or several vectors; for SDXL of both encoders.
        allow_pickle: read ``.pt`` and ``.bin`` too, tensors only.

    Raises:
        BadInput: the word is empty or taught already, or the model takes no text; BadModel: the file is missing, damaged,
            a pickle that is not allowed, no textual inversion, or one for other encoders.
    """
    encoders = {part: encoder for part in _ENCODERS if (encoder := getattr(model, part, None)) is not None}
    if not encoders:
        raise BadInput(f"{model.name} takes no text, so it can be taught no word: Kandinsky's prompts go through its prior.")
    if not word.strip():
        raise BadInput(f"The word for {file} is empty: give what stands for it in the prompt.")
    widths = {part: encoder.config.hidden_size for part, encoder in encoders.items()}
    vectors = read_vectors(Path(file), widths, model.name, allow_pickle)
    with ExitStack() as stack:
        for part, encoder in encoders.items():
            before = encoder.get_input_embeddings()
            base, words = (before.base, before.words) if isinstance(before, Taught) else (before, {})
            if _key(word) in words:
                raise BadInput(f"{word!r} stands for another file already: give {file} another word.")
            device = model.device if base.weight.is_meta else base.weight.device
            taught = {**words, _key(word): vectors[part]}
            encoder.set_input_embeddings(
                Taught(base, {name: rows.to(device, base.weight.dtype) for name, rows in taught.items()})
            )
            stack.callback(encoder.set_input_embeddings, before)
        yield


def read_vectors(file: Path, widths: Mapping[str, int], name: str, allow_pickle: bool = False) -> dict[str, Tensor]:
    """A file's vectors for each text encoder, of shape (count, width).

    Args:
        widths: of the encoders' embeddings.
        name: the model's, for errors.

    Raises:
        BadModel: it is missing, damaged, a pickle that is not allowed, no textual inversion, or one for other encoders.
    """
    if not file.is_file():
        raise BadModel(f"There is no file {file}: give the path of a textual inversion.")
    held = read_tensors(file, allow_pickle)
    if len(held) == 1 and len(widths) == 1:
        found = dict(zip(widths, held.values(), strict=True))
    else:
        found = {part: held[key] for part, key in _ENCODERS.items() if key in held}
    if not found and len(held) > 1:
        raise BadModel(f"{file} is no textual inversion: it holds {len(held)} tensors, {next(iter(held))} to begin with.")
    vectors = {part: tensor[None] if tensor.ndim == 1 else tensor for part, tensor in found.items()}
    given = ", ".join(str(tensor.shape[-1]) for tensor in held.values() if tensor.ndim)
    for part, width in widths.items():
        if part not in vectors or vectors[part].ndim != 2 or not len(vectors[part]) or vectors[part].shape[1] != width:
            wanted = " and ".join(map(str, widths.values()))
            raise BadModel(f"{file} does not fit {name}: its vectors are {given} wide, and those of its prompts {wanted}.")
    return vectors


def pieces(encoder: Any, prompt: str) -> Iterator[tuple[str, Sequence[int]]]:
    """A prompt cut at the words that its encoder was taught: each piece, and the ids it stands for, none if it is text."""
    embedding = encoder.get_input_embeddings()
    if not isinstance(embedding, Taught):
        yield prompt, ()
        return
    longest_first = sorted(embedding.ids, key=len, reverse=True)
    for piece in re.split(f"({'|'.join(map(_pattern, longest_first))})", prompt, flags=re.IGNORECASE):
        yield piece, embedding.ids.get(_key(piece), ())


def says(prompt: str, word: str) -> bool:
    """Whether a prompt has a word."""
    return re.search(_pattern(word), prompt, flags=re.IGNORECASE) is not None


def _pattern(word: str) -> str:
    """Finds a word, which is no part of another unless marks such as <> set it off."""
    word = word.strip()
    edges = [r"\b" if re.match(r"\w", letter) else "" for letter in (word[0], word[-1])]
    return edges[0] + re.escape(word) + edges[1]


def _key(word: str) -> str:
    return word.strip().lower()
