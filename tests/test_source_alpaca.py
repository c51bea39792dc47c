"""Alpaca rows with history: what is learned, round trips through turn-split rows, damage."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given

from tests.chat_records import records
from verl_sft.records.build import turn_records
from verl_sft.records.parse import ReadOptions
from verl_sft.records.read import find_format
from verl_sft.records.schema import SFTRecord
from verl_sft.records.values import BadRowError
from verl_sft.types import Message

FORMAT = find_format("alpaca")


def row(**changes: Any) -> dict[str, Any]:
    return {
        "instruction": "<tool_response>\nopen\n</tool_response>",
        "input": "",
        "output": "<think>\nnow cancel\n</think>\n\ndone",
        "system": "You are an agent.",
        "history": [["cancel order 3", "<tool_call>...</tool_call>"]],
        **changes,
    }


def read(given: dict[str, Any], **options: Any) -> SFTRecord:
    (record,) = FORMAT.read(given, ReadOptions(multiturn=True, **options))
    return record


def test_history_is_context_and_the_output_is_learned() -> None:
    """Messages are rebuilt in order; only the output is learned unless the history is asked for."""
    record = read(row(input="and more"))
    assert [m.role for m in record.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert record.messages[3].content == "<tool_response>\nopen\n</tool_response>\nand more"
    assert record.supervise == (4,)
    assert read(row(), mask_history=False).supervise is None
    assert read(row(history=None, system=None)).messages[0].role == "user"


def test_names_of_columns() -> None:
    """Columns under other names."""
    given = {"q": "a", "a": "b", "past": "[]"}
    names = (("prompt", "q"), ("response", "a"), ("history", "past"))
    assert read(given, columns=names).messages == (Message("user", "a"), Message("assistant", "b"))


@given(records(alternating=True))
def test_round_trip_of_turn_split_rows(record: SFTRecord) -> None:
    """Each learned turn becomes a row, and each row is that turn's record again."""
    assert FORMAT.write is not None
    written = [json.loads(json.dumps(r)) for r in FORMAT.write(record)]
    names = ("tools", "meta", "reward", "task_type", "seed", "success", "extra_info")

    def seen(one: SFTRecord) -> list[Any]:
        last = (len(one.messages) - 1,)
        rest = [getattr(one, name) for name in names]
        return [one.messages, one.supervise or last, one.weights or (1.0,), *rest]

    parts = turn_records(dataclasses.replace(record, episode_id="e", record_id="r"))
    assert [seen(read(r)) for r in written] == [seen(part) for part in parts]


def test_what_alpaca_cannot_hold_is_refused() -> None:
    """Two user messages in a row have no place in it."""
    record = SFTRecord(
        messages=(Message("user", "a"), Message("user", "b"), Message("assistant", "c"))
    )
    assert FORMAT.write is not None
    with pytest.raises(BadRowError) as bad:
        list(FORMAT.write(record))
    assert bad.value.code == "NOT_ALTERNATING"


@pytest.mark.parametrize(
    ("change", "field", "code"),
    [
        ({"output": None}, "output", "NO_TEXT"),
        ({"instruction": ["a"]}, "instruction", "NO_TEXT"),
        ({"history": "{"}, "history", "BAD_JSON"),
        ({"history": 5}, "history", "NOT_A_LIST"),
        ({"history": [["a"]]}, "history[0]", "BAD_PAIR"),
        ({"history": [["a", 1]]}, "history[0]", "NO_TEXT"),
        ({"system": []}, "system", "NO_TEXT"),
    ],
)
def test_damage_is_named(change: dict[str, Any], field: str, code: str) -> None:
    """Each kind of damage has its field and code."""
    with pytest.raises(BadRowError) as bad:
        read(row(**change))
    assert (bad.value.field, bad.value.code) == (field, code)
