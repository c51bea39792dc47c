"""A chat template and its tokenizer without transformers: text from messages, ids from text.

`TokenizerSpec` is plain data, so tokenising worker processes start without importing transformers.
Templates are a stranger's programs: they run in `sandbox.Sandbox`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import jinja2
import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from verl_sft.data.sample import Int32Array
from verl_sft.data.sandbox import GENERATION, Sandbox
from verl_sft.errors import UsageError

# Private-use characters: never text, untouched by normalisers, refused in contents.
BREAK = "\U0010f8f0"  # inside a control token's text that must stay text
_ALIAS = ("\U0010f8f3", "\U0010f8f4")
RESERVED = re.compile("[\U0010f8f0-\U0010f8f4]")

_PROBE = "Zq7vKx"
_THOUGHT_TAG = re.compile("</?(?:think|thinking|thought|reasoning)>")


@dataclass(frozen=True, slots=True)
class TokenizerSpec:
    """What of a tokenizer rendering needs.

    `template_name` says where the chat template comes from; `today` (ISO date) is what
    `strftime_now` shows, fixed so that equal data gives equal tokens.
    """

    backend_json: str
    chat_template: str
    template_name: str
    special_tokens: Mapping[str, str]
    today: str = "2024-07-26"


@dataclass(frozen=True, slots=True)
class RenderedText:
    """The template's output and the character ranges of its `{% generation %}` blocks."""

    text: str
    generation: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Encoding:
    """Token ids (int32 [T]) and the half-open character range of each (int64 [T])."""

    ids: Int32Array
    starts: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]


class TemplateFailure(Exception):
    """The template refused the conversation, failed on it, or ran out of its limits."""


class ChatTemplate:
    """Renders and encodes; pure after construction."""

    def __init__(self, spec: TokenizerSpec) -> None:
        self.spec = spec
        self._sandbox = Sandbox(spec.today)
        try:
            self._template = self._sandbox.from_string(spec.chat_template)
        except jinja2.TemplateSyntaxError as error:
            raise UsageError(
                f"the chat template is not valid jinja: {error.message}",
                where=f"{spec.template_name}:{error.lineno}",
            ) from error
        backend = json.loads(spec.backend_json)
        # Post-processors add tokens and trim offsets; here text and offsets must be the template's.
        backend.update(post_processor=None, truncation=None, padding=None)
        self._backend_dict = backend
        self._backend = Tokenizer.from_str(json.dumps(backend))
        self.added: dict[str, int] = {t["content"]: t["id"] for t in backend["added_tokens"]}
        self.is_added = np.zeros(
            self._backend.get_vocab_size() + 1 + max(self.added.values(), default=0), dtype=bool
        )
        self.is_added[list(self.added.values())] = True
        # Thought tags are vocabulary, not structure: they open and close no turn, prompts name
        # them, and every inference server reads them as the tokens they are.
        tags = {t for t in self.added if not _THOUGHT_TAG.fullmatch(t)}
        special = {t["content"] for t in backend["added_tokens"] if t["special"]} & tags
        spelled = {t for t in tags if t in spec.chat_template and re.search(r"\w", t)}
        self.special = special
        self.control = special | {t for t in spelled if len(t) > 1 and not t.isalnum()}
        self.added_pattern = any_of(t for t in self.added if t.strip())
        self.encode_short = lru_cache(maxsize=4096)(self._encode_ids)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool,
        template_kwargs: Mapping[str, Any],
    ) -> RenderedText:
        """Run the template.

        Raises:
            TemplateFailure: with the template's own message.
        """
        values = {**self.spec.special_tokens, **template_kwargs}
        values.update(messages=messages, tools=tools or None, documents=None)
        values["add_generation_prompt"] = add_generation_prompt
        try:
            text = self._sandbox.run(self._template, values)
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise TemplateFailure(str(error) or type(error).__name__) from error
        except (IndexError, ArithmeticError, RecursionError, MemoryError) as error:
            raise TemplateFailure(f"{type(error).__name__}: {error}") from error
        return _strip_generation(text)

    def encode(self, text: str) -> Encoding:
        """Tokenise a rendered text; control tokens broken by `BREAK` are encoded as plain text.

        Raises:
            UnicodeError: the text holds a lone surrogate.
        """
        text.encode("utf-8")  # the tokenizer would call a lone surrogate a type error
        if BREAK not in text:
            found = self._backend.encode(text, add_special_tokens=False)
            offsets = np.array(found.offsets, dtype=np.int64).reshape(-1, 2)
            return Encoding(np.array(found.ids, dtype=np.int32), offsets[:, 0], offsets[:, 1])
        # Real control tokens take private names, so that the spelled ones mean nothing.
        aliased, places = self._alias_text(text)
        found = self._aliased.encode(aliased, add_special_tokens=False)
        offsets = places[np.array(found.offsets, dtype=np.int64).reshape(-1, 2)]
        return Encoding(np.array(found.ids, dtype=np.int32), offsets[:, 0], offsets[:, 1])

    def _encode_ids(self, text: str) -> tuple[int, ...]:
        return tuple(self.encode(text).ids.tolist())

    @cached_property
    def string_content(self) -> bool:
        """Whether the template prints text contents (else it wants lists of content parts)."""
        return _PROBE in self._probe(as_list=False)

    @cached_property
    def stop_text(self) -> str | None:
        """The control token that ends a plain answer (None: the template prints none).

        Behind an answer stands a run of control tokens. What the template prints there only at the
        end of a conversation is not the turn's, unless it stands in the place of the turn's own.
        """
        as_list = not self.string_content
        _, found, tail = self._probe(as_list=as_list).rpartition(_PROBE)
        if not found:
            raise UsageError(
                "the chat template does not print the content of messages",
                where=self.spec.template_name,
            )
        followed = self._probe(as_list=as_list, followed=True).rpartition(_PROBE)[2]
        stop, at = None, 0
        for match in self.added_pattern.finditer(tail):
            if tail[at : match.start()].strip():
                break
            at = match.end()
            if stop is None or followed.startswith(tail[:at]):
                stop = match.group()
        return stop

    def _probe(self, *, as_list: bool, followed: bool = False) -> str:
        chat: list[dict[str, Any]] = [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": _PROBE},
            {"role": "user", "content": "b"},
        ]
        if as_list:
            chat = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in chat]
        try:
            return self.render(
                chat if followed else chat[:2],
                tools=None,
                add_generation_prompt=False,
                template_kwargs={},
            ).text
        except TemplateFailure:
            return ""

    def _alias_text(self, text: str) -> tuple[str, npt.NDArray[np.int64]]:
        """The text with aliases and without breaks, and the place in `text` of each character."""
        pieces: list[str] = []
        places: list[npt.NDArray[np.int64]] = []

        def add(piece: str, at: npt.NDArray[np.int64]) -> None:
            pieces.append(piece)
            places.append(at)

        names = self._alias_names
        at = 0
        for match in re.finditer(f"{BREAK}|{self._all_added.pattern}", text):
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
    def _all_added(self) -> re.Pattern[str]:
        return any_of(self.added)

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


def any_of(tokens: Any) -> re.Pattern[str]:
    """A pattern that matches any of the given strings, the longest first."""
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def _strip_generation(text: str) -> RenderedText:
    if GENERATION[0] not in text:
        return RenderedText(text)
    pieces: list[str] = []
    spans: list[tuple[int, int]] = []
    size, opened = 0, 0
    for piece in re.split(f"([{GENERATION[0]}{GENERATION[1]}])", text):
        if piece == GENERATION[0]:
            opened = size
        elif piece == GENERATION[1]:
            if spans and spans[-1][1] == opened:  # some templates mark a turn in two pieces
                opened = spans.pop()[0]
            spans.append((opened, size))
        else:
            pieces.append(piece)
            size += len(piece)
    return RenderedText("".join(pieces), tuple(spans))
