"""verl's rows as written here: what its data sets would read, round trips, what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings

from tests.chat_records import records
from tests.test_source_trajectories import write
from verl_sft.cli import main
from verl_sft.records.io import write_parquet
from verl_sft.records.parse import ReadOptions
from verl_sft.records.read import find_format, read_records
from verl_sft.records.schema import SFTRecord
from verl_sft.records.values import BadRowError
from verl_sft.types import Message

WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
OTHER = {"type": "function", "function": {"name": "other", "strict": True}}
CALL = {"id": "c", "type": "function", "function": {"name": "weather", "arguments": {"at": "K"}}}
CHAT = SFTRecord(
    messages=(
        Message("system", "Be terse."),
        Message("user", "Rain?"),
        Message("assistant", "", reasoning_content="Ask.", tool_calls=(CALL,)),
        Message("tool", "yes", tool_call_id="c"),
        Message("assistant", "Yes."),
    ),
    tools=(WEATHER,),
    record_id="r",
    group_id="g",
    reward=0.5,
    extra_info={"index": 3},
)
PAIR = SFTRecord(
    messages=(Message("user", "long chat"), Message("assistant", "<action>go</action>")),
    prompt="windowed prompt",
    response="<action>go</action>",
    supervise=(1,),
    record_id="r",
    group_id="g",
)


def listed(value: Any) -> Any:
    """Nested arrays as lists, which is how verl's multi-turn data set reads its columns."""
    if isinstance(value, dict):
        return {k: listed(v) for k, v in value.items()}
    if isinstance(value, np.ndarray | list):
        return [listed(v) for v in value]
    return value


def convert(tmp_path: Path, name: str, *given: SFTRecord) -> tuple[int, Path]:
    write_parquet(tmp_path / "in.parquet", given)
    out = tmp_path / f"{name}.parquet"
    return main(["convert", f"in={tmp_path / 'in.parquet'}", f"out={out}", f"to={name}"]), out


def test_what_its_multi_turn_data_set_reads(tmp_path: Path) -> None:
    """Lists of role and content without a null, tools as structs; we read the record back."""
    second = replace(CHAT, messages=CHAT.messages[:2] + CHAT.messages[4:], record_id="s")
    code, out = convert(tmp_path, "verl", CHAT, second)
    assert code == 0
    frame = pd.read_parquet(out)
    chats = frame["messages"].apply(listed).tolist()
    assert all(set(m) == {"role", "content"} for chat in chats for m in chat)
    assert [m["role"] for m in chats[0]] == ["system", "user", "assistant", "tool", "assistant"]
    assert chats[0][2]["content"].startswith("<think>\nAsk.\n</think>\n\n")
    assert '<tool_call>\n{"name": "weather"' in chats[0][2]["content"]
    assert frame["tools"].apply(listed).tolist() == [[WEATHER], [WEATHER]]
    assert "images" not in frame and frame["data_source"].tolist() == [CHAT.data_source] * 2
    assert [replace(r, source="") for r in read_records(out)] == [CHAT, second]


def test_what_its_single_turn_data_set_reads(tmp_path: Path) -> None:
    """Two columns of text; the windowed prompt where there is one."""
    code, out = convert(tmp_path, "verl_pairs", PAIR)
    assert code == 0
    frame = pd.read_parquet(out)
    assert frame["prompt"].tolist() == ["windowed prompt"]
    assert frame["response"].tolist() == ["<action>go</action>"]
    assert [replace(r, source="") for r in read_records(out)] == [PAIR]
    single = ReadOptions(prompt_key="prompt", response_key="response")
    (record,) = read_records(out, options=single)
    assert (record.prompt, record.response) == (PAIR.prompt, PAIR.response)


def test_columns_of_others_are_recognised(tmp_path: Path) -> None:
    """Question and answer, prompt and response: a conversation of two messages."""
    for names in (("question", "answer"), ("prompt", "response")):
        path = tmp_path / "a.parquet"
        pd.DataFrame([dict(zip(names, ("q", "a"), strict=True))]).to_parquet(path)
        (record,) = read_records(path)
        assert [(m.role, m.content) for m in record.messages] == [("user", "q"), ("assistant", "a")]
        assert record.supervise == (1,)


def test_different_tools_are_not_filled_with_nulls(tmp_path: Path) -> None:
    """Where Arrow would unify tools the parquet file is refused; JSON lines hold them."""
    other = replace(CHAT, tools=(OTHER,), record_id="s")
    code, out = convert(tmp_path, "verl", CHAT, other)
    assert code == 3 and not out.exists()
    lines = tmp_path / "out.jsonl"
    assert main(["convert", f"in={tmp_path / 'in.parquet'}", f"out={lines}", "to=verl"]) == 0
    assert [replace(r, source="") for r in read_records(lines)] == [CHAT, other]


@pytest.mark.parametrize(
    ("name", "record", "code"),
    [
        ("verl", replace(CHAT, supervise=(4,)), "NOT_ALL_LEARNED"),
        ("verl", replace(CHAT, supervise=(2, 4), weights=(1.0, 0.5)), "HAS_WEIGHTS"),
        ("verl", replace(CHAT, sample_weight=2.0), "HAS_WEIGHTS"),
        ("verl", replace(CHAT, messages=CHAT.messages[:2]), "NOT_ALL_LEARNED"),
        ("verl", replace(PAIR, messages=(Message("user", "\ud800"), PAIR.messages[1])),
         "NOT_STORABLE"),
        ("verl_pairs", CHAT, "NOT_ALL_LEARNED"),
        ("verl_pairs", replace(CHAT, supervise=(4,)), "NOT_A_PAIR"),
        ("verl_pairs", replace(PAIR, tools=(WEATHER,)), "HAS_TOOLS"),
        ("verl_pairs", replace(PAIR, weights=(0.5,)), "HAS_WEIGHTS"),
    ],
)  # fmt: skip
def test_what_verl_cannot_hold_is_refused(name: str, record: SFTRecord, code: str) -> None:
    """Nothing is learned otherwise than the record says."""
    with pytest.raises(BadRowError) as bad:
        write(name, record)
    assert bad.value.code == code


@settings(max_examples=100, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(record=records())
def test_round_trips(record: SFTRecord) -> None:
    """Written and read again, a record is what it was, or it is refused."""
    learned = replace(record, supervise=None, weights=None, sample_weight=1.0)
    pair = replace(
        learned,
        messages=(record.messages[-2], record.messages[-1]),
        supervise=(1,),
        tools=None,
    )
    for name, given_record in (("verl", learned), ("verl_pairs", pair)):
        try:
            row = write(name, given_record)
        except BadRowError as bad:
            assert bad.code in ("NOT_STORABLE", "NOT_A_PAIR")
            continue
        (back,) = find_format(name).read(row, ReadOptions(multiturn=True))
        assert back == given_record


def test_an_edited_text_is_what_is_trained() -> None:
    """A text that was changed in the row wins over what is kept beside it."""
    row = write("verl", CHAT)
    row["messages"][4]["content"] = "No."
    (back,) = find_format("verl").read(row, ReadOptions(multiturn=True))
    assert isinstance(back, SFTRecord)
    assert back.messages[4].content == "No." and back.messages[:4] == CHAT.messages[:4]
