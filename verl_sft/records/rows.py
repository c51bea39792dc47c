"""One record as one row of columns, and back; the only place that knows how a column is encoded."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping
from typing import Any

from verl_sft.records.schema import COLUMNS, SFTRecord
from verl_sft.records.text import escape, unescape
from verl_sft.safe_io import dump_json
from verl_sft.types import JSON, Message

# Column -> field of SFTRecord, where the names differ.
_FIELDS = {
    "prompt_data": "prompt",
    "response_data": "response",
    "tools_json": "tools",
    "meta_json": "meta",
}


_OTHERS = frozenset(COLUMNS) - {"messages", "messages_json"}
_DAMAGE = (ValueError, KeyError, TypeError, AttributeError, OverflowError)


def record_to_row(record: SFTRecord) -> JSON:
    """The record as `{column: value}`, ready for Arrow; floats are rounded to float32.

    Raises:
        ValueError: JSON parts hold NaN, infinity or values that are not JSON.
    """
    row: JSON = {
        column: _ENCODE[kind](getattr(record, _FIELDS.get(column, column)))
        for column, kind in COLUMNS.items()
        if kind in _ENCODE and column != "messages_json"
    }
    row["messages"] = [
        {"role": m.role, "content": escape(message_text(m))} for m in record.messages
    ]
    row["messages_json"] = dump_json([m.to_json() for m in record.messages])
    row["tools_json"] = None if record.tools is None else dump_json(list(record.tools))
    for column in ("reward_model", "extra_info"):
        row[column] = dump_json(dict(getattr(record, column)))
    row["meta_json"] = dump_json(dict(record.meta))
    return {column: row[column] for column in COLUMNS}


class ColumnError(ValueError):
    """The value of one column cannot be read."""

    def __init__(self, column: str, message: str) -> None:
        super().__init__(message)
        self.column = column


def row_to_record(row: Mapping[str, Any]) -> SFTRecord:
    """The inverse of `record_to_row`; columns that are not there take their defaults.

    Raises:
        ColumnError: a column does not hold JSON where it should, or a value of the wrong type.
    """
    try:
        messages = tuple(Message.from_json(m) for m in load_json(row.get("messages_json")))
    except _DAMAGE as error:
        raise ColumnError("messages_json", str(error) or type(error).__name__) from error
    return SFTRecord(messages=messages, **decode_columns(row))


def decode_columns(row: Mapping[str, Any]) -> JSON:
    """The fields of `SFTRecord`, but for the messages, that the columns of a row say.

    Raises:
        ColumnError: as `row_to_record`.
    """
    known: JSON = {}
    for column, value in row.items():
        if value is not None and column in _OTHERS:
            try:
                known[_FIELDS.get(column, column)] = _decode(column, value)
            except _DAMAGE as error:
                raise ColumnError(column, str(error) or type(error).__name__) from error
    return known


def message_text(message: Message) -> str:
    """The message as plain text for readers that know only role and content.

    Thoughts stand in `<think>` tags and tool calls as JSON in `<tool_call>` tags, as the common
    chat templates print them; parts that are not text appear as their type in brackets.
    """
    parts: list[str] = []
    if message.reasoning_content:
        parts.append(f"<think>\n{message.reasoning_content}\n</think>\n\n")
    if isinstance(message.content, str):
        parts.append(message.content)
    else:
        parts += [str(p.get("text", f"[{p.get('type')}]")) for p in message.content or ()]
    for call in message.tool_calls or ():
        body = call.get("function", call)
        arguments = body.get("arguments", {})
        text = arguments if isinstance(arguments, str) else json.dumps(arguments)
        name = json.dumps(body.get("name"))
        lead = "\n" if "".join(parts) else ""
        parts.append(f'{lead}<tool_call>\n{{"name": {name}, "arguments": {text}}}\n</tool_call>')
    return "".join(parts)


def load_json(text: Any) -> Any:
    """Strict JSON: no NaN or infinity, and no number that becomes one.

    Raises:
        ValueError: not JSON, nested too deeply, or not text.
    """
    if not isinstance(text, str):
        raise ValueError(f"expected JSON text, found {type(text).__name__}")
    try:
        value = _DECODER.decode(text)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    _check_depth(value, text, 0, len(text))
    return value


def decode_json(text: str, start: int) -> tuple[Any, int]:
    """As `load_json`, for the value that begins at `start`; also the place behind it.

    Raises:
        JSONDecodeError: not JSON, or not to its end.
        ValueError: as `load_json`.
    """
    try:
        value, end = _DECODER.raw_decode(text, start)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    _check_depth(value, text, start, end)
    return value, end


def float32(value: float) -> float:
    """`value` as float32 holds it, so that every file format gives back the same number."""
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text:.40} is too large a number")
    return value


# Made once: `loads` makes one per call.
_DECODER = json.JSONDecoder(parse_constant=_no_constant, parse_float=_finite)
_DEEPEST = 100  # levels; everything that walks a row later has room for these
_TOO_DEEP = "nested too deeply"


def _check_depth(value: Any, text: str, start: int, end: int) -> None:
    if text.count("[", start, end) + text.count("{", start, end) <= _DEEPEST:
        return
    level = [value]
    for _ in range(_DEEPEST):
        level = [
            part
            for item in level
            for part in (item.values() if isinstance(item, dict) else item)
            if isinstance(part, dict | list)
        ]
        if not level:
            return
    raise ValueError(_TOO_DEEP)


def _text_struct(value: str | None) -> JSON | None:
    return None if value is None else {"content": escape(value)}


def _float(value: float | None) -> float | None:
    return None if value is None else float32(value)


_ENCODE: dict[str, Callable[[Any], Any]] = {
    "string": lambda v: escape(v) if isinstance(v, str) else None,
    "int32": lambda v: v,
    "int64": lambda v: v,
    "bool": lambda v: v,
    "float": _float,
    "list<int32>": lambda v: None if v is None else list(v),
    "list<float>": lambda v: None if v is None else [float32(x) for x in v],
    "struct<content: string>": _text_struct,
}


def _decode(column: str, value: Any) -> Any:
    if column in ("reward_model", "extra_info", "meta_json"):
        return _object(value)
    if column == "tools_json":
        return tuple(map(_as_object, _listed(load_json(value))))
    if column in ("supervise", "weights"):
        return tuple(map(int if column == "supervise" else float, _listed(value)))
    if column in ("prompt_data", "response_data"):
        content = value["content"] if isinstance(value, Mapping) else value
        return None if content is None else unescape(content)
    kind = COLUMNS[column]
    if kind == "string":
        return unescape(value)
    if kind == "float":
        # pandas turns nulls into NaN; a reward that is not known is None here
        return None if math.isnan(value) and column == "reward" else float(value)
    if kind == "bool":
        if not isinstance(value, bool):
            raise ValueError(f"expected true or false, found {value!r:.40}")
        return value
    if isinstance(value, float) and value != int(value):
        raise ValueError(f"expected a whole number, found {value}")
    return int(value)


def _object(text: Any) -> JSON:
    return _as_object(load_json(text))


def _as_object(value: Any) -> JSON:
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, found {type(value).__name__}")
    return value


def _listed(value: Any) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise ValueError(f"expected a list, found {type(value).__name__}")
    return list(value)
