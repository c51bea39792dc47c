"""Alpaca: `instruction`, `input`, `output`, `system`, and a `history` of [question, answer] pairs.

The names of the columns are those of LLaMA-Factory's `dataset_info.json` (`ReadOptions.columns`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from verl_sft.records.build import turn_records
from verl_sft.records.parse import ReadOptions
from verl_sft.records.rows import message_text
from verl_sft.records.schema import SFTRecord
from verl_sft.records.sources.base import SourceFormat
from verl_sft.records.sources.shared import (
    KEY,
    extras,
    from_extras,
    kept_message,
    message_of,
    text_of,
    tools_of,
    tools_text,
)
from verl_sft.records.values import BadRowError, sequence
from verl_sft.types import JSON, Message

COLUMNS = {
    "prompt": "instruction",
    "query": "input",
    "response": "output",
    "system": "system",
    "history": "history",
    "tools": "tools",
}


def _detect(row: JSON) -> bool:
    return {"instruction", "output"} <= row.keys()


def _read(row: JSON, options: ReadOptions) -> Iterable[SFTRecord]:
    names = {**COLUMNS, **dict(options.columns)}
    more = row.get(KEY)
    kept = more.get("messages") if isinstance(more, dict) else None
    asked = text_of(row.get(names["prompt"]), names["prompt"], optional=True)
    query = text_of(row.get(names["query"]), names["query"], optional=True)
    texts = [("user", "\n".join(filter(None, (asked, query))))]
    texts.append(("assistant", text_of(row.get(names["response"]), names["response"])))
    for question, answer in reversed(_history(row.get(names["history"]), names["history"])):
        texts[:0] = [("user", question), ("assistant", answer)]
    if system := text_of(row.get(names["system"]), names["system"], optional=True):
        texts.insert(0, ("system", system))
    messages = _messages(texts, kept)
    learned: JSON = {"supervise": (len(messages) - 1,)}
    if options.mask_history is False:  # asked for: the answers of the history are learned too
        learned = {"supervise": None, "weights": None}
    rest = {k: v for k, v in more.items() if k != "messages"} if isinstance(more, dict) else more
    tools = tools_of(row.get(names["tools"]), names["tools"])
    return (from_extras(rest, messages=messages, tools=tools, **learned),)


def _history(value: Any, field: str) -> list[tuple[str, str]]:
    if value is None or value == "":
        return []
    pairs = []
    for index, pair in enumerate(sequence(value, field)):
        where = f"{field}[{index}]"
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise BadRowError(where, "BAD_PAIR", "expected a [question, answer] pair")
        pairs.append((text_of(pair[0], where), text_of(pair[1], where)))
    return pairs


def _messages(texts: list[tuple[str, str]], kept: Any) -> list[Message]:
    """The messages of the texts, or the kept ones where they still say the same."""
    if isinstance(kept, list) and len(kept) == len(texts):
        before = [Message.from_json(m) for m in kept if isinstance(m, dict)]
        if [_view(m) for m in before] == texts:
            return before
    return [message_of(role, text, None) for role, text in texts]


def _view(message: Message) -> tuple[str, str]:
    """Role and text as they stand in a row: a tool's result is the user's text there."""
    role = "user" if message.role == "tool" else message.role
    return role, message_text(message)


def _write(record: SFTRecord) -> Iterable[JSON]:
    return tuple(_row(part) for part in turn_records(record))


def _row(record: SFTRecord) -> JSON:
    """The row of a record whose last message alone is learned."""
    messages = record.messages
    views = [_view(m) for m in messages]
    row: JSON = {"instruction": "", "input": "", "output": views[-1][1]}
    chat = views[:-1]
    if chat and chat[0][0] == "system" and chat[0][1]:
        row["system"] = chat.pop(0)[1]
    roles = [role for role, _ in chat]
    if roles != ["user", "assistant"] * (len(chat) // 2) + ["user"]:
        raise BadRowError(
            "messages",
            "NOT_ALTERNATING",
            "alpaca holds one user text before each answer",
            "Convert to sharegpt instead",
        )
    row["instruction"] = chat[-1][1]
    pairs = zip(chat[:-1:2], chat[1:-1:2], strict=True)
    row["history"] = [[question[1], answer[1]] for question, answer in pairs]
    if record.tools is not None:
        row["tools"] = tools_text(record.tools)
    more = extras(record)
    more.pop("supervise", None)
    if any(kept_message(m) is not None or m.role == "tool" for m in messages):
        more["messages"] = [m.to_json() for m in messages]
    return row | ({KEY: more} if more else {})


ALPACA = SourceFormat(
    "alpaca", "alpaca: instruction, input, output, system, history", _detect, _read, _write, ".json"
)
