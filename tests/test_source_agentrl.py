"""AgentRL rows in every encoding of their maps: what is learned, what is kept, damage."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.chat_records import records
from verl_sft.records.mix import Source, mix_lines, read_mix
from verl_sft.records.parse import ReadOptions
from verl_sft.records.read import find_format, read_records
from verl_sft.records.rows import record_to_row, row_to_record
from verl_sft.records.schema import NOTE, SFTRecord
from verl_sft.records.values import BadRowError

CHAT = [
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "3+3?"},
    {"role": "assistant", "content": "7"},
]
ROW: dict[str, Any] = {
    "messages": CHAT,
    "tools": None,
    "scores": {"1": 1.0, "3": 0.1},
    "advantages": {"1": 0.45, "3": -0.45},
    "created_at_step": {"1": 0, "3": 2},
    "reward": 0.1,
    "step": -1,
    "logprobs": {"1": [{"token": "4", "logprob": -0.5}], "3": None},
    "record_id": "65f0",
    "split": "train",
    "fetched": False,
}


def read(row: dict[str, Any], **options: Any) -> SFTRecord:
    (record,) = find_format("agentrl").read(row, ReadOptions(multiturn=True, **options))
    assert isinstance(record, SFTRecord)
    return record


def write(record: SFTRecord) -> dict[str, Any]:
    target = find_format("agentrl")
    assert target.write is not None
    (row,) = target.write(record)
    found: dict[str, Any] = json.loads(json.dumps(row))
    return found


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_what_is_learned_and_kept(tmp_path: Path, suffix: str) -> None:
    """The keys of `advantages` are learned; every field comes back, to the last bit."""
    row = ROW | {"advantages": {"3": 0.45}}
    path = tmp_path / f"rows{suffix}"
    path.write_text(json.dumps([row]) if suffix == ".json" else json.dumps(row) + "\n")
    (record,) = read_records(path)
    assert record.supervise == (3,) and record.weights is None
    assert (record.reward, record.episode_id) == (0.1, "65f0")
    assert record.meta["agentrl"]["logprobs"]["1"] == [{"token": "4", "logprob": -0.5}]
    assert write(record) == row
    assert write(row_to_record(record_to_row(record))) == row  # also through our own files


def maps(encode: Any) -> dict[str, Any]:
    return ROW | {
        name: encode(ROW[name]) for name in ("scores", "advantages", "created_at_step", "logprobs")
    }


@pytest.mark.parametrize(
    "encode",
    [
        json.dumps,
        lambda value: [[int(k), v] for k, v in value.items()],
        lambda value: [{"key": k, "value": v} for k, v in value.items()],
        lambda value: {int(k): v for k, v in value.items()},
    ],
    ids=["text", "pairs", "structs", "integers"],
)
def test_every_encoding_of_a_map(encode: Any) -> None:
    """Text, pairs, key-value structs and integer keys give the same record as an object."""
    assert read(maps(encode)) == read(ROW)


@pytest.mark.parametrize("kind", ["struct", "map", "text"])
def test_parquet(tmp_path: Path, kind: str) -> None:
    """Maps as Arrow structs (with the nulls of other rows' keys), Arrow maps and text."""
    second = ROW | {"messages": CHAT[:2], "record_id": "65f1"}
    rows = []
    for row, keys in ((ROW, ("1", "3")), (second, ("1",))):
        row = {k: v for k, v in row.items() if k not in ("tools", "logprobs")}
        for name in ("scores", "advantages", "created_at_step"):
            value = {k: ROW[name][k] for k in keys}
            row[name] = {
                "struct": value,
                "map": [(int(k), v) for k, v in value.items()],
                "text": json.dumps(value),
            }[kind]
        rows.append(row)
    table = pa.Table.from_pylist(rows)
    if kind == "map":
        for name, item in (
            ("scores", pa.float64()),
            ("advantages", pa.float64()),
            ("created_at_step", pa.int64()),
        ):
            column = pa.array([r[name] for r in rows], type=pa.map_(pa.int64(), item))
            table = table.set_column(table.schema.get_field_index(name), name, column)
    path = tmp_path / "rows.parquet"
    pq.write_table(table, path)
    first, last = read_records(path)
    assert (first.supervise, last.supervise) == ((1, 3), (1,))
    assert first.meta["agentrl"]["advantages"] == ROW["advantages"]
    assert last.meta["agentrl"]["advantages"] == {"1": 0.45}


def test_no_advantages_teach_every_answer_and_say_so() -> None:
    """An empty map would train nothing for ever elsewhere; here it is noted, and flags count."""
    for empty in ({}, None, "{}", []):
        record = read(ROW | {"advantages": empty})
        assert record.supervise is None
        assert record.meta[NOTE] == "no advantages: every answer is learned"
    flagged = [*CHAT[:3], CHAT[3] | {"loss_mask": 0}]
    record = read(ROW | {"messages": flagged, "advantages": {}})
    assert record.supervise == (1,) and NOTE not in record.meta
    both = read(ROW | {"messages": flagged})
    assert both.supervise == (1,)
    assert NOTE not in read(ROW).meta


def test_small_advantages_are_left_out_when_asked() -> None:
    """Zero and small advantages make context; nothing left is an error that names the keys."""
    row = ROW | {"advantages": {"1": 0.0, "3": 0.5}}
    assert read(row).supervise == (1, 3)
    assert read(row, drop_zero_advantage=True).supervise == (3,)
    assert read(row, minimal_advantage=0.1).supervise == (3,)
    assert read(ROW, minimal_advantage=-1.0).supervise == (1, 3)
    with pytest.raises(BadRowError, match="no answer is left"):
        read(row, minimal_advantage=0.6)


def test_attempts_at_one_task_share_a_group() -> None:
    """Rows that begin alike are on one side of a split, whatever trajectory they are of."""
    other = ROW | {"messages": [*CHAT[:1], CHAT[1] | {"content": "5"}, *CHAT[2:]]}
    assert read(ROW).group_id == read(other | {"record_id": "65f9"}).group_id
    asked = [CHAT[0] | {"content": "else"}, *CHAT[1:]]
    assert read(ROW | {"messages": asked}).group_id != read(ROW).group_id


def test_old_calls_and_unknown_fields() -> None:
    """`function_call` is a tool call; what a message holds beside its fields comes back."""
    chat = [
        CHAT[0],
        {"role": "assistant", "content": None, "refusal": "no", "audio": None,
         "function_call": {"name": "add", "arguments": "{}"}},
    ]  # fmt: skip
    record = read(ROW | {"messages": chat, "logprobs": None} | {
        name: {"1": 1} for name in ("scores", "advantages", "created_at_step")
    })  # fmt: skip
    assert record.messages[1].tool_calls == (
        {"type": "function", "function": {"name": "add", "arguments": "{}"}},
    )
    assert write(record)["messages"][1]["refusal"] == "no"


def test_a_row_of_others_becomes_one_that_agentrl_learns_from() -> None:
    """Maps hold exactly the learned answers; the trajectory's id is the episode's."""
    chat = read(ROW | {"advantages": {}}).messages
    row = write(SFTRecord(messages=chat, supervise=(3,), reward=0.5, episode_id="e1"))
    assert row["advantages"] == {"3": 1.0} and row["scores"] == {"3": 0.5}
    assert (row["record_id"], row["reward"], row["step"]) == ("e1", 0.5, -1)
    assert write(SFTRecord(messages=chat))["advantages"] == {"1": 1.0, "3": 1.0}


def test_an_edited_map_counts() -> None:
    """What the file says now is learned, not what was kept beside it."""
    row = write(SFTRecord(messages=read(ROW).messages, supervise=(1, 3), weights=(0.5, 1.0)))
    assert read(row).weights == (0.5, 1.0)
    record = read(row | {"advantages": {"3": 1.0}})
    assert record.supervise == (3,) and record.weights is None


@given(record=records())
def test_round_trip(record: SFTRecord) -> None:
    """Written and read again, a record is what it was."""
    assert read(write(record)) == record


@given(
    advantages=st.dictionaries(st.sampled_from(["1", "3"]), st.floats(allow_nan=False).filter(
        lambda v: abs(v) < 1e300), min_size=1),
    reward=st.floats(-1e30, 1e30),
    step=st.integers(-1, 9),
    logprobs=st.none() | st.dictionaries(st.sampled_from(["0", "1"]), st.none() | st.lists(
        st.fixed_dictionaries({"token": st.text(max_size=3), "logprob": st.floats(-9, 0)}))),
)  # fmt: skip
def test_figures_come_back_exactly(
    advantages: Any, reward: float, step: int, logprobs: Any
) -> None:
    """Every map and number survives our own columns, whose floats have 32 bits."""
    row = ROW | {"advantages": advantages, "reward": reward, "step": step, "logprobs": logprobs}
    assert write(row_to_record(record_to_row(read(row)))) == json.loads(json.dumps(row))


@pytest.mark.parametrize(
    ("change", "field", "code"),
    [
        ({"messages": "[{"}, "messages", "BAD_JSON"),
        ({"messages": []}, "messages", "EMPTY"),
        ({"messages": CHAT[:1]}, "messages", "NO_ASSISTANT"),
        ({"messages": ["x"]}, "messages[0]", "BAD_JSON"),
        ({"advantages": {"x": 1}}, "advantages.x", "BAD_INDEX"),
        ({"advantages": {"1.0": 1}}, "advantages.1.0", "BAD_INDEX"),
        ({"advantages": {"-1": 1}}, "advantages.-1", "BAD_INDEX"),
        ({"advantages": {"4": 1}}, "advantages.4", "BAD_INDEX"),
        ({"advantages": {"9" * 5000: 1}}, f"advantages.{'9' * 5000}", "BAD_INDEX"),
        ({"advantages": {"0": 1}}, "advantages.0", "NOT_ASSISTANT"),
        ({"advantages": {"1": None}}, "advantages.1", "BAD_VALUE"),
        ({"advantages": {"1": "high"}}, "advantages.1", "BAD_VALUE"),
        ({"advantages": {"1": True}}, "advantages.1", "BAD_VALUE"),
        ({"advantages": {"1": float("nan")}}, "advantages.1", "BAD_VALUE"),
        ({"advantages": [[1, 1], [1, 2]]}, "advantages.1", "REPEATED_INDEX"),
        ({"advantages": {"1": 1, "01": 2}}, "advantages.01", "REPEATED_INDEX"),
        ({"advantages": 5}, "advantages", "NOT_A_MAP"),
        ({"advantages": [1, 2]}, "advantages", "NOT_A_MAP"),
        ({"advantages": "{"}, "advantages", "BAD_JSON"),
        ({"scores": {"7": 1}}, "scores.7", "BAD_INDEX"),
        ({"scores": {"1": float("inf")}}, "scores.1", "BAD_VALUE"),
        ({"scores": {"1": "x"}}, "scores.1", "BAD_VALUE"),
        ({"created_at_step": {"1": 0.5}}, "created_at_step.1", "BAD_VALUE"),
        ({"logprobs": {"1": [float("nan")]}}, "logprobs", "BAD_VALUE"),
        ({"created_at_step": "no"}, "created_at_step", "BAD_JSON"),
        ({"logprobs": {"a": []}}, "logprobs.a", "BAD_INDEX"),
        ({"reward": "high"}, "reward", "BAD_VALUE"),
        ({"step": 0.5}, "step", "BAD_VALUE"),
        ({"tools": 5}, "tools", "BAD_TYPE"),
    ],
)
def test_damage_is_named(change: dict[str, Any], field: str, code: str) -> None:
    """Each kind of damage has its field and code."""
    with pytest.raises(BadRowError) as bad:
        read(ROW | change)
    assert (bad.value.field, bad.value.code) == (field, code)


def test_log_probabilities_are_written_once() -> None:
    """What has a field of its own does not also stand among the kept columns."""
    record = read(ROW)
    row = write(replace(record, meta={**record.meta, "more": 1}))
    assert read(row).meta["more"] == 1 and read(row).meta["agentrl"] == record.meta["agentrl"]
    assert json.dumps(row).count('logprob"') == 1 and '"more"' in row["verl_sft"]["meta_json"]


def test_nothing_to_learn_is_not_written() -> None:
    """A prompt alone has no place there."""
    with pytest.raises(BadRowError) as bad:
        write(SFTRecord(messages=read(ROW).messages, supervise=()))
    assert bad.value.code == "NOTHING_LEARNED"


def test_rows_without_advantages_are_counted(tmp_path: Path) -> None:
    """The mix says how many rows left open what is learned."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(ROW | {"advantages": a}) + "\n" for a in ({}, {}, {"1": 1})))
    counts: Counter[str] = Counter()
    options = ReadOptions(multiturn=True)
    assert len(list(read_mix([Source((path,))], options=options, counts=counts))) == 3
    assert mix_lines(counts) == [
        "note: rows.jsonl: 2 records: no advantages: every answer is learned"
    ]
