"""ShareGPT: `conversations` of `from` and `value`, with `system` and `tools` beside them.

The names of columns, keys and roles are those of LLaMA-Factory's `dataset_info.json`
(`ReadOptions.columns` and `.tags`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from verl_sft.records.messages import WEIGHT_ALIASES, need_answer
from verl_sft.records.parse import ReadOptions
from verl_sft.records.rows import message_text
from verl_sft.records.schema import SFTRecord
from verl_sft.records.sources.base import SourceFormat
from verl_sft.records.sources.shared import (
    KEY,
    extras,
    from_extras,
    kept_message,
    learned_by,
    message_of,
    text_of,
    tools_of,
    tools_text,
)
from verl_sft.records.values import BadRowError, json_of, sequence, weight_of
from verl_sft.safe_io import dump_json
from verl_sft.types import JSON, Message

COLUMNS = {"messages": "conversations", "system": "system", "tools": "tools"}
TAGS = {
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "observation_tag": "observation",
    "function_tag": "function_call",
    "system_tag": "system",
}
# What public files write beside the names of the tags.
_ROLES = {"user": "user", "assistant": "assistant", "tool": "tool", "system": "system"}


def _detect(row: JSON) -> bool:
    turns = row.get("conversations")
    if isinstance(turns, str):
        return turns.lstrip().startswith("[")
    return isinstance(turns, list)


def _read(row: JSON, options: ReadOptions) -> Iterable[SFTRecord]:
    columns, tags = {**COLUMNS, **dict(options.columns)}, {**TAGS, **dict(options.tags)}
    field = columns["messages"]
    turns = _turns(row.get(field), field)
    messages: list[Message] = []
    weights: dict[int, float] = {}
    if system := text_of(row.get(columns["system"]), columns["system"], optional=True):
        messages.append(Message("system", system))
    for index, turn in enumerate(turns):
        where = f"{field}[{index}]"
        if not isinstance(turn, dict):
            raise BadRowError(where, "BAD_TYPE", f"expected an object, found {type(turn).__name__}")
        message = _message(turn, tags, where)
        flag = next((name for name in WEIGHT_ALIASES if turn.get(name) is not None), None)
        if flag is not None and message.role == "assistant":
            weights[len(messages)] = weight_of(turn[flag], f"{where}.{flag}")
        messages.append(message)
    answers = [i for i, m in enumerate(messages) if m.role == "assistant"]
    need_answer(messages, field)
    learned: JSON = {}
    if weights:
        chosen = {i: weights.get(i, 1.0) for i in answers if weights.get(i, 1.0) > 0}
        learned = learned_by(chosen)
    tools = tools_of(row.get(columns["tools"]), columns["tools"])
    return (from_extras(row.get(KEY), messages=messages, tools=tools, **learned),)


def _turns(value: Any, field: str) -> list[Any]:
    turns = sequence(value, field)
    if not turns:
        raise BadRowError(field, "EMPTY", "the conversation is empty")
    return turns


def _message(turn: JSON, tags: dict[str, str], where: str) -> Message:
    role_key = tags["role_tag"] if tags["role_tag"] in turn else "role"
    text_key = tags["content_tag"] if tags["content_tag"] in turn else "content"
    name = turn.get(role_key)
    roles = {
        tags["user_tag"]: "user",
        tags["assistant_tag"]: "assistant",
        tags["observation_tag"]: "tool",
        tags["function_tag"]: "assistant",
        tags["system_tag"]: "system",
    }
    role = roles.get(name) or _ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        fix = f"Use one of {', '.join(roles)}, or name the tags in dataset_info.json"
        raise BadRowError(f"{where}.{role_key}", "BAD_ROLE", f"unknown role {name!r:.40}", fix)
    text = text_of(turn.get(text_key), f"{where}.{text_key}")
    if name == tags["function_tag"]:
        return _call(text, turn.get(KEY), f"{where}.{text_key}")
    return message_of(role, text, turn.get(KEY))


def _call(text: str, kept: Any, where: str) -> Message:
    value = json_of(text, where)
    calls = value if isinstance(value, list) else [value]
    if not calls or not all(isinstance(c, dict) and "name" in c for c in calls):
        raise BadRowError(where, "BAD_CALL", "a function call needs a name and arguments")
    functions = [{"name": c["name"], "arguments": c.get("arguments", {})} for c in calls]
    message = Message(
        "assistant", None, tool_calls=tuple({"type": "function", "function": f} for f in functions)
    )
    if isinstance(kept, dict):
        before = Message.from_json(kept)
        if _functions(before) == functions and not before.content:
            return before
    return message


def _functions(message: Message) -> list[JSON]:
    return [
        {"name": f.get("name"), "arguments": f.get("arguments", {})}
        for f in (call.get("function", call) for call in message.tool_calls or ())
    ]


def _write(record: SFTRecord) -> Iterable[JSON]:
    messages = list(record.messages)
    row: JSON = {"conversations": []}
    first = messages[0] if messages else None
    # An empty system text is read back as none, so it stays a turn.
    lifted = first is not None and first == Message("system", first.content) and first.content
    if lifted and isinstance(first, Message) and isinstance(first.content, str):
        row["system"] = first.content
        messages = messages[1:]
    for message in messages:
        row["conversations"].append(_turn(message))
    if record.tools is not None:
        row["tools"] = tools_text(record.tools)
    if more := extras(record):
        row[KEY] = more
    return (row,)


_TAG_OF = {"user": "human", "assistant": "gpt", "tool": "observation", "system": "system"}


def _turn(message: Message) -> JSON:
    if message.role not in _TAG_OF:
        raise BadRowError("messages", "BAD_ROLE", f"ShareGPT has no role '{message.role}'")
    functions = _functions(message)
    if functions and not message.content and not message.reasoning_content:
        value = functions[0] if len(functions) == 1 else functions
        turn: JSON = {"from": "function_call", "value": dump_json(value)}
        return turn | {KEY: message.to_json()}
    turn = {"from": _TAG_OF[message.role], "value": message_text(message)}
    kept = kept_message(message)
    return turn if kept is None else turn | {KEY: kept}


SHAREGPT = SourceFormat(
    "sharegpt", "ShareGPT: conversations of from and value", _detect, _read, _write, ".json"
)
