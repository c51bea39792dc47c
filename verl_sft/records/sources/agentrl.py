"""AgentRL's RecordData and DBRecordData: messages, and maps from message index to figures.

The learned messages are the keys of `advantages`. Maps come as objects with text keys, as lists of
pairs (Arrow maps) or as JSON text. A row without advantages teaches all its answers, and says so
in `meta`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from verl_sft.records.build import opening_hash
from verl_sft.records.messages import MESSAGE_KEYS, need_answer, parse_messages
from verl_sft.records.parse import ReadOptions
from verl_sft.records.rows import float32
from verl_sft.records.schema import NOTE, SFTRecord
from verl_sft.records.sources.base import SourceFormat
from verl_sft.records.sources.shared import (
    KEY,
    added,
    kept_fields,
    noted,
    object_of,
    tools_of,
)
from verl_sft.records.values import BadRowError, json_of, sequence
from verl_sft.safe_io import dump_json
from verl_sft.types import JSON, Message

NO_ADVANTAGES = "no advantages: every answer is learned"
_NAME = "agentrl"  # in `meta`: the fields of the row, where the columns do not say them
_MAPS = ("scores", "advantages", "created_at_step", "logprobs")
_REST = ("reward", "step", "record_id", "split", "fetched", "_id")
_SAID = {*_MAPS, "reward", "step", "record_id"}  # fields that columns can say
_FIELDS = "message_fields"  # in `_NAME`: what a message holds that has no field of its own
_WHOLE, _NUMBER = (int,), (int, float)


def _detect(row: JSON) -> bool:
    return "messages" in row and (
        "advantages" in row or {"scores", "created_at_step"} <= row.keys()
    )


def _read(row: JSON, options: ReadOptions) -> Iterable[SFTRecord]:
    entries = [_modern(entry) for entry in sequence(row.get("messages"), "messages")]
    messages, flags = parse_messages(entries, "messages")
    answers = _answers(messages)
    need_answer(messages, "messages")
    own = _own_fields(row, entries)
    kept = object_of(row.get(KEY), KEY)
    advantages = _checked(own.get("advantages") or {}, messages)
    learned = _learned(advantages, flags, kept, answers=answers, options=options)
    # What is learned goes the way of the kept columns, which is checked.
    fields = kept_fields({**_columns(own, messages), **kept, **learned})
    fields["tools"] = tools_of(row.get("tools"), "tools")
    meta = fields.pop("meta", {})
    if own.keys() != _SAID or own != _own(answers, fields):
        meta = {**meta, _NAME: own}
    if not advantages and flags is None:
        meta = {**meta, NOTE: NO_ADVANTAGES}
    return (SFTRecord(messages, meta=meta, **fields),)


def _write(record: SFTRecord) -> Iterable[JSON]:
    learned = _answers(record.messages) if record.supervise is None else record.supervise
    if not learned:
        raise BadRowError("supervise", "NOTHING_LEARNED", "the record teaches nothing")
    said = _own(
        learned,
        {"supervise": learned, "reward": record.reward, "episode_id": record.episode_id},
    )
    own = noted(record, name=_NAME, said=said)
    given = own.get("advantages")
    if given or record.supervise is not None:  # the map is what AgentRL learns by
        before = given if isinstance(given, dict) else {}
        own["advantages"] = {str(i): before.get(str(i), 1.0) for i in sorted(learned)}
    messages = [m.to_json() for m in record.messages]
    for index, more in object_of(own.pop(_FIELDS, None), _FIELDS).items():
        if index.isdecimal() and int(index) < len(messages):
            messages[int(index)] = {**more, **messages[int(index)]}
    tools = None if record.tools is None else list(record.tools)
    row: JSON = {"messages": messages, "tools": tools, **own}
    (again,) = _read(row, ReadOptions(multiturn=True))
    meta = again.meta
    if _NAME in meta and meta[_NAME] == record.meta.get(_NAME):  # the row itself says it
        rest = {k: v for k, v in record.meta.items() if k != _NAME}
        record = replace(record, meta=rest)
        again = replace(again, meta={k: v for k, v in meta.items() if k != _NAME})
    return (row | added(record, read_back=again),)


def _modern(entry: Any) -> Any:
    """A message with OpenAI's old `function_call` as the tool call that it is."""
    if type(entry) is not dict or "function_call" not in entry:
        return entry
    old = entry["function_call"]
    if not isinstance(old, dict) or entry.get("tool_calls"):
        return entry
    rest = {k: v for k, v in entry.items() if k != "function_call"}
    return rest | {"tool_calls": [{"type": "function", "function": old}]}


def _own_fields(row: JSON, entries: Sequence[Any]) -> JSON:
    """The fields of the row as JSON: maps in the order of their keys, which are text."""
    own: JSON = {}
    size = len(entries)
    for name in _MAPS:
        if name in row:
            own[name] = _in_order(row[name], name, size=size)
    for name, kinds in (("scores", _NUMBER), ("created_at_step", _WHOLE)):
        for key, value in (own.get(name) or {}).items():
            if value is not None and not _is_number(value, kinds):
                text = f"{value!r:.40} is not a finite number"
                raise BadRowError(f"{name}.{key}", "BAD_VALUE", text)
    own |= {name: row[name] for name in _REST if name in row}
    for name, kinds in (("reward", _NUMBER), ("step", _WHOLE)):
        if own.get(name) is not None and not _is_number(own[name], kinds):
            raise BadRowError(name, "BAD_VALUE", f"{own[name]!r:.40} is not a number")
    more = {
        str(i): {k: v for k, v in entry.items() if k not in MESSAGE_KEYS and v is not None}
        for i, entry in enumerate(entries)
        if isinstance(entry, dict) and not entry.keys() <= MESSAGE_KEYS
    }
    logprobs = own.get("logprobs")
    if more or (logprobs and any(value is not None for value in logprobs.values())):
        try:
            dump_json([logprobs, more])
        except ValueError as error:
            raise BadRowError("logprobs", "BAD_VALUE", f"not JSON: {error}") from error
    if more := {i: fields for i, fields in more.items() if fields}:
        own[_FIELDS] = more
    return own


def _in_order(value: Any, field: str, *, size: int) -> JSON | None:
    """A map from message index to anything as an object, its keys as text in their order."""
    if type(value) is dict and value.keys() <= _indices(size):  # as AgentRL writes it
        return {key: value[key] for key in sorted(value, key=int)} if len(value) > 1 else value
    found = index_map(value, field, size=size)
    return found if found is None else {str(i): found[i] for i in sorted(found)}


@functools.lru_cache(maxsize=1024)
def _indices(size: int) -> frozenset[str]:
    return frozenset(map(str, range(size)))


def index_map(value: Any, field: str, *, size: int) -> dict[int, Any] | None:
    """A map from message index to anything, in any encoding; None stays None.

    Raises:
        BadRowError: it is no map, or a key is not the index of one of `size` messages.
    """
    if isinstance(value, str):
        value = json_of(value, field)
    if value is None:
        return None
    pairs = value.items() if isinstance(value, dict) else _pairs(value, field)
    found: dict[int, Any] = {}
    for key, item in pairs:
        where = f"{field}.{key}"
        if isinstance(key, str) and key.isascii() and key.isdecimal():
            key = int(key[:20])  # a longer number is out of range all the same
        if not _is_number(key, _WHOLE):
            raise BadRowError(where, "BAD_INDEX", f"{key!r:.40} is not the index of a message")
        if not 0 <= key < size:
            raise BadRowError(where, "BAD_INDEX", f"there are {size} messages, from 0")
        if key in found:
            raise BadRowError(where, "REPEATED_INDEX", f"index {key} stands there twice")
        found[key] = item
    return found


def _pairs(value: Any, field: str) -> list[tuple[Any, Any]]:
    """An Arrow map: a list of [key, value], or of {key, value}."""
    found = []
    for pair in value if isinstance(value, list) else [value]:
        if isinstance(pair, dict) and "key" in pair and pair.keys() <= {"key", "value"}:
            found.append((pair["key"], pair.get("value")))
        elif isinstance(pair, list) and len(pair) == 2:
            found.append((pair[0], pair[1]))
        else:
            kind = type(value).__name__
            raise BadRowError(field, "NOT_A_MAP", f"expected a map by message index, found {kind}")
    return found


def _checked(advantages: Mapping[str, Any], messages: Sequence[Message]) -> dict[int, float]:
    found: dict[int, float] = {}
    for key, value in advantages.items():
        where, index = f"advantages.{key}", int(key)
        if not _is_number(value, _NUMBER):
            raise BadRowError(where, "BAD_VALUE", f"{value!r:.40} is not a finite number")
        if messages[index].role != "assistant":
            text = f"message {index} is of role '{messages[index].role}', which is not learned"
            raise BadRowError(where, "NOT_ASSISTANT", text)
        found[index] = float(value)
    return found


def _learned(
    advantages: Mapping[int, float],
    flags: Mapping[int, float] | None,
    kept: JSON,
    *,
    answers: Sequence[int],
    options: ReadOptions,
) -> JSON:
    """`supervise` and `weights`: by advantages and flags; as kept where that says the same."""
    chosen = [i for i in sorted(advantages) or answers if flags is None or i in flags]
    supervise = kept.get("supervise", chosen if advantages or flags is not None else None)
    weights = kept.get("weights")
    order = answers if supervise is None else supervise
    if not _is_order_of(order, chosen):  # the map was edited: it is what counts
        supervise, order, weights = chosen, chosen, None
    if weights is None and flags is not None:
        values = [flags[i] for i in order]
        weights = None if all(v == 1 for v in values) else values
    elif not isinstance(weights, list) or len(weights) != len(order):
        weights = None
    low = options.minimal_advantage
    small = {i for i, a in advantages.items() if low is not None and a < low}
    small |= {i for i, a in advantages.items() if options.drop_zero_advantage and a == 0}
    left = [n for n, i in enumerate(order) if i not in small]
    if not left:
        fix = "Set data.agentrl.drop_zero_advantage=false or data.agentrl.minimal_advantage=null"
        raise BadRowError("advantages", "SMALL_ADVANTAGE", "no answer is left to learn", fix)
    if len(left) < len(order):
        supervise = [order[n] for n in left]
        weights = None if weights is None else [weights[n] for n in left]
    return {"supervise": supervise, "weights": weights}


def _is_order_of(value: Any, chosen: Sequence[int]) -> bool:
    return (
        isinstance(value, list)
        and all(type(i) is int for i in value)
        and sorted(value) == list(chosen)
    )


def _columns(own: JSON, messages: Sequence[Message]) -> JSON:
    """The columns that the fields say: a record of AgentRL is a trajectory, ours an episode."""
    found: JSON = {"group_id": opening_hash(messages)}
    if own.get("reward") is not None:
        found["reward"] = float(own["reward"])
    if own.get("record_id") is not None:
        found["episode_id"] = str(own["record_id"])
    return found


def _own(answers: Sequence[int], fields: JSON) -> JSON:
    """The fields of a row as far as the columns of a record say them."""
    learned = sorted(fields.get("supervise") or answers)
    reward = fields.get("reward")
    score = 1.0 if reward is None else float32(reward)
    return {
        "scores": {str(i): score for i in learned},
        "advantages": {str(i): 1.0 for i in learned},
        "created_at_step": {str(i): 0 for i in learned},
        "logprobs": {str(i): None for i in learned},
        "reward": score,
        "step": -1,
        "record_id": fields.get("episode_id") or None,
    }


def _answers(messages: Sequence[Message]) -> list[int]:
    return [i for i, m in enumerate(messages) if m.role == "assistant"]


def _is_number(value: Any, kinds: tuple[type, ...]) -> bool:
    return type(value) in kinds and math.isfinite(value)


AGENTRL = SourceFormat(
    "agentrl", "AgentRL RecordData: messages and maps by message index", _detect, _read, _write
)
