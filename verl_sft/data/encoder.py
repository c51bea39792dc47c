"""Rendered text -> token ids, with the character range of each token.

A conversation is tokenised piece by piece, cut where a control token begins: those separate texts
exactly, and pieces are remembered, so that the views of a conversation share their history's work.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from verl_sft.data.sample import Int32Array
from verl_sft.data.words import word_encoder
from verl_sft.errors import UsageError

# Private-use characters: never text, untouched by normalisers, refused in contents.
BREAK = "\U0010f8f0"  # inside a control token's text that must stay text
_ALIAS = ("\U0010f8f3", "\U0010f8f4")
_REMEMBERED_PIECES = 4096
_REMEMBERED_CHARS = 8192  # of one piece


@dataclass(frozen=True, slots=True)
class Encoding:
    """Token ids (int32 [T]) and the half-open character range of each (int64 [T])."""

    ids: Int32Array
    starts: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]


class Encoder:
    """A tokenizer's vocabulary and nothing of its post-processing; pure after construction.

    `added` maps the text of each added token to its id; `is_added[id]` (bool) says which ids are.
    """

    def __init__(self, backend_json: str) -> None:
        backend = json.loads(backend_json)
        # Post-processors add tokens and trim offsets; here text and offsets must be the template's.
        backend.update(post_processor=None, truncation=None, padding=None)
        self._backend_dict = backend
        self._backend = Tokenizer.from_str(json.dumps(backend))
        self.added: dict[str, int] = {t["content"]: t["id"] for t in backend["added_tokens"]}
        self.special = {t["content"] for t in backend["added_tokens"] if t["special"]}
        self.is_added = np.zeros(
            self._backend.get_vocab_size() + 1 + max(self.added.values(), default=0), dtype=bool
        )
        self.is_added[list(self.added.values())] = True
        self._words = word_encoder(self._backend, backend=backend, any_of=any_of)
        self._separator = any_of(_separators(backend["added_tokens"]))
        self._remembered = lru_cache(maxsize=_REMEMBERED_PIECES)(self.encode_whole)

    def encode(self, text: str, *, places: Sequence[tuple[int, int]] | None = None) -> Encoding:
        """Tokenise; control tokens broken by `BREAK` are encoded as plain text.

        Args:
            text: what a chat template printed.
            places: character ranges where the range of each token is needed; elsewhere it may be
                that of the whole piece around it. Default: everywhere.

        Raises:
            UnicodeError: the text holds a lone surrogate.
        """
        if self._words and (found := self._words.encode(text)):
            return Encoding(*found)
        cuts = [0, *(m.start() for m in self._separator.finditer(text) if m.start()), len(text)]
        parts = []
        for begin, end in pairwise(cuts):
            exact = places is None or any(a < end and begin < b for a, b in places)
            parts.append(self._piece(text[begin:end], exact))
        if len(parts) == 1:
            return parts[0]
        shift = np.repeat(cuts[:-1], [len(p.ids) for p in parts])
        return Encoding(
            np.concatenate([p.ids for p in parts]),
            np.concatenate([p.starts for p in parts]) + shift,
            np.concatenate([p.ends for p in parts]) + shift,
        )

    def encode_whole(self, text: str, exact: bool = True) -> Encoding:
        """As `encode`, in one piece; without `exact` all tokens get the range of the text."""
        text.encode("utf-8")  # the tokenizer would call a lone surrogate a type error
        if BREAK in text:
            # Real control tokens take private names, so that the spelled ones mean nothing.
            aliased, origin = self._alias_text(text)
            found = self._aliased.encode(aliased, add_special_tokens=False)
            offsets = origin[np.array(found.offsets, dtype=np.int64).reshape(-1, 2)]
        elif exact:
            found = self._backend.encode(text, add_special_tokens=False)
            offsets = np.array(found.offsets, dtype=np.int64).reshape(-1, 2)
        else:  # a quarter faster, for it does not count characters
            (found,) = self._backend.encode_batch_fast([text], add_special_tokens=False)
            offsets = np.zeros((len(found), 2), dtype=np.int64)
            offsets[:, 1] = len(text)
        ids = np.frombuffer(array("i", found.ids), dtype=np.int32)  # faster than from a list
        return Encoding(ids, offsets[:, 0], offsets[:, 1])

    def _piece(self, text: str, exact: bool) -> Encoding:
        short = len(text) <= _REMEMBERED_CHARS
        return self._remembered(text, exact) if short else self.encode_whole(text, exact)

    def _alias_text(self, text: str) -> tuple[str, npt.NDArray[np.int64]]:
        """The text with aliases and without breaks, and the place in `text` of each character."""
        pieces: list[str] = []
        places: list[npt.NDArray[np.int64]] = []

        def add(piece: str, at: npt.NDArray[np.int64]) -> None:
            pieces.append(piece)
            places.append(at)

        names = self._alias_names
        at = 0
        for match in self._added_or_break.finditer(text):
            start, end = match.span()
            add(text[at:start], np.arange(at, start))
            at = end
            if match.group() != BREAK:
                name = names[match.group()]
                inside = np.full(len(name), start)
                add(name, inside)
        add(text[at:], np.arange(at, len(text)))
        places.append(np.array([len(text)]))
        return "".join(pieces), np.concatenate(places).astype(np.int64)

    @cached_property
    def _added_or_break(self) -> re.Pattern[str]:
        return any_of([BREAK, *self.added])

    @cached_property
    def _alias_names(self) -> dict[str, str]:
        return {t: f"{_ALIAS[0]}{chr(0x100000 + i)}{_ALIAS[1]}" for i, t in enumerate(self.added)}

    @cached_property
    def _aliased(self) -> Tokenizer:
        names = self._alias_names
        backend = json.loads(json.dumps(self._backend_dict))
        for token in backend["added_tokens"]:
            token["content"] = names[token["content"]]
        model = backend["model"]
        vocab = model["vocab"]
        if isinstance(vocab, dict):
            model["vocab"] = {names.get(t, t): i for t, i in vocab.items()}
        else:
            model["vocab"] = [[names.get(t, t), score] for t, score in vocab]
        if model.get("unk_token") in names:
            model["unk_token"] = names[model["unk_token"]]
        aliased = Tokenizer.from_str(json.dumps(backend))
        for token, name in names.items():
            if aliased.token_to_id(name) != self.added[token]:
                raise UsageError(
                    f"control tokens in contents cannot be escaped with this tokenizer ({token!r})",
                    fix="Set data.special_tokens_in_content=error or allow",
                )
        return aliased


def any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """A pattern that matches any of the given strings, the longest first."""
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def _separators(added: list[dict[str, Any]]) -> list[str]:
    """Special tokens at whose beginning a text may be cut without changing any token.

    Not those that take spaces before them, are looked for in normalised text or inside words, or
    that another added token could swallow.
    """
    found = [
        t["content"]
        for t in added
        if t["special"] and not (t["lstrip"] or t["normalized"] or t["single_word"])
    ]
    others = [t["content"] for t in added]
    tails = {o[n:] for o in others for n in range(1, len(o))}
    swallowed = {f for f in found if any(f[:n] in tails for n in range(1, len(f)))}
    swallowed |= {f for f in found for o in others if f in o and f != o}
    return [f for f in found if f not in swallowed]
