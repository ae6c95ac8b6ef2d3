"""A CLIPTokenizer whose vocabulary is a short list of words: every word is one token."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from transformers import CLIPTokenizer


def word_tokenizer(words: Iterable[str], folder: Path, *, max_length: int) -> CLIPTokenizer:
    """Write vocab.json and merges.txt to `folder` and load them.

    Letters and their word-final forms stay in the vocabulary, so any lower-case text can be
    tokenised.
    """
    words = sorted(set(words))
    letters = [chr(c) for c in range(ord("!"), ord("~") + 1) if not chr(c).isupper()]
    vocab = letters + [f"{c}</w>" for c in letters]
    merges: list[tuple[str, str]] = []
    for word in words:
        parts = _merged([*word[:-1], f"{word[-1]}</w>"], merges)
        while len(parts) > 1:  # later merges rank behind earlier ones, so earlier words stay whole
            merges.append((parts[0], parts[1]))
            vocab.append(parts[0] + parts[1])
            parts[:2] = [parts[0] + parts[1]]
    vocab += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    ids = {token: i for i, token in enumerate(vocab)}
    (folder / "vocab.json").write_text(json.dumps(ids))
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    tokenizer = CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=max_length,
        pad_token="<|endoftext|>",
    )  # fmt: skip
    for word in words:
        if len(tokenizer(word).input_ids) != 3:
            raise ValueError(f"{word!r} is not one token: {tokenizer.tokenize(word)}")
    tokenizer.save_pretrained(folder)
    return tokenizer


def _merged(parts: list[str], merges: list[tuple[str, str]]) -> list[str]:
    """Byte-pair encoding: apply the merges in order of rank."""
    for a, b in merges:
        i = 0
        while i < len(parts) - 1:
            if (parts[i], parts[i + 1]) == (a, b):
                parts[i : i + 2] = [a + b]
            i += 1
    return parts
