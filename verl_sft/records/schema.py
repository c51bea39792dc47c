"""One record: a conversation as the model saw it, and which of its messages are learned.

`SFTRecord` is the contract between collecting and training; `COLUMNS` is how it lies in parquet.
Anything whose shape differs between rows is a JSON string there, because Arrow unifies structs and
would leak the keys of other rows into prompts as nulls.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from operator import attrgetter
from typing import Any

from verl_sft.types import JSON, Message

SCHEMA_VERSION = "1"
NOTE = "verl_sft_note"  # in `meta`: what reading decided where the row leaves it open; counted

# Column name -> Arrow type as text, in file order; `records/io.py` builds the schema from it.
COLUMNS: dict[str, str] = {
    "record_id": "string",
    "group_id": "string",
    "episode_id": "string",
    "step": "int32",
    "data_source": "string",
    "ability": "string",
    "messages": "list<struct<role: string, content: string>>",
    "messages_json": "string",
    "prompt_data": "struct<content: string>",
    "response_data": "struct<content: string>",
    "tools_json": "string",
    "supervise": "list<int32>",
    "weights": "list<float>",
    "sample_weight": "float",
    "success": "bool",
    "agent_success": "bool",
    "reward": "float",
    "action": "string",
    "action_valid": "bool",
    "env_name": "string",
    "task_id": "string",
    "task_type": "string",
    "seed": "int64",
    "agent_name": "string",
    "policy_name": "string",
    "turn_idx": "int32",
    "prompt_template": "string",
    "reward_model": "string",
    "extra_info": "string",
    "meta_json": "string",
}


@dataclass(frozen=True, slots=True)
class SFTRecord:
    """One training row.

    `supervise` holds the indices of the learned assistant messages (None: all of them), `weights`
    one weight for each of these (None: 1). `prompt` and `response` are the single-turn view: what
    the policy saw and said at this step. `source` says where the row came from (`file:row`).
    """

    messages: tuple[Message, ...]
    record_id: str = ""
    group_id: str = ""
    episode_id: str = ""
    step: int = 0
    prompt: str | None = None
    response: str | None = None
    tools: tuple[JSON, ...] | None = None
    supervise: tuple[int, ...] | None = None
    weights: tuple[float, ...] | None = None
    sample_weight: float = 1.0
    success: bool | None = None
    agent_success: bool | None = None
    reward: float | None = None
    action: str | None = None
    action_valid: bool | None = None
    data_source: str = "agent_sft_collection"
    ability: str = "agent"
    env_name: str = ""
    task_id: str = ""
    task_type: str = ""
    seed: int = 0
    agent_name: str = ""
    policy_name: str = ""
    turn_idx: int = 0
    prompt_template: str = ""
    reward_model: Mapping[str, Any] = field(default_factory=dict)
    extra_info: Mapping[str, Any] = field(default_factory=dict)
    meta: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""


def located(record: SFTRecord, *, source: str) -> SFTRecord:
    """The record with its place; `dataclasses.replace` takes three times as long for each row."""
    values: list[Any] = [*_ALL_BUT_SOURCE(record), source]
    return SFTRecord(*values)


_ALL_BUT_SOURCE = attrgetter(*[f.name for f in fields(SFTRecord)][:-1])
