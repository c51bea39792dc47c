"""UserRL: the reward caches of its evaluation, and RL parquet whose rows are prompts alone.

A cache is one object, `{env: {hash: {history, reward, data}}}`; each entry of `data` is an episode
whose answers are objects `{name, arguments}`: tool calls.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from verl_sft.records.build import opening_hash
from verl_sft.records.messages import check_learned, need_answer, parse_message, parse_messages
from verl_sft.records.parse import ReadOptions
from verl_sft.records.rows import float32
from verl_sft.records.schema import SFTRecord
from verl_sft.records.sources.base import SourceFormat
from verl_sft.records.sources.shared import KEY, added, extras, from_extras, object_of, tools_of
from verl_sft.records.values import BadRowError
from verl_sft.types import JSON, Message

_NAME = "userrl"  # in `meta`: what of an episode has no column
_EPISODE = {"history", "reward", "data"}
_NO_META = ("messages", "tools", KEY)  # of an episode's `data`


def _detect_cache(row: JSON) -> bool:
    entries = [e for env in row.values() if isinstance(env, dict) for e in env.values()]
    return bool(entries) and all(isinstance(e, dict) and e.keys() >= _EPISODE for e in entries)


def _read_cache(row: JSON, options: ReadOptions) -> Iterator[SFTRecord | BadRowError]:
    for env, entries in row.items():
        if not isinstance(entries, dict):
            yield BadRowError(env, "BAD_TYPE", "expected an object of episodes")
            continue
        for digest, value in entries.items():
            where = f"{env}.{digest}"
            try:
                entry = object_of(value, where)
                attempts = _list(entry.get("data"), f"{where}.data")
            except BadRowError as bad:
                yield bad
                continue
            for attempt in range(len(attempts)):
                try:
                    yield _episode(env, digest, attempt, entry)
                except BadRowError as bad:
                    yield bad


def _episode(env: str, digest: str, attempt: int, entry: JSON) -> SFTRecord:
    field = f"{env}.{digest}.data[{attempt}]"
    data = object_of(entry["data"][attempt], field)
    items = _list(data.get("messages"), f"{field}.messages")
    messages = [_message(item, f"{field}.messages", i) for i, item in enumerate(items)]
    need_answer(messages, f"{field}.messages")
    turns = _numbers(entry.get("reward"), attempt)
    rest = {k: v for k, v in data.items() if k not in _NO_META}
    record = SFTRecord(
        messages=tuple(messages),
        tools=tools_of(data.get("tools"), f"{field}.tools"),
        group_id=f"{env}:{digest}",
        episode_id=f"{env}:{digest}:{attempt}",
        task_id=digest,
        task_type=env,
        env_name=str(data.get("env_name") or env),
        reward=_total(turns, f"{env}.{digest}.reward[{attempt}]"),
        meta={
            _NAME: {**rest, "turn_rewards": turns, "history": _at(entry.get("history"), attempt)}
        },
    )
    if KEY not in data:
        return record
    kept = extras(record) | object_of(data[KEY], f"{field}.{KEY}")
    try:
        record = from_extras(kept, messages=messages, tools=record.tools)
        check_learned(messages, record.supervise, record.weights)
    except BadRowError as bad:
        raise BadRowError(f"{field}.{bad.field}", bad.code, bad.message, bad.fix) from bad
    return record


def _write_cache(record: SFTRecord) -> Iterable[JSON]:
    check_learned(record.messages, record.supervise, record.weights)
    own: JSON = {"env_name": record.env_name, "turn_rewards": []}
    if record.reward is not None:
        own["turn_rewards"] = [record.reward]
    if isinstance(record.meta.get(_NAME), dict):
        own = {k: v for k, v in record.meta[_NAME].items() if k not in _NO_META}
    history, turns = own.pop("history", None), own.pop("turn_rewards", [])
    data: JSON = {**own, "messages": [_entry(message) for message in record.messages]}
    if record.tools is not None:
        data["tools"] = list(record.tools)
    env = record.task_type or record.env_name or "other"
    digest = record.task_id or opening_hash(record.messages)
    entry: JSON = {"history": [history], "reward": [turns], "data": [data]}
    kept = added(record, read_back=_episode(env, digest, 0, entry))
    # In the whole file it may be another attempt than the first.
    data[KEY] = {**kept.get(KEY, {}), "episode_id": record.episode_id}
    return ({env: {digest: entry}},)


def _whole_cache(rows: Iterable[JSON]) -> JSON:
    """Rows of one episode each as one cache; the attempts at a task are in their order."""
    cache: JSON = {}
    for row in rows:
        for env, entries in row.items():
            for digest, entry in entries.items():
                found = cache.setdefault(env, {}).setdefault(digest, {n: [] for n in entry})
                for name, values in entry.items():
                    found[name] += values
    return cache


def _message(value: Any, field: str, index: int) -> Message:
    where = f"{field}[{index}]"
    entry = object_of(value, where)
    role, content = entry.get("role"), entry.get("content")
    if role == "assistant" and isinstance(content, dict):
        if not isinstance(content.get("name"), str):
            raise BadRowError(f"{where}.content", "BAD_CALL", "a call needs a name and arguments")
        return _call({"name": content["name"], "arguments": content.get("arguments", {})})
    return parse_message(entry, field, index)


def _entry(message: Message) -> JSON:
    """The inverse of `_message`: an answer that is one call and nothing else is its object."""
    call = message.tool_calls[0].get("function") if message.tool_calls else None
    if isinstance(call, dict) and list(call) == ["name", "arguments"] and message == _call(call):
        return {"role": "assistant", "content": call}
    return message.to_json()


def _call(function: JSON) -> Message:
    return Message("assistant", None, tool_calls=({"type": "function", "function": function},))


def _list(value: Any, field: str) -> list[Any]:
    if not isinstance(value, list):
        raise BadRowError(field, "NOT_A_LIST", f"expected a list, found {type(value).__name__}")
    return value


def _at(values: Any, index: int) -> Any:
    return values[index] if isinstance(values, list) and index < len(values) else None


def _numbers(values: Any, index: int) -> list[float]:
    found = _at(values, index)
    found = found if isinstance(found, list) else [found]
    return [float(v) for v in found if isinstance(v, int | float) and not isinstance(v, bool)]


def _total(turns: list[float], field: str) -> float | None:
    try:
        return float32(sum(turns)) if turns else None
    except OverflowError:
        raise BadRowError(field, "BAD_VALUE", "too large a number") from None


USERRL = SourceFormat(
    "userrl", "UserRL reward caches: episodes by environment",
    _detect_cache, _read_cache, _write_cache, ".json", whole=_whole_cache,
)  # fmt: skip


def _detect_prompts(row: JSON) -> bool:
    answers = {"response", "messages", "response_data", "output"}
    return isinstance(row.get("prompt"), list) and not answers & row.keys()


def _read_prompts(row: JSON, options: ReadOptions) -> Iterable[SFTRecord]:
    messages, _ = parse_messages(row.get("prompt"), "prompt")
    known: JSON = {"supervise": []}  # nothing to learn: a prompt is for collecting or RL
    for name in ("data_source", "ability"):
        if isinstance(row.get(name), str):
            known[name] = row[name]
    record = from_extras({**known, **object_of(row.get(KEY), KEY)}, messages=messages)
    reward_model = object_of(row.get("reward_model"), "reward_model")
    extra_info = object_of(row.get("extra_info"), "extra_info")
    return (replace(record, reward_model=reward_model, extra_info=extra_info),)


def _write_prompts(record: SFTRecord) -> Iterable[JSON]:
    first = next((i for i, m in enumerate(record.messages) if m.role == "assistant"), None)
    if first is not None:
        raise BadRowError("messages", "HAS_ANSWERS", "a prompt row holds no answers")
    row: JSON = {
        "data_source": record.data_source,
        "prompt": [m.to_json() for m in record.messages],
        "ability": record.ability,
        "reward_model": dict(record.reward_model),
        "extra_info": dict(record.extra_info),
    }
    (again,) = _read_prompts(row, ReadOptions(multiturn=True))
    return (row | added(record, read_back=again),)


VERL_RL = SourceFormat(
    "verl_rl", "RL parquet of verl and UserRL: prompts without answers",
    _detect_prompts, _read_prompts, _write_prompts, ".parquet",
)  # fmt: skip
