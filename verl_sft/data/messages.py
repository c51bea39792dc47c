"""Messages as the chat template wants them: arguments as dicts, control-token text harmless."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from verl_sft.data.encoder import BREAK
from verl_sft.data.template import RESERVED, ChatTemplate
from verl_sft.types import Message

THOUGHT = re.compile(r"\s*<think>.*?</think>\s*", re.DOTALL)
_THOUGHT_TAGS = re.compile(r"</?think>")
_EVIDENCE_WORDS = 64


class Refused(Exception):
    """A conversation, or a part of it, for which exact masks cannot be proven."""

    def __init__(self, code: str, reason: str, *, fix: str = "") -> None:
        super().__init__(f"{code}: {reason}")
        self.code, self.reason, self.fix = code, reason, fix


def prepare(
    messages: Sequence[Message], *, template: ChatTemplate, control_text: str
) -> tuple[list[dict[str, Any]], int]:
    """Messages as dicts for the template, and how many control-token texts were escaped.

    In contents of users, tools and the system all tokens of the template's structure are escaped;
    in an assistant's only special tokens are: tool-call tags are the model's own to write. Thought
    tags stay what they are everywhere, as they do at inference.

    Args:
        messages: the conversation.
        template: whose control tokens they are.
        control_text: `data.special_tokens_in_content`: escape, error or allow.

    Raises:
        Refused: reserved_character, control_token_in_content, bad_tool_arguments, not_text.
    """
    theirs, own = template.control_pattern, template.special_pattern
    rows, count = [], 0
    for index, message in enumerate(messages):
        row = _plain_row(message, index=index)
        pattern = own if message.role == "assistant" else theirs
        found = sum(_count(row.get(key), pattern) for key in _TEXT_FIELDS)
        if found and control_text == "error":
            raise Refused(
                "control_token_in_content",
                f"message {index} ({message.role}) spells a control token of the tokenizer",
                fix="Set data.special_tokens_in_content=escape, or remove it from the text",
            )
        if found and control_text == "escape":
            row.update({k: _escape(row[k], pattern) for k in _TEXT_FIELDS if row.get(k)})
            count += found
        if not template.string_content:
            row["content"] = [{"type": "text", "text": row["content"]}]
        rows.append(row)
    return rows, count


def without_thought(row: Mapping[str, Any]) -> dict[str, Any]:
    """An assistant message as history that hides its thought."""
    bare = {k: v for k, v in row.items() if k != "reasoning_content"}
    content = text_of(row)
    kept = THOUGHT.sub("", content, count=1)
    if kept != content:
        is_list = isinstance(row["content"], list)
        bare["content"] = [{"type": "text", "text": kept}] if is_list else kept
    return bare


def thought_of(row: Mapping[str, Any]) -> str:
    """The thought of a message, from its own field or from `<think>` tags in its content."""
    if row.get("reasoning_content"):
        return str(row["reasoning_content"]).strip()
    before, found, _ = text_of(row).partition("</think>")
    return before.rpartition("<think>")[2].strip() if found else ""


def answer_of(row: Mapping[str, Any]) -> str:
    """The content of a message behind its thought."""
    return text_of(row).rpartition("</think>")[2].strip()


def text_of(row: Mapping[str, Any]) -> str:
    """The content of a prepared message as text."""
    content = row["content"]
    return str(content[0]["text"]) if isinstance(content, list) else str(content)


def check_context_printed(
    text: str, *, messages: Iterable[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None
) -> None:
    """Refuse a template that leaves out what the model is supposed to have read.

    Raises:
        Refused: context_dropped, tools_dropped.
    """
    for row in messages:
        content = text_of(row).strip()
        if row["role"] == "assistant" or content in text:
            continue
        words = re.findall(r"\w+", content)[:_EVIDENCE_WORDS]
        if row["role"] != "tool" or not all(word in text for word in words):
            raise Refused(
                "context_dropped",
                f"the chat template does not print the content of a {row['role']} message",
                fix="Use a chat template that supports this role",
            )
    for tool in tools or ():
        name = str(tool.get("function", tool).get("name", ""))
        if name not in text:
            raise Refused(
                "tools_dropped",
                f"the chat template does not print the tool '{name}'",
                fix="Use a chat template with tool support, or drop the tools column",
            )


def check_answer_printed(tail: str, *, row: Mapping[str, Any], needs_thought: bool) -> None:
    """Refuse a template that leaves out a part of an answer that is to be learned.

    Args:
        tail: what the template prints behind the generation prompt.
        row: the message.
        needs_thought: whether its thought is learned.

    Raises:
        Refused: content_dropped, thought_dropped, tool_call_dropped.
    """
    thought = thought_of(row)
    # Also what stands before a thought or between two: templates cut such a content at its tags.
    said = {part.strip() for part in _THOUGHT_TAGS.split(text_of(row))} - {thought}
    calls = [call["function"] for call in row.get("tool_calls", ())]
    names = Counter(call["name"] for call in calls)
    words = {word for call in calls for word in islice(_words(call["arguments"]), _EVIDENCE_WORDS)}
    missing = ""
    if any(part not in tail for part in said):
        missing = "content"
    elif needs_thought and thought not in tail:
        missing = "thought"
    elif any(tail.count(name) < times for name, times in names.items()) or any(
        word not in tail for word in words
    ):
        missing = "tool call"
    if missing:
        raise Refused(
            f"{missing.replace(' ', '_')}_dropped",
            f"the chat template does not print the {missing} of a learned message",
            fix="Use a chat template that supports it"
            + (", or set data.mask.reasoning=0" if missing == "thought" else ""),
        )


def _words(value: Any) -> Iterator[str]:
    """ASCII words of the texts in tool arguments: they survive every way of writing JSON."""
    if isinstance(value, str):
        yield from (found.group() for found in re.finditer(r"[A-Za-z0-9_]+", value))
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _words(key)
            yield from _words(item)
    elif isinstance(value, list):
        for item in value:
            yield from _words(item)


_TEXT_FIELDS = ("content", "reasoning_content", "tool_calls")


def _plain_row(message: Message, *, index: int) -> dict[str, Any]:
    row = message.to_json()
    row["content"] = _text(message.content, index=index)
    if message.tool_calls:
        row["tool_calls"] = [_call(dict(call), index=index) for call in message.tool_calls]
    else:
        row.pop("tool_calls", None)
    plain = len(row) == 2  # role and content
    if RESERVED.search(row["content"] if plain else json.dumps(row, ensure_ascii=False)):
        raise Refused("reserved_character", f"message {index} holds a reserved private character")
    return row


def _text(content: str | Sequence[Mapping[str, Any]] | None, *, index: int) -> str:
    # Templates print None as "None"; an empty string is as false and prints nothing.
    if content is None or isinstance(content, str):
        return content or ""
    kinds = {part.get("type") for part in content}
    if kinds - {"text"}:
        raise Refused(
            "not_text", f"message {index} has content parts of type {sorted(map(str, kinds))}"
        )
    return "".join(str(part.get("text") or "") for part in content)


def _call(call: dict[str, Any], *, index: int) -> dict[str, Any]:
    function = dict(call.get("function") or {k: call.get(k) for k in ("name", "arguments")})
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except json.JSONDecodeError as error:
            raise Refused(
                "bad_tool_arguments",
                f"message {index}: the arguments of '{function.get('name')}' are not JSON: {error}",
                fix="Give tool arguments as a JSON object",
            ) from error
    if not isinstance(arguments, dict | None):
        raise Refused(
            "bad_tool_arguments",
            f"message {index}: the arguments of '{function.get('name')}' are not a JSON object",
            fix="Give tool arguments as a JSON object",
        )
    function["arguments"] = arguments or {}
    return {"type": "function", **call, "function": function}


def _count(value: Any, pattern: re.Pattern[str]) -> int:
    if isinstance(value, str):
        return len(pattern.findall(value))
    if isinstance(value, Mapping):
        return sum(_count(v, pattern) for v in value.values())
    if isinstance(value, list):
        return sum(_count(v, pattern) for v in value)
    return 0


def _escape(value: Any, pattern: re.Pattern[str]) -> Any:
    """Break every control token's text, so that neither template nor tokenizer sees the token."""
    if isinstance(value, str):
        return pattern.sub(lambda m: f"{m.group()[0]}{BREAK}{m.group()[1:]}", value)
    if isinstance(value, Mapping):
        return {k: _escape(v, pattern) for k, v in value.items()}
    if isinstance(value, list):
        return [_escape(v, pattern) for v in value]
    return value
