"""Piecewise tokenising equals tokenising at once; spelled control tokens stay text."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers

from tests.chat_templates import byte_level_bpe
from verl_sft.data.encoder import BREAK, Encoder

PLAIN = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "[X]", "<think>"]
TOKENS = [*PLAIN, "<|im_end|>\n", "a<"]
KINDS = {
    "bytes": {},
    "bytes, NFC": {"normalizer": normalizers.NFC()},
    "prepend": {"normalizer": normalizers.Prepend("\u2581")},
    "first": {"pre_tokenizer": pre_tokenizers.Metaspace(prepend_scheme="first")},
    "always": {"pre_tokenizer": pre_tokenizers.Metaspace(prepend_scheme="always")},
    "never": {"pre_tokenizer": pre_tokenizers.Metaspace(prepend_scheme="never")},
}
FLAGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "swallow": {},
    "lstrip": {"lstrip": True},
    "rstrip": {"rstrip": True},
    "word": {"single_word": True},
}


@cache
def encoder(kind: str, flags: str) -> Encoder:
    """A small tokenizer of one kind, its control tokens with one set of flags."""
    parts = KINDS[kind]
    if "pre_tokenizer" in parts:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
        tokenizer.pre_tokenizer = parts["pre_tokenizer"]
        trainer = trainers.BpeTrainer(
            vocab_size=90, special_tokens=["<unk>"], show_progress=False,
            initial_alphabet=list("ab <>|/\ns.imendtrhkX[]\u00e9"),
        )  # fmt: skip
        tokenizer.train_from_iterator(["see the end and it is a b "] * 3, trainer)
    else:
        tokenizer = Tokenizer.from_str(byte_level_bpe())
        if "normalizer" in parts:
            tokenizer.normalizer = parts["normalizer"]
    given = FLAGS[flags]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False, **given)
                                  for t in (TOKENS if flags == 'swallow' else PLAIN)])  # fmt: skip
    return Encoder(tokenizer.to_str())


pieces = st.lists(
    st.one_of(st.sampled_from(TOKENS), st.text("ab <>|\n.\u00e9e\u0301s", max_size=6),
              st.sampled_from(TOKENS).map(lambda t: t[0] + BREAK + t[1:])),
    max_size=12,
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("flags", FLAGS)
@settings(max_examples=40, deadline=None)
@given(texts=pieces)
def test_in_pieces_as_at_once(kind: str, flags: str, texts: list[str]) -> None:
    """Ids and ranges are those of the whole text, whatever the tokenizer does at its borders."""
    text, tool = "".join(texts), encoder(kind, flags)
    parts, whole = tool.encode(text), tool.encode_whole(text)
    assert parts.ids.tolist() == whole.ids.tolist()
    assert parts.starts.tolist() == whole.starts.tolist()
    assert parts.ends.tolist() == whole.ends.tolist()
    assert tool.encode(text, places=[]).ids.tolist() == whole.ids.tolist()


def test_where_it_cuts() -> None:
    """Tokens that another could swallow, or that take spaces, are no place to cut."""

    def cuts(flags: str) -> list[str]:
        return [m.group() for m in encoder("bytes", flags)._separator.finditer("".join(TOKENS))]

    assert cuts("plain")[:6] == PLAIN
    assert cuts("swallow") == ["[X]", "a<"]  # "a<" could take the others' first character
    assert cuts("lstrip") == cuts("word") == []
