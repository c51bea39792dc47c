"""Lists of chat messages in any encoding, checked; flags that choose what is learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from verl_sft.records.values import BadRowError, json_of, sequence, struct, weight_of
from verl_sft.types import JSON, Message

ROLES = ("system", "developer", "user", "assistant", "tool")
MEDIA_FIX = "Take the row out, or replace what is not text by a description"
MOST_CHARS = 16_000_000  # of one text
MESSAGE_KEYS = frozenset(
    {"role", "content", "reasoning_content", "tool_calls", "tool_call_id", "name"}
)
_PLAIN_KEYS = frozenset({"role", "content"})
WEIGHT_ALIASES = ("loss_mask", "loss", "weight", "loss_weight", "trainable", "train")


def parse_messages(value: Any, field: str) -> tuple[tuple[Message, ...], dict[int, float] | None]:
    """Messages in any encoding, and the weight of each learned one where a flag says so.

    Returns:
        `(messages, weights)`; `weights` maps the index of each learned assistant message to its
        weight, or is None where no message carries one of `WEIGHT_ALIASES`.

    Raises:
        BadRowError: not a list of messages.
    """
    items = sequence(value, field)
    if not items:
        raise BadRowError(field, "EMPTY", "the list of messages is empty")
    messages: list[Message] = []
    flags: dict[int, float] = {}
    for index, item in enumerate(items):
        entry = item if type(item) is dict else struct(item, f"{field}[{index}]")
        messages.append(parse_message(entry, field, index))
        if entry.keys() <= MESSAGE_KEYS:  # nearly all messages
            continue
        alias = next((a for a in WEIGHT_ALIASES if entry.get(a) is not None), None)
        if alias is None:
            continue
        where = f"{field}[{index}]"
        flags[index] = weight_of(entry[alias], f"{where}.{alias}")
        if flags[index] > 0 and messages[-1].role != "assistant":
            raise BadRowError(
                f"{where}.{alias}",
                "NOT_ASSISTANT",
                f"a message of role '{messages[-1].role}' cannot be learned",
                "Set its weight to 0",
            )
    check_order(messages, field)
    if not flags:
        return tuple(messages), None
    turns = [i for i, m in enumerate(messages) if m.role == "assistant"]
    return tuple(messages), {i: flags.get(i, 1.0) for i in turns if flags.get(i, 1.0) > 0}


def need_answer(messages: Sequence[Message], field: str) -> None:
    """Raise where no message could be learned.

    Raises:
        BadRowError: there is no assistant message.
    """
    if not any(m.role == "assistant" for m in messages):
        raise BadRowError(field, "NO_ASSISTANT", "there is no assistant message to learn")


def parse_message(entry: JSON, field: str, index: int) -> Message:
    """One message, checked; `field[index]` is where it stands.

    Raises:
        BadRowError: it is not one of OpenAI's chat format.
    """
    content = entry.get("content")
    if entry.keys() <= _PLAIN_KEYS and type(content) is str:  # nearly all messages
        message = Message(entry.get("role") or "", content)
        check_message(message, field, index)
        return message
    calls = entry.get("tool_calls")
    where = f"{field}[{index}].tool_calls"
    if isinstance(calls, str):
        calls = json_of(calls, where)
    if calls is not None and not isinstance(calls, list):
        raise BadRowError(where, "BAD_TYPE", "tool_calls is not a list")
    known = {**entry, "role": entry.get("role") or "", "tool_calls": calls or None}
    message = Message.from_json(known)
    check_message(message, field, index)
    return message


def check_message(message: Message, field: str, index: int) -> None:
    """Raise where a message is not one of OpenAI's chat format.

    Raises:
        BadRowError: names the field.
    """
    if message.role not in ROLES:
        fix = f"Use one of {', '.join(ROLES)}"
        text = f"unknown role {message.role!r:.40}"
        raise BadRowError(f"{field}[{index}].role", "BAD_ROLE", text, fix)
    content = message.content
    if type(content) is str:
        if len(content) > MOST_CHARS:
            text = f"a text of {len(content):,} characters; the most are {MOST_CHARS:,}"
            raise BadRowError(f"{field}[{index}].content", "TOO_LARGE", text)
    elif content is None:
        if not message.tool_calls and not message.reasoning_content:
            text = "the message has no content"
            raise BadRowError(f"{field}[{index}].content", "NO_TEXT", text)
    else:
        _check_parts(content, f"{field}[{index}].content")
    for name in ("reasoning_content", "tool_call_id", "name"):
        if not isinstance(getattr(message, name), str | None):
            text = f"{name} is {type(getattr(message, name)).__name__}, not text"
            raise BadRowError(f"{field}[{index}].{name}", "BAD_TYPE", text)
    if message.tool_calls:
        _check_calls(message.tool_calls, f"{field}[{index}].tool_calls")


def _check_parts(content: Any, where: str) -> None:
    if not isinstance(content, list | tuple) or not all(isinstance(p, dict) for p in content):
        message = f"content is {type(content).__name__}, not text or a list of parts"
        raise BadRowError(where, "BAD_TYPE", message)
    for place, part in enumerate(content):
        kind = part.get("type", "text" if "text" in part else None)
        if kind != "text":
            text = f"a part of type {kind!r:.40}: only text can be trained"
            raise BadRowError(f"{where}[{place}]", "NOT_TEXT", text, MEDIA_FIX)
        if part.get("type") == "text" and not isinstance(part.get("text"), str):
            raise BadRowError(f"{where}[{place}]", "BAD_PART", "a text part without text")


def _check_calls(calls: Sequence[Any], where: str) -> None:
    for place, call in enumerate(calls):
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise BadRowError(f"{where}[{place}]", "BAD_CALL", "a tool call without a name")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            arguments = json_of(arguments, f"{where}[{place}].arguments") if arguments else {}
        if not isinstance(arguments, Mapping | None):
            found = type(arguments).__name__
            text = f"arguments are {found}, not an object"
            raise BadRowError(f"{where}[{place}].arguments", "BAD_TYPE", text)


def check_order(messages: Sequence[Message], field: str) -> None:
    """Raise for a tool's result that no call can have asked for.

    Raises:
        BadRowError: names the message.
    """
    known: set[str] | None = None  # ids of calls so far; None: no answer came yet
    for index, message in enumerate(messages):
        if message.role == "assistant":
            known = known or set()
            known.update(str(call["id"]) for call in message.tool_calls or () if call.get("id"))
        elif message.role == "tool":
            place = f"{field}[{index}]"
            if known is None:
                raise BadRowError(place, "TOOL_WITHOUT_CALL", "a result stands before any call")
            if message.tool_call_id and known and message.tool_call_id not in known:
                text = f"no call before it has the id {message.tool_call_id!r:.40}"
                raise BadRowError(f"{place}.tool_call_id", "UNKNOWN_CALL", text)


def check_learned(
    messages: Sequence[Message], supervise: Sequence[int] | None, weights: Sequence[float] | None
) -> None:
    """Raise where indices and weights of learned messages are not those of answers.

    Raises:
        BadRowError: names the column.
    """
    if supervise is None:
        need_answer(messages, "messages")
        return
    if not supervise:
        raise BadRowError("supervise", "NOTHING_LEARNED", "no message of the row is learned")
    for index in supervise:
        if not 0 <= index < len(messages) or messages[index].role != "assistant":
            message = f"index {index} is not an assistant message"
            raise BadRowError("supervise", "BAD_INDEX", message)
    if weights is not None and len(weights) != len(supervise):
        message = f"{len(weights)} weights for {len(supervise)} learned messages"
        raise BadRowError("weights", "BAD_LENGTH", message)
    for value in weights or ():
        weight_of(value, "weights")
