"""The words of a prompt."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from ...core.errors import BadInput


def require_words(words: Sequence[str], prompts: Iterable[str]) -> None:
    """Raise BadInput, naming the prompts' words, unless each stands in one of them."""
    prompts = list(prompts)
    for word in words:
        if not any(spans(prompt, word) for prompt in prompts):
            known = dict.fromkeys(found for prompt in prompts for found in re.findall(r"\w+", prompt))
            there = f"the words there are {', '.join(known)}" if known else "there is no prompt"
            raise BadInput(f"{word!r} stands in no prompt of this chain: {there}.")


def spans(prompt: str, word: str) -> list[tuple[int, int]]:
    """Where a word, or several in a row, stands in a prompt: from which character to which, in any case of letters."""
    found = re.finditer(rf"(?<!\w){re.escape(word)}(?!\w)", prompt, re.IGNORECASE) if word else ()
    return [match.span() for match in found]
