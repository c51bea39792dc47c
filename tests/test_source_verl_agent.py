"""Raw trajectories of verl-agent: chats, chats by step, rewards, damage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from verl_sft.records.parse import ReadOptions
from verl_sft.records.read import find_format, read_records
from verl_sft.records.schema import SFTRecord
from verl_sft.records.values import BadRowError
from verl_sft.types import JSON

CHAT = [{"role": "user", "content": "You are ..."}, {"role": "assistant", "content": "look"}]
ROW: JSON = {
    "messages_list": CHAT,
    "success": False,
    "rewards": [0.0, 10.0],
    "final_reward": 10.0,
    "task_info": {"data_source": "alfworld"},
    "episode_length": 1,
}


def test_trajectories_become_records(tmp_path: Path) -> None:
    """Messages, reward and source have columns, the rest is kept; false is no failure here."""
    path = tmp_path / "raw_trajectories.json"
    path.write_text(json.dumps([ROW, ROW | {"success": True}]))
    first, second = read_records(path)
    assert (first.prompt, first.response) == ("You are ...", "look")
    assert (first.reward, first.success, second.success) == (10.0, None, True)
    assert first.data_source == "alfworld" and first.meta["verl_agent"]["rewards"] == [0.0, 10.0]


def test_chats_by_step() -> None:
    """A list of chats is one record per step; a broken one leaves the others."""
    row = ROW | {"messages_list": [CHAT, [{"role": "x"}], CHAT * 2]}
    first, bad, last = find_format("verl_agent").read(row, ReadOptions(multiturn=True))
    assert isinstance(first, SFTRecord) and isinstance(last, SFTRecord)
    assert (first.step, last.step, last.prompt) == (0, 2, None)
    assert isinstance(bad, BadRowError)
    assert (bad.field, bad.code) == ("messages_list[1][0].role", "BAD_ROLE")


@pytest.mark.parametrize(
    ("change", "field", "code"),
    [
        ({"messages_list": []}, "messages_list", "EMPTY"),
        ({"messages_list": "["}, "messages_list", "BAD_JSON"),
        ({"messages_list": CHAT[:1]}, "messages_list", "NO_ASSISTANT"),
        ({"final_reward": "high"}, "final_reward", "BAD_VALUE"),
        ({"task_info": 5}, "task_info", "BAD_TYPE"),
    ],
)
def test_damage_is_named(change: dict[str, Any], field: str, code: str) -> None:
    """Each kind of damage has its field and code."""
    with pytest.raises(BadRowError) as bad:
        list(find_format("verl_agent").read(ROW | change, ReadOptions(multiturn=True)))
    assert (bad.value.field, bad.value.code) == (field, code)
