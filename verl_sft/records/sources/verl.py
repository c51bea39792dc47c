"""verl's rows: a list of messages, or a prompt and a response, in any of its encodings.

Nulls that Arrow invented by unifying structs are gone already; others are the writer's and stay.
What is written is what verl's data sets read: texts in structs of role and content, with thoughts
and calls in their tags, since keys that only some messages have would reach templates as nulls.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from verl_sft.records.messages import check_learned, parse_messages
from verl_sft.records.parse import ReadOptions
from verl_sft.records.rows import message_text
from verl_sft.records.schema import SFTRecord
from verl_sft.records.sources.base import SourceFormat
from verl_sft.records.sources.shared import KEY, added, kept_fields, message_of, object_of
from verl_sft.records.values import BadRowError, as_float, sequence, struct, weight_of
from verl_sft.safe_io import content_hash
from verl_sft.types import JSON, Message


def _detect(row: JSON) -> bool:
    return "messages" in row or {"prompt", "response"} <= row.keys()


def _read(row: JSON, options: ReadOptions) -> Iterable[SFTRecord]:
    known: JSON = _scalars(row)
    kept = object_of(row.get(KEY), KEY)
    if options.multiturn:
        messages, weights = parse_messages(row.get(options.messages_key), options.messages_key)
    else:
        messages, known["prompt"], known["response"] = _pair(row, options)
        weights = None
    supervise = row.get("supervise")
    if supervise is not None:
        known["supervise"] = tuple(_index(i) for i in sequence(supervise, "supervise"))
        if (given := row.get("weights")) is not None:
            values = sequence(given, "weights")
            known["weights"] = tuple(weight_of(v, "weights") for v in values)
    elif weights is not None:
        known["supervise"] = tuple(weights)
        numbers = tuple(weights.values())
        known["weights"] = None if all(v == 1 for v in numbers) else numbers
    elif not options.multiturn:
        known["supervise"] = (len(messages) - 1,)
    if kept:
        messages = _as_kept(messages, kept, pair=not options.multiturn)
        for column in [c for c, value in kept.items() if value is None]:
            known.pop({"prompt_data": "prompt", "response_data": "response"}.get(column, column), 0)
        known |= kept_fields(kept)
    check_learned(messages, known.get("supervise"), known.get("weights"))
    tools = row.get(options.tools_key)
    if tools is not None:
        items = sequence(tools, options.tools_key)
        known["tools"] = tuple(struct(t, options.tools_key) for t in items) or None
    thinking = row.get(options.enable_thinking_key)
    if thinking is not None:
        flag = _flag(thinking, options.enable_thinking_key)
        known["meta"] = {**known.get("meta", {}), "enable_thinking": flag}
    return (SFTRecord(messages=messages, **known),)


def _pair(row: JSON, options: ReadOptions) -> tuple[tuple[Message, ...], Any, str]:
    prompt = _walk(row.get(options.prompt_key), options.prompt_key, options.prompt_dict_keys)
    answer = _walk(row.get(options.response_key), options.response_key, options.response_dict_keys)
    if isinstance(answer, list) and answer:
        answer = struct(answer[-1], options.response_key).get("content")
    if not isinstance(answer, str):
        raise BadRowError(options.response_key, "NO_TEXT", "the response is not text")
    last = Message(role="assistant", content=answer)
    if isinstance(prompt, str):
        return (Message(role="user", content=prompt), last), prompt, answer
    if isinstance(prompt, list):
        before, _ = parse_messages(prompt, options.prompt_key)
        only = before[0].content if len(before) == 1 and before[0].role == "user" else None
        return (*before, last), only if isinstance(only, str) else None, answer
    raise BadRowError(options.prompt_key, "NO_TEXT", "the prompt is not text")


def _walk(value: Any, field: str, path: Sequence[str] | None) -> Any:
    """The text (or list of messages) at the end of `path` inside a struct column."""
    if path is None:
        path = ("content",) if isinstance(value, dict) else ()
    for key in path:
        if not isinstance(value, dict) or key not in value:
            there = ", ".join(value) if isinstance(value, dict) else type(value).__name__
            name = field.split("_")[0]
            fix = f"There is: {there}. Set data.{name}_dict_keys to a path that exists"
            raise BadRowError(field, "NO_KEY", f"no key '{key}' in the column", fix)
        value = value[key]
    return value


def _scalars(row: JSON) -> JSON:
    """Columns that mean the same everywhere; a value of another type is someone else's column."""
    known: JSON = {}
    for name in ("reward_model", "extra_info"):
        if isinstance(value := row.get(name), dict):
            known[name] = value
    texts = ("data_source", "ability", "group_id", "episode_id", "task_id", "task_type", "env_name")
    for names, kind in ((texts, str), (("success", "agent_success"), bool)):
        for name in names:
            if isinstance(value := row.get(name), kind):
                known[name] = value
    reward = row.get("reward")
    if isinstance(reward, int | float) and not math.isnan(reward := as_float(reward, "reward")):
        known["reward"] = reward
    if row.get("sample_weight") is not None:
        known["sample_weight"] = weight_of(row["sample_weight"], "sample_weight")
    return known


def _index(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise BadRowError("supervise", "BAD_INDEX", f"{value!r:.40} is not an index")
    return value


def _flag(value: Any, field: str) -> bool:
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if isinstance(value, bool) or value in (0, 1):
        return bool(value)
    raise BadRowError(field, "BAD_TYPE", f"{value!r:.40} is neither true nor false")


def _as_kept(messages: Sequence[Message], kept: JSON, *, pair: bool) -> tuple[Message, ...]:
    """The kept messages, or those of the row where its texts are others by now."""
    before = kept.get("messages")
    if not isinstance(before, list) or not all(isinstance(m, dict) for m in before):
        return tuple(messages)
    if pair:  # a windowed prompt is not the chat that is kept
        same = kept.get(_OF) == content_hash([message_text(m) for m in messages])
        return tuple(map(Message.from_json, before)) if same else tuple(messages)
    if len(before) != len(messages):
        return tuple(messages)
    pairs = zip(messages, before, strict=True)
    return tuple(message_of(m.role, message_text(m), k) for m, k in pairs)


def _write(record: SFTRecord) -> Iterable[JSON]:
    answers = [i for i, m in enumerate(record.messages) if m.role == "assistant"]
    _check_holdable(
        record, all_learned=record.supervise in (None, tuple(answers)) and answers != []
    )
    row: JSON = {"messages": [_view(m) for m in record.messages]}
    if record.tools is not None:
        row["tools"] = list(record.tools)
    if isinstance(thinking := record.meta.get("enable_thinking"), bool):
        row["enable_thinking"] = thinking
    return (_with_rest(row, record, ReadOptions(multiturn=True)),)


def _write_pair(record: SFTRecord) -> Iterable[JSON]:
    learned, roles = record.supervise, [m.role for m in record.messages]
    last = len(roles) - 1
    _check_holdable(
        record, all_learned=learned == (last,) or (not learned and roles.count("assistant") == 1)
    )
    prompt, response = record.prompt, record.response
    if prompt is None or response is None:
        if roles != ["user", "assistant"]:
            text = "verl's pairs are one user text and one answer"
            raise BadRowError("messages", "NOT_A_PAIR", text, "Convert to verl instead")
        prompt, response = map(message_text, record.messages)
    if record.tools is not None:
        raise BadRowError("tools", "HAS_TOOLS", "verl's pairs have no tools", "Convert to verl")
    _encodable(prompt, "prompt")
    _encodable(response, "response")
    return (_with_rest({"prompt": prompt, "response": response}, record, _PAIR_OPTIONS),)


def _check_holdable(record: SFTRecord, *, all_learned: bool) -> None:
    """Raise for what verl would learn otherwise than the record says."""
    fix = "Convert with view=per_turn to=verl_pairs, or to another format"
    if not all_learned:
        raise BadRowError("supervise", "NOT_ALL_LEARNED", "verl learns every answer of a row", fix)
    if any(w != 1 for w in (*(record.weights or ()), record.sample_weight)):
        raise BadRowError("weights", "HAS_WEIGHTS", "verl's rows have no weights", fix)


def _view(message: Message) -> JSON:
    text = message_text(message)
    _encodable(text, "messages")
    return {"role": message.role, "content": text}


def _encodable(text: str, field: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRowError(field, "NOT_STORABLE", f"a lone surrogate: {error.reason}") from error


def _with_rest(row: JSON, record: SFTRecord, options: ReadOptions) -> JSON:
    """The row with verl's other columns, and beside them what they do not say."""
    row |= {"data_source": record.data_source, "ability": record.ability}
    row |= {"reward_model": dict(record.reward_model), "extra_info": dict(record.extra_info)}
    (again,) = _read(row, options)
    more: JSON = added(record, read_back=again).get(KEY, {})
    if again.messages != record.messages:
        more["messages"] = [m.to_json() for m in record.messages]
        more[_OF] = content_hash([message_text(m) for m in again.messages])
    return row | ({KEY: more} if more else {})


_OF = "of"  # in `KEY`: hash of the texts that the kept messages belong to
_PAIR_OPTIONS = ReadOptions(prompt_key="prompt", response_key="response")
_PAIR_KEYS = (("prompt", "response"), ("question", "answer"))


def _detect_pair(row: JSON) -> bool:
    return "messages" not in row and any(row.keys() >= set(pair) for pair in _PAIR_KEYS)


def _read_pair(row: JSON, options: ReadOptions) -> Iterable[SFTRecord]:
    names = next((pair for pair in _PAIR_KEYS if row.keys() >= set(pair)), _PAIR_KEYS[0])
    asked = replace(options, multiturn=False, prompt_key=names[0], response_key=names[1])
    return _read(row, asked)


VERL = SourceFormat(
    "verl", "verl: a list of messages, or prompt and response", _detect, _read, _write, ".parquet",
    ("messages", "tools"),
)  # fmt: skip
VERL_PAIRS = SourceFormat(
    "verl_pairs", "verl: columns prompt and response", _detect_pair, _read_pair, _write_pair,
    ".parquet",
)  # fmt: skip
