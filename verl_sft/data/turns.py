"""Where an assistant turn begins and ends in the chat template's own output.

The learned span of turn k begins where the generation prompt for the messages before it ends, and
stops after the turn's stop token: both are read off renderings of the whole template, never off
patterns of one template family.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from verl_sft.data.messages import (
    Refused,
    answer_of,
    check_answer_printed,
    check_context_printed,
    text_of,
    thought_of,
    without_thought,
)
from verl_sft.data.template import ChatTemplate, RenderedText, TemplateFailure

_EMPTY_THOUGHT = re.compile(r"\s*(?:<think>)?\s*</think>")
_NO_THINKING = {"enable_thinking": False}
_KEEP_THOUGHTS = {"preserve_thinking": True, "clear_thinking": False, "keep_past_thinking": True}


@dataclass(frozen=True, slots=True)
class Turn:
    """One assistant turn; positions are characters of the rendering that ends with it.

    `text` is that rendering up to the end of the turn. `[start, end)` is what the model produces,
    its stop token last (at `stop_start`; None: the template prints none). `newline_end` is `end`,
    or behind the one newline that the template prints there.
    """

    index: int
    text: str
    start: int
    stop_start: int | None
    end: int
    newline_end: int


@dataclass(slots=True)
class Conversation:
    """A conversation as a template renders it; every rendering is made once."""

    rows: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None
    template: ChatTemplate
    template_kwargs: Mapping[str, Any]
    history_thinking: str
    needs_thoughts: bool = True  # a learned thought must be printed
    first: int = 0  # messages before it are not rendered, but for the system message
    _turns: dict[int, Turn] = field(default_factory=dict)

    def turn(self, index: int) -> Turn:
        """Locate assistant message `index`.

        Raises:
            Refused: with the reason why the place cannot be proven.
        """
        if index not in self._turns:
            self._turns[index] = self._locate(index)
        return self._turns[index]

    def row(self, index: int) -> Mapping[str, Any]:
        """Message `index` as the template gets it."""
        return self.rows[index]

    def number(self, index: int) -> int:
        """How many assistant messages come before message `index`."""
        return sum(row["role"] == "assistant" for row in self.rows[:index])

    def check_context(self, index: int) -> None:
        """Refuse if the rendering of turn `index` leaves out messages or tools before it."""
        seen, text = self._history(index), self.turn(index).text
        check_context_printed(text, messages=seen, tools=self.tools)
        if self.history_thinking == "keep" and any(
            thought_of(row) not in text for row in seen if row["role"] == "assistant"
        ):
            raise Refused(
                "thoughts_not_kept",
                "the chat template drops the thoughts of earlier turns",
                fix="Set data.history_thinking=template",
            )

    def window(self, first: int) -> Conversation:
        """The same conversation without what lies between the system message and `first`."""
        return replace(self, first=first, _turns={})

    def group_starts(self, index: int) -> list[int]:
        """Indices of the user messages before `index`: where a window may begin."""
        return [i for i, row in enumerate(self.rows[:index]) if row["role"] == "user"]

    def head_chars(self) -> int:
        """Characters that no truncation may take: everything before the first user's words."""
        first = next((i for i, row in enumerate(self.rows) if row["role"] == "user"), 0)
        texts = []
        for probe in ("A", "Z"):
            rows = list(self.rows[: first + 1])
            is_text = isinstance(rows[first]["content"], str)
            content = probe if is_text else [{"type": "text", "text": probe}]
            rows[first] = {**rows[first], "content": content}
            texts.append(self._render(rows, prompt=True).text)
        return _shared_chars(*texts)

    def _locate(self, index: int) -> Turn:
        """The turn with thinking as asked for; an answer without a thought may be one without.

        Where the template would make such an answer think nothing, it was produced with thinking
        switched off: then prompt and conversation are both rendered in that mode.
        """
        try:
            return self._locate_in(index, mode={})
        except Refused as refused:
            if refused.code != "injected_thought" or not self._may_be_thoughtless(index):
                raise
            try:
                return self._locate_in(index, mode=_NO_THINKING)
            except Refused:
                raise refused from None

    def _locate_in(self, index: int, *, mode: Mapping[str, Any]) -> Turn:
        row = self.rows[index]
        rendered = self._render([*self._history(index), row], prompt=False, extra=mode)
        text = rendered.text
        start = self._start(index, text=text, mode=mode)
        end, stop_start = self._end(text, start=start)
        tail = text[start:end]
        check_answer_printed(tail, row=row, needs_thought=self.needs_thoughts)
        if _EMPTY_THOUGHT.match(tail) and not _EMPTY_THOUGHT.match(text_of(row)):
            raise Refused(
                "injected_thought",
                f"the chat template adds an empty thought to message {index}, which has none",
                fix="Set +data.apply_chat_template_kwargs.enable_thinking=false",
            )
        header = self.template.header_text.strip()
        if header and tail.lstrip().startswith(header):
            raise Refused(
                "header_learned",
                f"the chat template prints the header of message {index} behind the generation "
                f"prompt: {tail[: len(header) + 20]!r}",
                fix="Use a chat template whose generation prompt holds the header",
            )
        newline_end = end + text.startswith("\n", end) if stop_start is not None else end
        turn = Turn(index, text[:newline_end], start, stop_start, end, newline_end)
        self._check_witness(rendered, turn=turn, mode=mode)
        return turn

    def _may_be_thoughtless(self, index: int) -> bool:
        settable = "enable_thinking" in self.template.spec.chat_template
        chosen = "enable_thinking" in self.template_kwargs
        return settable and not chosen and not thought_of(self.rows[index])

    def _start(self, index: int, *, text: str, mode: Mapping[str, Any]) -> int:
        """The longest generation prompt that the rendering begins with.

        A message without a thought was produced behind the prompt that closes thinking, where the
        template has one: the empty thought is context then.
        """
        variants = [mode]
        if self._may_be_thoughtless(index) and not mode:
            variants.append(_NO_THINKING)
        history = self._history(index)
        prompts = [self._render(history, prompt=True, extra=extra).text for extra in variants]
        starts = [len(prompt) for prompt in prompts if text.startswith(prompt)]
        if starts:
            return max(starts)
        shared = _shared_chars(prompts[0], text)
        raise Refused(
            "prompt_not_prefix",
            f"message {index}: the generation prompt goes on with {prompts[0][shared:][:40]!r}, "
            f"the conversation with {text[shared:][:40]!r}",
            fix="Use a chat template whose generation prompt begins the answer it prints",
        )

    def _end(self, text: str, *, start: int) -> tuple[int, int | None]:
        """The end of the turn and the start of its stop token.

        In the closing run of control tokens it is the first that closes a plain answer (some
        templates print an end of text behind it), else the last one.
        """
        closing: list[re.Match[str]] = []
        bound = len(text)
        for match in reversed(list(self.template.added_pattern.finditer(text, start))):
            if text[match.end() : bound].strip():
                break
            closing.append(match)
            bound = match.start()
        if not closing:
            return len(text), None
        stops = [m for m in reversed(closing) if m.group() == self.template.stop_text]
        stop = stops[0] if stops else closing[0]
        return stop.end(), stop.start()

    def _check_witness(
        self, rendered: RenderedText, *, turn: Turn, mode: Mapping[str, Any]
    ) -> None:
        """The template's own `{% generation %}` marks, where it has them, must say the same.

        They may begin earlier, at what the generation prompt supplies, and take the newline or not.
        Marks that also take what the template prints only at the end of a conversation are looked
        at in a conversation that goes on.
        """
        if not rendered.generation:
            return
        text, (start, end) = rendered.text, rendered.generation[-1]
        ends = (turn.end, turn.newline_end)
        behind = self.template.added_pattern.sub("", text[turn.newline_end : end])
        if end > turn.newline_end and not behind.strip():
            rows = [*self._history(turn.index), self.rows[turn.index], self._any_user()]
            longer = self._render(rows, prompt=False, extra=mode)
            found = [m for m in longer.generation if longer.text[: m[1]] == text[: m[1]]]
            start, end = found[-1] if found else (start, end)
        if start <= turn.start and end in ends:
            return
        raise Refused(
            "witness_disagrees",
            f"message {turn.index}: the generation prompt and the stop token give "
            f"{text[turn.start : turn.end]!r}, the template's generation marks {text[start:end]!r}",
            fix="Repair the generation marks of the chat template, or remove them",
        )

    def _any_user(self) -> dict[str, Any]:
        content = "a" if self.template.string_content else [{"type": "text", "text": "a"}]
        return {"role": "user", "content": content}

    def _history(self, index: int) -> list[Mapping[str, Any]]:
        head = 1 if self.first and self.rows[0]["role"] == "system" else 0
        rows = [*self.rows[:head], *self.rows[self.first : index]]
        if self.history_thinking != "strip":
            return rows
        return [without_thought(row) if row["role"] == "assistant" else row for row in rows]

    def _render(
        self,
        rows: Sequence[Mapping[str, Any]],
        *,
        prompt: bool,
        extra: Mapping[str, Any] | None = None,
    ) -> RenderedText:
        keep = _KEEP_THOUGHTS if self.history_thinking == "keep" else {}
        try:
            return self.template.render(
                rows,
                tools=self.tools,
                add_generation_prompt=prompt,
                template_kwargs={**keep, **self.template_kwargs, **(extra or {})},
            )
        except TemplateFailure as error:
            raise Refused(
                "template_error",
                f"the chat template does not take these messages: {error}",
                fix="Change the order or the roles of the messages, or the chat template",
            ) from error


def part_ranges(turn: Turn, *, row: Mapping[str, Any]) -> dict[str, list[tuple[int, int]]]:
    """Character ranges of a turn's thought and tool calls, tags included; the rest is content.

    Raises:
        Refused: parts_not_found.
    """
    ranges: dict[str, list[tuple[int, int]]] = {"reasoning": [], "tool_call": []}
    tail = turn.text[turn.start : turn.end]
    behind = 0
    if thought := thought_of(row):
        at = tail.find(thought)
        if at < 0:
            raise Refused("parts_not_found", f"message {turn.index}: its thought is not printed")
        # What closes a thought is what stands before the answer or, without one, the next word.
        closing = re.compile(r"\s*(?:</?[^<>\s]+>\s*)?").match(tail, at + len(thought))
        behind = closing.end() if closing else at + len(thought)
        ranges["reasoning"].append((turn.start, turn.start + behind))
    if row.get("tool_calls"):
        answer = answer_of(row)
        if answer:
            at = tail.find(answer, behind)
            if at < 0:
                raise Refused("parts_not_found", f"message {turn.index}: content behind its calls")
            behind = at + len(answer)
        stop = turn.stop_start if turn.stop_start is not None else turn.end
        ranges["tool_call"].append((turn.start + behind, stop))
    return ranges


def _shared_chars(left: str, right: str) -> int:
    """Length of the longest common beginning."""
    low, high = 0, min(len(left), len(right))
    while low < high:
        middle = (low + high + 1) // 2
        if left[:middle] == right[:middle]:
            low = middle
        else:
            high = middle - 1
    return low
