"""The miniatures' own byte-pair vocabulary, in the two files of CLIP's tokenizer.

The order of the entries is CLIP's: 256 bytes, the same bytes ending a word, the merges, the two special
tokens.  The bytes make every prompt expressible; the merges make the world's words one token each.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

START: Final = "<|startoftext|>"
END: Final = "<|endoftext|>"
LENGTH: Final = 77

_WORDS: Final = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def _bytes() -> list[str]:
    """The 256 printable stand-ins for bytes, in GPT-2's and CLIP's order: the printable ones come first."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]


def _merges(texts: Iterable[str], count: int) -> list[tuple[str, str]]:
    """The most frequent merges of the texts, learned with CLIP's way of cutting them into words."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    trainer = trainers.BpeTrainer(vocab_size=512 + count, end_of_word_suffix="</w>", show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    learned = json.loads(tokenizer.to_str())["model"]["merges"]
    return [(left, right) for left, right in learned][:count]


def train_tokenizer(texts: Iterable[str], folder: Path, merges: int = 1534) -> None:
    """Learn the merges and write a tokenizer folder of the classic form (`vocab.json`, `merges.txt`)."""
    learned = _merges(texts, merges)
    alphabet = _bytes()
    entries = [*alphabet, *(f"{byte}</w>" for byte in alphabet), *(left + right for left, right in learned), START, END]
    vocabulary = {entry: index for index, entry in enumerate(dict.fromkeys(entries))}
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    config = {
        "tokenizer_class": "CLIPTokenizer", "model_max_length": LENGTH, "do_lower_case": True,
        "add_prefix_space": False, "errors": "replace", **special,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    lines = "\n".join(f"{left} {right}" for left, right in learned)
    (folder / "merges.txt").write_text(f"#version: 0.2\n{lines}\n", "utf-8")
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), "utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n", "utf-8")


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    """The tokenizer as everybody else will load it."""
    tokenizer: CLIPTokenizer = CLIPTokenizer.from_pretrained(folder)
    return tokenizer
