"""UserRL reward caches and RL parquet: tool calls, rewards, prompts alone, damage."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.chat_records import records
from verl_sft.cli import main
from verl_sft.records.parse import ReadOptions, Reject
from verl_sft.records.read import find_format, read_records
from verl_sft.records.schema import SFTRecord
from verl_sft.records.values import BadRowError


def cache(**changes: Any) -> dict[str, Any]:
    data = {
        "env_name": "FunctionGym",
        "gold": "26",
        "messages": [
            {"role": "system", "content": "You are an agent."},
            {"role": "user", "content": "Begin."},
            {
                "role": "assistant",
                "content": {
                    "name": "interact_with_env",
                    "arguments": {"choice": "answer", "content": "26", "note": None},
                },
            },
            {"role": "tool", "content": "right"},
        ],
        **changes,
    }
    turn = {"turn": 0, "choice": "answer", "content": "26", "feedback": "right", "reward": 1.0}
    return {"function": {"a1b2": {"history": [[turn]], "reward": [[0.25, 1.0]], "data": [data]}}}


def test_a_cache_becomes_episodes(tmp_path: Path) -> None:
    """Objects become tool calls with their nulls, rewards are summed, every field is kept."""
    path = tmp_path / "run_reward_cache.json"
    path.write_text(json.dumps(cache()))
    (record,) = read_records(path)
    assert record.messages[2].tool_calls == (
        {
            "type": "function",
            "function": {
                "name": "interact_with_env",
                "arguments": {"choice": "answer", "content": "26", "note": None},
            },
        },
    )
    assert (record.reward, record.env_name, record.task_type) == (1.25, "FunctionGym", "function")
    assert record.group_id == "function:a1b2" and record.meta["userrl"]["gold"] == "26"
    assert record.meta["userrl"]["turn_rewards"] == [0.25, 1.0]


def test_one_bad_episode_leaves_the_others(tmp_path: Path) -> None:
    """An episode that cannot be used is named; the next one is read."""
    whole = cache()
    whole["function"]["bad"] = {"history": [], "reward": [0], "data": [{"messages": "lost"}]}
    whole["turtle"] = cache()["function"]
    path = tmp_path / "cache.json"
    path.write_text(json.dumps(whole))
    bad: list[Reject] = []
    assert len(list(read_records(path, reject=bad.append))) == 2
    assert [(b.row, b.field, b.code) for b in bad] == [
        (0, "function.bad.data[0].messages", "NOT_A_LIST")
    ]


@pytest.mark.parametrize(
    ("change", "field", "code"),
    [
        ({"messages": []}, "messages", "NO_ASSISTANT"),
        ({"messages": [{"role": "x"}]}, "messages[0].role", "BAD_ROLE"),
        ({"messages": ["x"]}, "messages[0]", "BAD_JSON"),
        ({"messages": [{"role": "assistant", "content": {}}]}, "messages[0].content", "BAD_CALL"),
        ({"tools": "{"}, "tools", "BAD_JSON"),
        ({"verl_sft": "{"}, "verl_sft", "BAD_JSON"),
        ({"verl_sft": {"supervise": [1]}}, "supervise", "BAD_INDEX"),
        ({"verl_sft": {"step": "x"}}, "verl_sft.step", "BAD_VALUE"),
    ],
)
def test_damage_is_named(change: dict[str, Any], field: str, code: str) -> None:
    """Each kind of damage has its field and code."""
    (bad,) = find_format("userrl").read(cache(**change), ReadOptions(multiturn=True))
    assert isinstance(bad, BadRowError)
    assert (bad.field, bad.code) == (f"function.a1b2.data[0].{field}", code)


def test_a_reward_beyond_float32_is_named() -> None:
    """Only the attempt with it is refused."""
    row = cache()
    entry = row["function"]["a1b2"]
    entry["reward"] = [[1e300], [1.0]]
    entry["data"] *= 2
    bad, good = find_format("userrl").read(row, ReadOptions(multiturn=True))
    assert isinstance(bad, BadRowError) and isinstance(good, SFTRecord)
    assert (bad.field, bad.code) == ("function.a1b2.reward[0]", "BAD_VALUE")
    assert good.episode_id == "function:a1b2:1"


def test_rl_parquet_loses_other_rows_nulls(tmp_path: Path) -> None:
    """Keys that Arrow gave to every row are gone; nothing is learned from a prompt alone."""
    rows = [
        {"prompt": [{"role": "user", "content": "a"}], "reward_model": {"style": "s", "x": 1}},
        {"prompt": [{"role": "user", "content": "b"}], "reward_model": {"style": "s", "y": 2}},
    ]
    path = tmp_path / "train.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    first, second = read_records(path)
    assert (first.reward_model, second.reward_model) == (
        {"style": "s", "x": 1},
        {"style": "s", "y": 2},
    )
    assert first.supervise == ()


@given(record=records())
def test_prompts_round_trip(record: SFTRecord) -> None:
    """Written and read again, a prompt is what it was; answers have no place there."""
    target = find_format("verl_rl")
    assert target.write is not None
    with pytest.raises(BadRowError):
        target.write(record)
    asked = tuple(m for m in record.messages if m.role in ("system", "user"))
    prompt = SFTRecord(
        messages=asked,
        supervise=(),
        reward_model=record.extra_info,
        group_id=record.group_id,
        meta=record.meta,
    )
    (row,) = target.write(prompt)
    assert list(target.read(json.loads(json.dumps(row)), ReadOptions(multiturn=True))) == [prompt]


@given(record=records())
def test_caches_round_trip(record: SFTRecord) -> None:
    """Written and read again, any record is what it was."""
    target = find_format("userrl")
    assert target.write is not None
    (row,) = target.write(record)
    assert target.detect(row)
    assert list(target.read(json.loads(json.dumps(row)), ReadOptions(multiturn=True))) == [record]


VALUES = st.none() | st.integers(0, 9) | st.text(max_size=3)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["function", "turtle"]),
            st.sampled_from(["a1", "b2"]),
            st.fixed_dictionaries({"gold": VALUES}, optional={"env_name": VALUES}),
            st.lists(st.sampled_from([0.0, 0.1, 1.0]), max_size=2),
        ),
        min_size=1,
        max_size=6,
    )
)
def test_a_cache_is_written_as_it_was(
    episodes: list[tuple[str, str, dict[str, Any], list[float]]],
) -> None:
    """Caches with several attempts at several tasks come back, but for ids kept beside them."""
    target = find_format("userrl")
    assert target.write is not None and target.whole is not None
    messages = cache()["function"]["a1b2"]["data"][0]["messages"]
    whole: dict[str, Any] = {}
    for env, digest, data, rewards in episodes:
        empty: dict[str, Any] = {"history": [], "reward": [], "data": []}
        entry = whole.setdefault(env, {}).setdefault(digest, empty)
        entry["history"].append([{"turn": len(entry["data"])}])
        entry["reward"].append(rewards)
        entry["data"].append({**data, "messages": messages})
    read = list(target.read(whole, ReadOptions(multiturn=True)))
    again = target.whole(row for r in read if isinstance(r, SFTRecord) for row in target.write(r))
    assert list(target.read(again, ReadOptions(multiturn=True))) == read
    for entries in again.values():
        for entry in entries.values():
            assert all(data.pop("verl_sft").keys() == {"episode_id"} for data in entry["data"])
    assert again == whole


def test_convert_writes_one_object(tmp_path: Path) -> None:
    """The file that `convert to=userrl` writes is one cache, and reads as the same records."""
    whole = cache()
    whole["turtle"] = {
        "c3": cache(messages=[{"role": "assistant", "content": "b"}])["function"]["a1b2"]
    }
    source, out = tmp_path / "a.json", tmp_path / "b.json"
    source.write_text(json.dumps(whole))
    assert main(["convert", f"in={source}", f"out={out}", "to=userrl"]) == 0
    assert json.loads(out.read_text()).keys() == {"function", "turtle"}
    first, second = ([replace(r, source="", record_id="") for r in read_records(p)]
                     for p in (source, out))  # fmt: skip
    assert first == second
