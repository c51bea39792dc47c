"""UserRL: the reward caches of its evaluation, and RL parquet whose rows are prompts alone.

A cache is one object, `{env: {hash: {history, reward, data}}}`; each entry of `data` is an episode
whose answers are objects `{name, arguments}`: tool calls.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from verl_sft.records.messages import need_answer, parse_message, parse_messages
from verl_sft.records.parse import ReadOptions
from verl_sft.records.schema import SFTRecord
from verl_sft.records.sources.base import SourceFormat
from verl_sft.records.sources.shared import KEY, added, from_extras, object_of, tools_of
from verl_sft.records.values import BadRowError
from verl_sft.types import JSON, Message

_EPISODE = {"history", "reward", "data"}


def _detect_cache(row: JSON) -> bool:
    entries = [e for env in row.values() if isinstance(env, dict) for e in env.values()]
    return bool(entries) and all(isinstance(e, dict) and e.keys() >= _EPISODE for e in entries)


def _read_cache(row: JSON, options: ReadOptions) -> Iterator[SFTRecord | BadRowError]:
    for env, entries in row.items():
        if not isinstance(entries, dict):
            yield BadRowError(env, "BAD_TYPE", "expected an object of episodes")
            continue
        for digest, entry in entries.items():
            where = f"{env}.{digest}"
            try:
                yield from _episodes(env, digest, object_of(entry, where), where, options)
            except BadRowError as bad:
                yield bad


def _episodes(
    env: str, digest: str, entry: JSON, where: str, options: ReadOptions
) -> Iterator[SFTRecord]:
    rewards, histories = entry.get("reward"), entry.get("history")
    for attempt, value in enumerate(_list(entry.get("data"), f"{where}.data")):
        field = f"{where}.data[{attempt}]"
        data = object_of(value, field)
        items = _list(data.get("messages"), f"{field}.messages")
        messages = [_message(item, f"{field}.messages", i) for i, item in enumerate(items)]
        need_answer(messages, f"{field}.messages")
        turns = _numbers(rewards, attempt)
        rest = {k: v for k, v in data.items() if k not in ("messages", "tools")}
        yield SFTRecord(
            messages=tuple(messages),
            tools=tools_of(data.get("tools"), f"{field}.tools"),
            group_id=f"{env}:{digest}",
            episode_id=f"{env}:{digest}:{attempt}",
            task_id=digest,
            task_type=env,
            env_name=str(data.get("env_name") or env),
            reward=sum(turns) if turns else None,
            meta={"userrl": {**rest, "turn_rewards": turns, "history": _at(histories, attempt)}},
        )


def _message(value: Any, field: str, index: int) -> Message:
    where = f"{field}[{index}]"
    entry = object_of(value, where)
    role, content = entry.get("role"), entry.get("content")
    if role == "assistant" and isinstance(content, dict):
        if not isinstance(content.get("name"), str):
            raise BadRowError(f"{where}.content", "BAD_CALL", "a call needs a name and arguments")
        call = {"name": content["name"], "arguments": content.get("arguments", {})}
        return Message("assistant", None, tool_calls=({"type": "function", "function": call},))
    return parse_message(entry, field, index)


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


USERRL = SourceFormat(
    "userrl", "UserRL reward caches: episodes by environment", _detect_cache, _read_cache
)


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
