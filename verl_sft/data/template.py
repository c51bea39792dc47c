"""A chat template and its tokenizer without transformers: text from messages, ids from text.

`TokenizerSpec` is plain data, so tokenising worker processes start without importing transformers.
Templates are a stranger's programs: they run in `sandbox.Sandbox`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import jinja2

from verl_sft.data.encoder import Encoder, Encoding, any_of
from verl_sft.data.jinja_code import GENERATION
from verl_sft.data.limits import OutOfLimitsError
from verl_sft.data.sandbox import Sandbox
from verl_sft.errors import UsageError

RESERVED = re.compile("[\U0010f8f0-\U0010f8f4]")  # the private characters of this package

_PROBE = "Zq7vKx"
_MAX_TEMPLATE_CHARS = 1_000_000  # the longest known ones have some 20,000
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


class TemplateFailure(Exception):
    """The template refused the conversation, failed on it, or ran out of its limits."""


class RunawayTemplate(TemplateFailure):
    """The template ran out of its limits."""


class ChatTemplate:
    """Renders and encodes; pure after construction."""

    def __init__(self, spec: TokenizerSpec) -> None:
        self.spec = spec
        self._sandbox = Sandbox(spec.today)
        if len(spec.chat_template) > _MAX_TEMPLATE_CHARS:
            raise UsageError(
                f"the chat template has over {_MAX_TEMPLATE_CHARS} characters",
                where=spec.template_name,
            )
        try:
            self._template = self._sandbox.from_string(spec.chat_template)
        except RecursionError as error:
            raise UsageError(
                "the chat template is nested too deeply", where=spec.template_name
            ) from error
        except jinja2.TemplateSyntaxError as error:
            raise UsageError(
                f"the chat template is not valid jinja: {error.message}",
                where=f"{spec.template_name}:{error.lineno}",
            ) from error
        self._encoder = Encoder(spec.backend_json)
        self.added, self.is_added = self._encoder.added, self._encoder.is_added
        # Thought tags are vocabulary, not structure: they open and close no turn, prompts name
        # them, and every inference server reads them as the tokens they are.
        tags = {t for t in self.added if not _THOUGHT_TAG.fullmatch(t)}
        special = self._encoder.special & tags
        spelled = {t for t in tags if t in spec.chat_template and re.search(r"\w", t)}
        control = special | {t for t in spelled if len(t) > 1 and not t.isalnum()}
        self.control_pattern, self.special_pattern = any_of(control), any_of(special)
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
        except OutOfLimitsError as error:
            raise RunawayTemplate(str(error)) from error
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise TemplateFailure(str(error) or type(error).__name__) from error
        except (IndexError, ArithmeticError, RecursionError, MemoryError) as error:
            raise TemplateFailure(f"{type(error).__name__}: {error}") from error
        return _strip_generation(text)

    def encode(self, text: str, *, places: Sequence[tuple[int, int]] | None = None) -> Encoding:
        """As `Encoder.encode`."""
        return self._encoder.encode(text, places=places)

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

    @cached_property
    def header_text(self) -> str:
        """What the generation prompt adds to a user's message: an answer's header."""
        chat = self._probe_chat(as_list=not self.string_content)[:1]
        try:
            texts = [
                self.render(chat, tools=None, add_generation_prompt=p, template_kwargs={}).text
                for p in (False, True)
            ]
        except TemplateFailure:
            return ""
        return texts[1].removeprefix(texts[0]) if texts[1].startswith(texts[0]) else ""

    def _probe_chat(self, *, as_list: bool) -> list[dict[str, Any]]:
        chat: list[dict[str, Any]] = [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": _PROBE},
            {"role": "user", "content": "b"},
        ]
        if as_list:
            chat = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in chat]
        return chat

    def _probe(self, *, as_list: bool, followed: bool = False) -> str:
        chat = self._probe_chat(as_list=as_list)
        try:
            return self.render(
                chat if followed else chat[:2],
                tools=None,
                add_generation_prompt=False,
                template_kwargs={},
            ).text
        except RunawayTemplate:
            raise
        except TemplateFailure:
            return ""


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
