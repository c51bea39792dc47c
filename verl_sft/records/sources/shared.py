"""What text formats share: messages as text and back, and the fields that they have no place for.

A writer puts the natural view of a record where the tool looks for it, and beside it, under `KEY`,
what that view cannot say. A reader trusts the second only where the first still agrees with it, so
that a text that was edited in the file is the text that is trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from verl_sft.records.rows import ColumnError, decode_columns, message_text, record_to_row
from verl_sft.records.schema import COLUMNS, SFTRecord
from verl_sft.records.values import BadRowError, json_of, struct
from verl_sft.safe_io import dump_json
from verl_sft.types import JSON, Message

KEY = "verl_sft"
_IN_VIEW = ("messages", "messages_json", "tools_json")
_EMPTY = record_to_row(SFTRecord(messages=()))


def extras(record: SFTRecord) -> JSON:
    """The columns of a record, beside messages and tools, that are not at their defaults."""
    row = record_to_row(record)
    return {c: row[c] for c in COLUMNS if c not in _IN_VIEW and row[c] != _EMPTY[c]}


def added(record: SFTRecord, *, read_back: SFTRecord) -> JSON:
    """`{KEY: columns}` for what the natural view, read back, would lose or invent; else empty.

    A column that the view fills and the record has not is there as null.
    """
    wanted, found = extras(record), extras(read_back)
    changed = {c: wanted.get(c) for c in {**found, **wanted} if found.get(c) != wanted.get(c)}
    return {KEY: changed} if changed else {}


def from_extras(value: Any, *, messages: Sequence[Message], **known: Any) -> SFTRecord:
    """A record of `messages` with the columns that `extras` kept; `known` fields win.

    Raises:
        BadRowError: they do not hold what their columns hold.
    """
    return SFTRecord(tuple(messages), **kept_fields(value) | known)


def kept_fields(value: Any) -> JSON:
    """The fields of a record, beside messages and tools, that `extras` kept.

    Raises:
        BadRowError: they do not hold what their columns hold.
    """
    try:
        kept = decode_columns(object_of(value, KEY))
    except ColumnError as error:
        where = f"{KEY}.{error.column}"
        raise BadRowError(where, "BAD_VALUE", f"a kept field cannot be read: {error}") from error
    kept.pop("tools", None)
    return kept


def record_of(row: JSON, *, messages: Sequence[Message], columns: JSON, learned: JSON) -> SFTRecord:
    """The record of a row with `tools`: what its own fields say, and over it what `KEY` keeps.

    Args:
        row: of a file.
        messages: of the row.
        columns: column -> value, as the row's own fields say it.
        learned: fields that win over everything, as `learned_by` gives them.

    Raises:
        BadRowError: the tools or the kept columns are not what they should be.
    """
    fields = kept_fields({**columns, **object_of(row.get(KEY), KEY)})
    fields["tools"] = tools_of(row.get("tools"), "tools")
    return SFTRecord(tuple(messages), **fields | learned)


def noting(record: SFTRecord, *, name: str, own: JSON, said: JSON) -> SFTRecord:
    """The record with a row's own fields in `meta[name]`, unless the columns say the same."""
    return record if own == said else replace(record, meta={**record.meta, name: own})


def noted(record: SFTRecord, *, name: str, said: JSON) -> JSON:
    """The inverse of `noting`: a row's own fields."""
    own = record.meta.get(name)
    return dict(own) if isinstance(own, dict) else said


def kept_message(message: Message) -> JSON | None:
    """The message as JSON where its text alone would not give it back."""
    plain = message == Message(message.role, message_text(message))
    return None if plain else message.to_json()


def message_of(role: str, text: str, kept: Any) -> Message:
    """The message of a role and text; `kept` where it still says the same."""
    if isinstance(kept, Mapping):
        message = Message.from_json(dict(kept))
        if message.role == role and message_text(message) == text:
            return message
    return Message(role, text)


def learned_by(flags: Mapping[int, float] | None) -> JSON:
    """`supervise` and `weights` where flags of messages choose what is learned.

    Raises:
        BadRowError: the flags leave nothing to learn.
    """
    if flags is None:
        return {}
    if not flags:
        raise BadRowError("messages", "NOTHING_LEARNED", "every answer has weight 0")
    return {"supervise": tuple(flags), "weights": tuple(flags.values())}


def text_of(value: Any, field: str, *, optional: bool = False) -> str:
    """A text cell.

    Raises:
        BadRowError: it is missing (unless `optional`) or not text.
    """
    if value is None and optional:
        return ""
    if not isinstance(value, str):
        found = "nothing" if value is None else type(value).__name__
        raise BadRowError(field, "NO_TEXT", f"expected text, found {found}")
    return value


def tools_of(value: Any, field: str) -> tuple[JSON, ...] | None:
    """Tool schemas, given as a list or as JSON text; bare function schemas get their wrapper.

    Raises:
        BadRowError: they are not a list of objects.
    """
    if value is None or value == "":
        return None
    if isinstance(value, str):
        value = json_of(value, field)
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise BadRowError(field, "BAD_TYPE", "the tools are not a list of objects")
    wrapped = (t if "function" in t else {"type": "function", "function": t} for t in value)
    return tuple(wrapped) or None


def tools_text(tools: Sequence[JSON] | None) -> str | None:
    """Tool schemas as JSON text, None where there are none."""
    return None if tools is None else dump_json(list(tools))


def object_of(value: Any, field: str) -> JSON:
    """An object, given as one or as JSON text; nothing is an empty one.

    Raises:
        BadRowError: it is something else.
    """
    return {} if value is None else struct(value, field)
