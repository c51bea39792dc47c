"""Remembered words give the tokenizer's own ids and places; what is not known to, is left to it."""

from __future__ import annotations

import json
from functools import cache
from itertools import product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers

from tests.chat_templates import byte_level_bpe
from verl_sft.data.encoder import Encoder
from verl_sft.data.words import _ascii_pattern

_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
# As the tokenizers of widespread model families have them; None: GPT-2's, built in.
PATTERNS = {
    "gpt2": None,
    "one digit": rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}",
    "three digits": rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}",
    "cases": (
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENDINGS}?|"
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENDINGS}?|\p{{N}}{{1,3}}|"
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}
ADDED = ["<|im_start|>", "<|im_end|>", "<think>", "</think>", "<th", "k>x"]


def backend(name: str) -> Tokenizer:
    """A byte-level BPE with one of the patterns."""
    tokenizer = Tokenizer.from_str(byte_level_bpe())
    pattern = PATTERNS[name]
    if pattern is None:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_])
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ADDED[:2]])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in ADDED[2:]])
    return tokenizer


@cache
def encoder(name: str) -> Encoder:
    """The encoder of one of them."""
    return Encoder(backend(name).to_str())


def check(name: str, text: str) -> None:
    """Equal ids and places, by the fast way."""
    tool = encoder(name)
    assert tool._words is not None
    found, whole = tool._words.encode(text), tool.encode_whole(text)
    assert found is not None
    for ours, theirs in zip(found, (whole.ids, whole.starts, whole.ends), strict=True):
        assert ours.tolist() == theirs.tolist(), text


texts = st.lists(
    st.one_of(
        st.text(st.characters(max_codepoint=127), max_size=8),
        st.text("aBt's 01\t\r\n\x0b\x1c\x7f/<>.|'", max_size=12),
        st.sampled_from([*ADDED, "'LL", "'re", " \n", "  ", "the kitchen 1", "\r\n\r\n"]),
    ),
    min_size=1,
    max_size=10,
).map("".join)


@pytest.mark.parametrize("name", PATTERNS)
@settings(max_examples=300, deadline=None)
@given(text=texts.filter(bool))
def test_words_give_what_the_tokenizer_gives(name: str, text: str) -> None:
    """Any ASCII text: ids and places as of the tokenizer at once."""
    check(name, text)


@pytest.mark.parametrize("name", PATTERNS)
def test_all_neighbours(name: str) -> None:
    """Every pair of ASCII characters, and every four out of one of each kind."""
    characters = [chr(n) for n in range(128)]
    check(name, "".join(a + b for a, b in product(characters, characters)))
    for four in product("aZ' 0\n\t\r.\x1c", repeat=4):
        check(name, "".join(four))


def test_other_texts_are_left_to_the_tokenizer() -> None:
    """One character beyond ASCII, and the tokenizer itself is asked; the ids are right."""
    tool = encoder("one digit")
    assert tool._words is not None
    assert tool._words.encode("caf\u00e9 1") is None
    assert tool.encode("caf\u00e9 1").ids.tolist() == tool.encode_whole("caf\u00e9 1").ids.tolist()


def _changed(**parts: Any) -> Encoder:
    return Encoder(json.dumps({**json.loads(backend("one digit").to_str()), **parts}))


def test_unknown_tokenizers_are_left_alone() -> None:
    """Whatever could make a word's ids depend on its surroundings rules out the fast way."""
    plain = json.loads(backend("one digit").to_str())
    assert _changed()._words is not None
    assert _changed(model={**plain["model"], "dropout": 0.1})._words is None
    assert _changed(normalizer={"type": "Lowercase"})._words is None
    split, last = plain["pre_tokenizer"]["pretokenizers"]
    for steps in ([split, {**last, "add_prefix_space": True}], [split, split, last], [split]):
        assert _changed(pre_tokenizer={"type": "Sequence", "pretokenizers": steps})._words is None
    for flag in ("lstrip", "rstrip", "single_word", "normalized"):
        token, *others = plain["added_tokens"]
        assert _changed(added_tokens=[{**token, flag: True}, *others])._words is None


@pytest.mark.parametrize(
    "odd", [r"\p{L}++", r"\p{Han}+", r"\P{L}", r"a.b", r"(a)", r"[a&&b]", r"^a"]
)
def test_unknown_patterns_are_not_translated(odd: str) -> None:
    """A pattern with anything that the two dialects may read differently has no translation."""
    assert _ascii_pattern(odd) is None


def test_a_pattern_with_gaps_falls_back() -> None:
    """Text between the words would be lost: widths do not add up, and the tokenizer is asked."""
    plain = json.loads(backend("one digit").to_str())
    split, last = plain["pre_tokenizer"]["pretokenizers"]
    split = {**split, "pattern": {"Regex": r"\p{L}+"}}
    tool = _changed(pre_tokenizer={"type": "Sequence", "pretokenizers": [split, last]})
    assert tool._words is not None
    assert tool._words.encode("ab 12 cd") is None
    assert tool.encode("ab 12 cd").ids.tolist() == tool.encode_whole("ab 12 cd").ids.tolist()
