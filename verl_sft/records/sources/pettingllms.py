"""PettingLLMs rows: one pair of messages of one agent's turn, and `metadata` about it."""

from __future__ import annotations

from collections.abc import Iterable

from verl_sft.records.messages import need_answer, parse_messages
from verl_sft.records.parse import ReadOptions
from verl_sft.records.schema import SFTRecord
from verl_sft.records.sources.base import SourceFormat
from verl_sft.records.sources.shared import (
    added,
    learned_by,
    noted,
    noting,
    object_of,
    record_of,
)
from verl_sft.types import JSON

_NAME = "pettingllms"  # in `meta`: the metadata that has no column
_TEXTS = {"agent_name": "agent_name", "policy_name": "policy_name", "env_name": "env_name"}


def _detect(row: JSON) -> bool:
    metadata = row.get("metadata")
    return "messages" in row and isinstance(metadata, dict) and "agent_name" in metadata


def _read(row: JSON, options: ReadOptions) -> Iterable[SFTRecord]:
    messages, flags = parse_messages(row.get("messages"), "messages")
    need_answer(messages, "messages")
    metadata = object_of(row.get("metadata"), "metadata")
    columns = _columns(metadata)
    texts = [m.content for m in messages]
    if [m.role for m in messages] == ["user", "assistant"] and all(
        isinstance(t, str) for t in texts
    ):
        columns["prompt_data"], columns["response_data"] = texts
    record = record_of(row, messages=messages, columns=columns, learned=learned_by(flags))
    return (noting(record, name=_NAME, own=metadata, said=_metadata(record)),)


def _write(record: SFTRecord) -> Iterable[JSON]:
    metadata = noted(record, name=_NAME, said=_metadata(record))
    row: JSON = {"messages": [m.to_json() for m in record.messages], "metadata": metadata}
    if record.tools is not None:
        row["tools"] = list(record.tools)
    (again,) = _read(row, ReadOptions(multiturn=True))
    return (row | added(record, read_back=again),)


def _columns(metadata: JSON) -> JSON:
    """The columns that the metadata says; values of another type stay in `meta` alone."""
    found: JSON = {
        column: metadata[name]
        for column, name in _TEXTS.items()
        if isinstance(metadata.get(name), str)
    }
    if isinstance(success := metadata.get("env_success"), bool):
        found["success"] = success
    if isinstance(reward := metadata.get("reward"), int | float) and not isinstance(reward, bool):
        found["reward"] = float(reward)
    if isinstance(turn := metadata.get("turn_idx"), int):
        found["turn_idx"] = turn
    if "env_idx" in metadata:
        task = f"{metadata.get('env_name', '')}:{metadata['env_idx']}"
        found["group_id"] = found["task_id"] = task
    return found


def _metadata(record: SFTRecord) -> JSON:
    """The metadata as far as the columns of a record say it."""
    found: JSON = {
        "agent_name": record.agent_name,
        "policy_name": record.policy_name,
        "env_name": record.env_name,
        "turn_idx": record.turn_idx,
    }
    if record.reward is not None:
        found["reward"] = record.reward
    if record.success is not None:
        found["env_success"] = record.success
    return found


PETTINGLLMS = SourceFormat(
    "pettingllms", "PettingLLMs: messages and metadata of one agent's turn", _detect, _read, _write
)
