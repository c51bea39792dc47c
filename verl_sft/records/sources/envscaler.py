"""EnvScaler trajectories: `messages`, `tools` and `task_info`, the first two as JSON text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

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
    tools_text,
)
from verl_sft.safe_io import dump_json
from verl_sft.types import JSON

_NAME = "envscaler"  # in `meta`: what of the row has no column
_FIELDS = ("traj_type", "task_info", "user_messages", "steps")


def _detect(row: JSON) -> bool:
    return {"traj_type", "task_info", "messages"} <= row.keys()


def _read(row: JSON, options: ReadOptions) -> Iterable[SFTRecord]:
    messages, flags = parse_messages(row.get("messages"), "messages")
    need_answer(messages, "messages")
    own = {name: row.get(name) for name in _FIELDS}
    own["task_info"] = object_of(own["task_info"], "task_info")
    record = record_of(row, messages=messages, columns=_columns(own), learned=learned_by(flags))
    return (noting(record, name=_NAME, own=own, said=_own(record)),)


def _write(record: SFTRecord) -> Iterable[JSON]:
    row: JSON = {
        **noted(record, name=_NAME, said=_own(record)),
        "messages": dump_json([m.to_json() for m in record.messages]),
        "tools": tools_text(record.tools),
    }
    (again,) = _read(row, ReadOptions(multiturn=True))
    return (row | added(record, read_back=again),)


def _columns(own: JSON) -> JSON:
    """The columns that `task_info` and `traj_type` say."""
    info: dict[str, Any] = own["task_info"]
    env, task = str(info.get("env_id") or ""), str(info.get("task_id") or "")
    return {
        "group_id": f"{env}:{task}" if env or task else "",
        "task_id": task,
        "task_type": str(own.get("traj_type") or ""),
        "env_name": env,
    }


def _own(record: SFTRecord) -> JSON:
    """The fields of a trajectory as far as the columns of a record say them."""
    asked = next((m.content for m in record.messages if m.role == "user"), "")
    return {
        "traj_type": record.task_type,
        "task_info": {"env_id": record.env_name, "task_id": record.task_id, "task": asked},
        "user_messages": "null",
        "steps": sum(m.role == "assistant" for m in record.messages),
    }


ENVSCALER = SourceFormat(
    "envscaler", "EnvScaler: messages and tools as JSON text", _detect, _read, _write, ".json"
)
