"""EnvScaler and PettingLLMs rows: every field kept, round trips, damage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given

from tests.chat_records import records
from verl_sft.records.parse import ReadOptions
from verl_sft.records.read import find_format, read_records
from verl_sft.records.schema import SFTRecord
from verl_sft.records.values import BadRowError
from verl_sft.types import Message

CALL = {"id": "c1", "type": "function", "function": {"name": "get_order", "arguments": "{}"}}
ENVSCALER = {
    "traj_type": "non_conv",
    "task_info": {"env_id": "e7", "task_id": "t1", "task": "cancel order 3"},
    "tools": json.dumps([{"type": "function", "function": {"name": "get_order"}}]),
    "messages": json.dumps(
        [
            {"role": "user", "content": "cancel order 3"},
            {
                "role": "assistant",
                "content": "",
                "reasoning_content": "look first",
                "tool_calls": [CALL],
            },
            {"role": "tool", "tool_call_id": "c1", "name": "get_order", "content": "open"},
            {"role": "assistant", "content": "Task Completed", "reasoning_content": "done"},
        ]
    ),
    "user_messages": "null",
    "steps": 4,
}
PETTING = {
    "messages": [
        {"role": "user", "content": "Problem: add two ints"},
        {"role": "assistant", "content": "**Code:** ..."},
    ],
    "metadata": {
        "agent_name": "code_generator",
        "policy_name": "code_generator_model",
        "reward": 1.0,
        "env_success": True,
        "env_name": "code_env",
        "env_idx": 0,
        "rollout_idx": 0,
        "turn_idx": 0,
        "agent_idx": 0,
    },
}


def read(name: str, row: dict[str, Any], **options: Any) -> SFTRecord:
    (record,) = find_format(name).read(row, ReadOptions(multiturn=True, **options))
    return record


def write(name: str, record: SFTRecord) -> dict[str, Any]:
    target = find_format(name)
    assert target.write is not None
    (row,) = target.write(record)
    found: dict[str, Any] = json.loads(json.dumps(row))
    return found


def test_envscaler_messages_keep_their_structure(tmp_path: Path) -> None:
    """No text round trip: thoughts, calls and results stay fields; the columns say the task."""
    path = tmp_path / "traj.json"
    path.write_text(json.dumps([ENVSCALER]))
    (record,) = read_records(path)
    assert record.messages[1].reasoning_content == "look first"
    assert record.messages[1].tool_calls == (CALL,)
    assert record.messages[2].tool_call_id == "c1" and record.messages[2].name == "get_order"
    assert (record.task_id, record.env_name, record.task_type) == ("t1", "e7", "non_conv")
    assert record.group_id == "e7:t1" and record.supervise is None
    assert write("envscaler", record) | {"messages": 0, "tools": 0} == {
        **ENVSCALER,
        "messages": 0,
        "tools": 0,
    }


def test_pettingllms_metadata_fills_columns_and_never_overrides_them(tmp_path: Path) -> None:
    """Agent, policy, reward and success become columns; the rest stays in `meta`."""
    path = tmp_path / "sft_data.jsonl"
    path.write_text(json.dumps(PETTING) + "\n")
    (record,) = read_records(path)
    assert (record.agent_name, record.policy_name) == ("code_generator", "code_generator_model")
    assert (record.success, record.reward, record.env_name) == (True, 1.0, "code_env")
    assert (record.prompt, record.response) == ("Problem: add two ints", "**Code:** ...")
    assert record.meta["pettingllms"]["agent_idx"] == 0
    assert write("pettingllms", record) == PETTING
    clash = json.loads(json.dumps(PETTING))
    clash["metadata"]["messages"] = "other"
    clash["verl_sft"] = {"agent_name": "mine"}
    record = read("pettingllms", clash)
    assert record.agent_name == "mine" and record.messages[1] == Message(
        "assistant", "**Code:** ..."
    )


@pytest.mark.parametrize("name", ["envscaler", "pettingllms"])
@given(record=records())
def test_round_trip(name: str, record: SFTRecord) -> None:
    """Written and read again, a record is what it was."""
    back = read(name, write(name, record))
    if name == "pettingllms":  # a pair is also shown as the single-turn view
        pair = [m.role for m in record.messages] == ["user", "assistant"]
        assert pair or back.prompt is None
    assert back == record


@pytest.mark.parametrize(
    ("name", "base", "change", "field", "code"),
    [
        ("envscaler", ENVSCALER, {"messages": "[{"}, "messages", "BAD_JSON"),
        ("envscaler", ENVSCALER, {"messages": "[]"}, "messages", "EMPTY"),
        ("envscaler", ENVSCALER, {"task_info": 5}, "task_info", "BAD_TYPE"),
        ("envscaler", ENVSCALER, {"task_info": "{"}, "task_info", "BAD_JSON"),
        ("envscaler", ENVSCALER, {"tools": "no"}, "tools", "BAD_JSON"),
        ("pettingllms", PETTING, {"messages": 1}, "messages", "NOT_A_LIST"),
        (
            "pettingllms",
            PETTING,
            {"messages": [{"role": "user"}]},
            "messages[0].content",
            "NO_TEXT",
        ),
        (
            "pettingllms",
            PETTING,
            {"messages": [{"role": "user", "content": "a"}]},
            "messages",
            "NO_ASSISTANT",
        ),
        ("pettingllms", PETTING, {"metadata": "{"}, "metadata", "BAD_JSON"),
    ],
)
def test_damage_is_named(
    name: str, base: dict[str, Any], change: dict[str, Any], field: str, code: str
) -> None:
    """Each kind of damage has its field and code."""
    with pytest.raises(BadRowError) as bad:
        read(name, {**base, **change})
    assert (bad.value.field, bad.value.code) == (field, code)
