"""AgentRL trajectories: calls folded into the longest ones, advantages, statuses, damage."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from verl_sft.records.parse import ReadOptions, Reject
from verl_sft.records.read import find_format, read_records
from verl_sft.records.schema import NOTE, SFTRecord
from verl_sft.records.sources.agentrl_chain import chain_rows
from verl_sft.records.values import BadRowError
from verl_sft.types import JSON

TOOLS = [{"type": "function", "function": {"name": "look"}}]


def say(role: str, content: Any = None, **fields: Any) -> JSON:
    return {"role": role, "content": content, **fields}


def call(asked: list[JSON], answer: JSON, **changes: Any) -> JSON:
    return {
        "request": {"messages": asked, "model": "m", "tools": TOOLS},
        "response": {"choices": [{"message": answer, "logprobs": None}]},
        "status": "completed",
        "created_at_step": 3,
        **changes,
    }


def chat(turns: int) -> list[JSON]:
    """Calls of one chat, each asked with all that came before."""
    messages, found = [say("system", "s"), say("user", "u0")], []
    for turn in range(turns):
        answer = say("assistant", f"a{turn}")
        found.append(call(copy.deepcopy(messages), answer))
        messages += [answer, say("user", f"u{turn + 1}")]
    return found


RECORD = {"_id": "65f0", "status": "scored", "score": 1.0, "split": "train", "traj_id": "t"}
TASK = {"tid": "task-7", "scores": [1.0, 0.0]}


def rows(calls: list[JSON], record: JSON = RECORD, **options: Any) -> list[Any]:
    return list(chain_rows(record, calls, **{"task": TASK, **options}))


def test_calls_fold_into_the_longest() -> None:
    """Three turns of one chat are one row; each answer keeps its place and figures."""
    calls = chat(3)
    calls[1] |= {"score": 0.25, "advantage": -0.5, "created_at_step": 4}
    calls[2]["response"]["choices"][0]["logprobs"] = {"content": [{"token": "a", "logprob": -1}]}
    (row,) = rows(calls)
    assert [m["content"] for m in row["messages"]] == ["s", "u0", "a0", "u1", "a1", "u2", "a2"]
    assert row["advantages"] == {"2": 0.5, "4": -0.5, "6": 0.5}  # 1 less the mean of 1 and 0
    assert row["scores"] == {"2": 1.0, "4": 0.25, "6": 1.0}
    assert row["created_at_step"] == {"2": 3, "4": 4, "6": 3} and row["step"] == 4
    assert row["logprobs"]["6"] == [{"token": "a", "logprob": -1}]
    assert (row["reward"], row["record_id"], row["tools"]) == (1.0, "65f0", TOOLS)


@pytest.mark.parametrize(
    "change",
    [
        {"content": "other"},
        {"reasoning_content": "thought"},
        {"tool_calls": [{"id": "c", "function": {"name": "look", "arguments": "{}"}}]},
        {"role": "user"},
        {"name": "n"},
    ],
)
def test_what_differs_is_a_row_of_its_own(change: JSON) -> None:
    """A quoted answer that is not the one given is another chat."""
    calls = chat(2)
    calls[1]["request"]["messages"][2] |= change
    assert [r["advantages"].keys() for r in rows(calls)] == [{"2"}, {"4"}]


def test_other_tools_are_another_chat() -> None:
    """The prompt holds the tools; without them the first answer was given to another one."""
    calls = chat(2)
    calls[0]["request"]["tools"] = None
    assert len(rows(calls)) == 2


def test_what_clients_rewrite_is_the_same() -> None:
    """Nulls, empty lists, call types and the spelling of arguments do not part a chat."""
    answer = say("assistant", None, refusal=None, function_call=None, tool_calls=[
        {"id": "c", "type": "function", "index": 0,
         "function": {"name": "look", "arguments": '{"a": 1}'}}])  # fmt: skip
    echo = say("assistant", "", tool_calls=[
        {"id": "c", "function": {"name": "look", "arguments": {"a": 1}}}])  # fmt: skip
    first = [say("user", "u")]
    result = say("tool", "r", tool_call_id="c")
    calls = [call(first, answer), call([*first, echo, result], say("assistant", "done"))]
    assert [r["advantages"].keys() for r in rows(calls)] == [{"1", "3"}]


def test_only_completed_calls_are_learned() -> None:
    """Failed, malformed and repeating calls are context at most."""
    states = ["completed", "formaterror", "toolfailed", "repeaterror", "failed", "cancelled"]
    calls = [c | {"status": s} for c, s in zip(chat(6), states, strict=True)]
    (row,) = rows(calls)
    assert len(row["messages"]) == 3
    calls[5]["status"] = "completed"
    (row,) = rows(calls)
    assert len(row["messages"]) == 13 and row["advantages"].keys() == {"2", "12"}


def test_advantages_of_zero_and_below_the_minimum() -> None:
    """Dropped by default as there; a row without any left is reported, not forgotten."""
    calls = chat(2)
    calls[0]["advantage"] = 0
    (row,) = rows(calls)
    assert row["advantages"].keys() == {"4"}
    (row,) = rows(calls, drop_zero_advantage=False)
    assert row["advantages"].keys() == {"2", "4"}
    (bad,) = rows(calls, minimal_advantage=0.6)
    assert bad.code == "SMALL_ADVANTAGE"
    (bad,) = rows(chat(1), task={"scores": [1.0]})  # alone, its score is the mean
    assert bad.code == "SMALL_ADVANTAGE"


def test_records_as_files(tmp_path: Path) -> None:
    """Documents with their calls inside are read like any rows; nothing goes uncounted."""
    documents = [
        RECORD | {"task": TASK, "traj": chat(2)},
        RECORD | {"task": TASK, "traj": chat(1), "score": 0.5},
        {"_id": "2", "traj": chat(1)},
        RECORD | {"status": "abandoned", "traj": chat(1)},
        RECORD | {"traj": [c | {"status": "failed"} for c in chat(1)]},
    ]
    path = tmp_path / "records.json"
    path.write_text(json.dumps(documents))
    bad: list[Reject] = []
    first, unscored = read_records(path, reject=bad.append)
    assert first.supervise is not None and first.supervise == (2, 4)
    assert (first.task_id, first.group_id, first.episode_id) == ("task-7", "task-7", "65f0")
    assert first.meta["status"] == "scored"
    assert first.reward == 1.0 and first.meta["calls"] == {"completed": 2}
    assert unscored.meta[NOTE].startswith("neither") and unscored.reward is None
    codes = [(b.row, b.code) for b in bad]
    assert codes == [(1, "SMALL_ADVANTAGE"), (3, "ABANDONED"), (4, "NO_COMPLETED_CALL")]


@pytest.mark.parametrize(
    ("change", "field", "code"),
    [
        ({"request": None}, "traj[0].request.messages", "NOT_A_LIST"),
        ({"request": 5}, "traj[0].request", "BAD_TYPE"),
        ({"request": {"messages": ["x"]}}, "traj[0].request.messages[0]", "BAD_JSON"),
        ({"response": {"choices": []}}, "traj[0].response.choices", "EMPTY"),
        ({"response": None}, "traj[0].response.choices", "NOT_A_LIST"),
        ({"response": {"choices": [{"message": 5}]}}, "traj[0].response.choices[0].message",
         "BAD_TYPE"),
        ({"req_type": "completions"}, "traj[0].req_type", "NOT_A_CHAT"),
        ({"score": "high"}, "traj[0].score", "BAD_VALUE"),
        ({"advantage": float("nan")}, "traj[0].advantage", "BAD_VALUE"),
    ],
)  # fmt: skip
def test_damage_is_named_and_leaves_the_other_calls(change: JSON, field: str, code: str) -> None:
    """A broken call has its field and code; the others are read."""
    document = RECORD | {"task": TASK, "traj": [*chat(1), *chat(2)[1:]]}
    document["traj"][0] |= change
    found = list(find_format("agentrl_chain").read(document, ReadOptions(multiturn=True)))
    bad, record = found
    assert isinstance(bad, BadRowError) and isinstance(record, SFTRecord)
    assert (bad.field, bad.code) == (field, code)
    assert record.supervise == (4,)


@given(st.data())
def test_every_completed_answer_is_learned_exactly_once(data: st.DataObject) -> None:
    """Whatever branches off where: each different (prompt, answer) pair is learned once."""
    calls: list[JSON] = []
    for _ in range(data.draw(st.integers(1, 6))):
        base = data.draw(st.sampled_from([None, *range(len(calls))]))
        before = [say("user", "u")]
        if base is not None:
            parent = calls[base]
            before = [*parent["request"]["messages"], parent["response"]["choices"][0]["message"]]
            before = [*before, say("user", data.draw(st.sampled_from("xy")))]
        answer = say("assistant", data.draw(st.sampled_from("ab")))
        calls.append(call(copy.deepcopy(before), answer, advantage=1.0))
    wanted = {
        json.dumps([*c["request"]["messages"], c["response"]["choices"][0]["message"]])
        for c in calls
    }
    learned = [
        json.dumps(row["messages"][: int(i) + 1]) for row in rows(calls) for i in row["advantages"]
    ]
    assert sorted(learned) == sorted(wanted)
