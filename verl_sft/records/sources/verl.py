"""verl's rows: a list of messages, or a prompt and a response, in any of its encodings.

Nulls that Arrow invented by unifying structs are gone already; others are the writer's and stay.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from verl_sft.records.messages import check_learned, parse_messages
from verl_sft.records.parse import ReadOptions
from verl_sft.records.schema import SFTRecord
from verl_sft.records.sources.base import SourceFormat
from verl_sft.records.values import BadRowError, as_float, sequence, struct, weight_of
from verl_sft.types import JSON, Message


def _detect(row: JSON) -> bool:
    return "messages" in row or {"prompt", "response"} <= row.keys()


def _read(row: JSON, options: ReadOptions) -> Iterable[SFTRecord]:
    known: JSON = _scalars(row)
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
    check_learned(messages, known.get("supervise"), known.get("weights"))
    tools = row.get(options.tools_key)
    if tools is not None:
        items = sequence(tools, options.tools_key)
        known["tools"] = tuple(struct(t, options.tools_key) for t in items) or None
    thinking = row.get(options.enable_thinking_key)
    if thinking is not None:
        known["meta"] = {"enable_thinking": _flag(thinking, options.enable_thinking_key)}
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


VERL = SourceFormat("verl", "verl: a list of messages, or prompt and response", _detect, _read)
