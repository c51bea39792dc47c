"""Byte-level BPE on ASCII text, by remembered words: the tokenizer's own ids, several times faster.

Such a tokenizer cuts text at added tokens, then into words by a pattern, and merges each word on
its own; so the ids it once gave to a word hold for good. In ASCII text a character is a byte, and
each token's place follows from the widths of the tokens before it.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Mapping
from functools import lru_cache
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from verl_sft.data.sample import Int32Array

_MAX_WORDS = 200_000
_MAX_WORD_CHARS = 64
_MAX_PART_CHARS = 8192
_REMEMBERED_PARTS = 4096
_GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# ASCII members of the Unicode classes that such patterns name.
_CLASSES = {"L": "A-Za-z", "Lu": "A-Z", "Ll": "a-z", "N": "0-9", "Lt": "", "Lm": "", "Lo": "",
            "M": ""}  # fmt: skip
_ELEMENT = re.compile(
    r"\\p\{(\w+)\}|\[\^?|\]|\(\?(?:i:|:|!)|\\[rnsS]|\{\d(?:,\d?)?\}|[-a-z'/ |*+?)]"
)
_BYTE_CHARS = {n: chr(n) if 33 <= n <= 126 else chr(256 + min(n, 33)) for n in range(128)}


class _Words(dict[str, tuple[int, ...]]):
    """Word -> ids; asks the tokenizer's model for what it does not know."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self._model = model

    def __missing__(self, word: str) -> tuple[int, ...]:
        ids = tuple(token.id for token in self._model.tokenize(word.translate(_BYTE_CHARS)))
        if len(word) <= _MAX_WORD_CHARS:
            if len(self) >= _MAX_WORDS:
                self.clear()
            self[word] = ids
        return ids


class WordEncoder:
    """Ids and places of the tokens of ASCII texts; see `word_encoder`."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        pattern: re.Pattern[str],
        added: Mapping[str, int],
        added_pattern: re.Pattern[str],
    ) -> None:
        self._find = pattern.findall
        self._split = re.compile(f"({added_pattern.pattern})").split
        self._words = _Words(tokenizer.model)
        self._widths = np.zeros(
            tokenizer.get_vocab_size() + 1 + max(added.values(), default=0), int
        )
        for token, number in tokenizer.get_vocab(with_added_tokens=True).items():
            self._widths[number] = len(token)
        self._added = {token: array("i", [number]) for token, number in added.items()}
        self._remembered = lru_cache(maxsize=_REMEMBERED_PARTS)(self._part)

    def encode(
        self, text: str
    ) -> tuple[Int32Array, npt.NDArray[np.int64], npt.NDArray[np.int64]] | None:
        """Ids, and start and end of each token in characters (all [T]).

        None: the text is not ASCII, or the pattern leaves a part of it out.
        """
        if not text or not text.isascii():
            return None
        ids = array("i")
        for number, part in enumerate(self._split(text)):
            if number % 2:
                ids += self._added[part]
            elif part:
                ids += self._remembered(part) if len(part) <= _MAX_PART_CHARS else self._part(part)
        found = np.frombuffer(ids, dtype=np.int32)
        widths = self._widths[found]
        ends = widths.cumsum()
        return (found, ends - widths, ends) if ends[-1] == len(text) else None

    def _part(self, text: str) -> array[int]:
        return array("i", chain.from_iterable(map(self._words.__getitem__, self._find(text))))


def word_encoder(
    tokenizer: Tokenizer,
    *,
    backend: Mapping[str, Any],
    any_of: Callable[[Any], re.Pattern[str]],
) -> WordEncoder | None:
    """The fast way for a tokenizer (`backend` is its JSON), None where it is not known to hold."""
    pattern = _word_pattern(backend["pre_tokenizer"] or {})
    added = backend["added_tokens"]
    contents = {t["content"]: t["id"] for t in added}
    plain = (
        pattern is not None
        and _keeps_ascii(backend["normalizer"])
        and _is_plain_bpe(backend["model"])
        and not any(t["lstrip"] or t["rstrip"] or t["single_word"] for t in added)
        and len({t["normalized"] for t in added}) <= 1  # else some are looked for after others
        and "" not in contents
    )
    if pattern is None or not plain:
        return None
    return WordEncoder(tokenizer, pattern=pattern, added=contents, added_pattern=any_of(contents))


def _is_plain_bpe(model: Mapping[str, Any]) -> bool:
    odd = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    if model["type"] != "BPE" or any(model.get(key) for key in odd):
        return False
    return all(char in model["vocab"] for char in _BYTE_CHARS.values())


def _keeps_ascii(normalizer: Mapping[str, Any] | None) -> bool:
    if normalizer and normalizer["type"] == "Sequence":
        return all(map(_keeps_ascii, normalizer["normalizers"]))
    return normalizer is None or normalizer["type"] in ("NFC", "NFD", "NFKC", "NFKD")


def _word_pattern(pre_tokenizer: Mapping[str, Any]) -> re.Pattern[str] | None:
    """The pattern of words, if words are all that the pre-tokenizer makes."""
    steps = [pre_tokenizer]
    if pre_tokenizer.get("type") == "Sequence":
        steps = pre_tokenizer["pretokenizers"]
    *splits, last = steps
    if last.get("type") != "ByteLevel" or last["add_prefix_space"]:
        return None
    if not splits and last["use_regex"]:
        return _ascii_pattern(_GPT2_PATTERN)
    if len(splits) != 1 or last["use_regex"]:
        return None
    (split,) = splits
    if split["type"] != "Split" or split["behavior"] != "Isolated" or split["invert"]:
        return None
    return _ascii_pattern(split["pattern"].get("Regex", ""))


def _ascii_pattern(pattern: str) -> re.Pattern[str] | None:
    """The pattern for ASCII text, in Python's dialect; None if it holds anything unknown."""
    elements = list(_ELEMENT.finditer(pattern))
    if "".join(e.group() for e in elements) != pattern:
        return None
    parts, inside, counted = [], False, False
    for element in elements:
        part, name = element.group(), element.group(1)
        if counted and part == "+":  # dialects differ in what a doubled count means
            return None
        counted = not inside and (part in "*+?" or part[0] == "{")
        if part[0] == "[":
            if inside:
                return None
            inside = True
        elif part == "]":
            inside = False
        elif name is not None:
            if name not in _CLASSES:
                return None
            part = _CLASSES[name] if inside else f"[{_CLASSES[name]}]"
        parts.append(part)
    try:
        return re.compile("".join(parts), re.ASCII)
    except re.error:
        return None
