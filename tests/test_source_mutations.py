"""Formats with nested rows: whatever one value is replaced by, a row is read or refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.test_source_agentrl import ROW
from tests.test_source_agentrl_chain import RECORD, TASK, chat
from tests.test_source_verl_agent import ROW as TRAJECTORY
from verl_sft.records.parse import ReadOptions
from verl_sft.records.read import find_format
from verl_sft.records.rows import record_to_row
from verl_sft.records.schema import SFTRecord
from verl_sft.records.values import BadRowError
from verl_sft.types import JSON

STEP: JSON = {
    "index": 0,
    "observation": {"text": "o", "task": "t", "admissible_actions": ["look"]},
    "prompt": [{"role": "user", "content": "p"}],
    "response": {"role": "assistant", "content": "<think>t</think><action>look</action>"},
    "action": "look",
    "action_valid": True,
    "next_observation": "n",
    "reward": 1.0,
    "terminated": True,
    "truncated": False,
    "weight": 1.0,
    "finish_reason": "stop",
}
EPISODE: JSON = {
    "episode_id": "e",
    "env_name": "toy",
    "task_id": "t",
    "task_type": "k",
    "split": "train",
    "seed": 0,
    "attempt": 0,
    "policy_name": "p",
    "prompt_template": "default@1",
    "history_style": "windowed",
    "history_length": 2,
    "steps": [STEP, STEP | {"index": 1}],
    "stop_reason": "terminated",
    "success": True,
    "reward": 1.0,
    "meta": {},
}
ROWS = {
    "agentrl": ROW,
    "agentrl_chain": RECORD | {"task": TASK, "traj": chat(2)},
    "raw": EPISODE,
    "verl_agent": TRAJECTORY,
}
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(-9, 9) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values inside of a value."""
    inner = value.items() if isinstance(value, dict) else ()
    inner = enumerate(value) if isinstance(value, list) else inner
    return [path] * bool(path) + [p for k, v in inner for p in places(v, (*path, k))]


@pytest.mark.parametrize("name", ROWS)
@settings(max_examples=300)
@given(data=st.data())
def test_a_replaced_value_is_read_or_refused(name: str, data: st.DataObject) -> None:
    """Never another exception, and what is read can be stored."""
    row = copy.deepcopy(ROWS[name])
    *path, last = data.draw(st.sampled_from(places(row)))
    inside = row
    for key in path:
        inside = inside[key]
    inside[last] = data.draw(VALUES)
    try:
        found = list(find_format(name).read(row, ReadOptions(multiturn=True)))
    except BadRowError:
        return
    for record in found:
        assert isinstance(record, SFTRecord | BadRowError)
        if isinstance(record, SFTRecord):
            record_to_row(record)


@pytest.mark.parametrize("name", ROWS)
def test_the_rows_are_good(name: str) -> None:
    """Negative control: unchanged, each row gives records."""
    found = list(find_format(name).read(copy.deepcopy(ROWS[name]), ReadOptions(multiturn=True)))
    assert found and all(isinstance(record, SFTRecord) for record in found)
