"""ShareGPT rows: as LLaMA-Factory's users write them, round trips, and every kind of damage."""

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

FORMAT = find_format("sharegpt")
SCHEMA = {"name": "interact_with_env", "parameters": {"type": "object"}}


def row(**changes: Any) -> dict[str, Any]:
    return {
        "conversations": [
            {"from": "human", "value": "You may begin."},
            {"from": "function_call", "value": '{"name": "look", "arguments": {"at": "1"}}'},
            {"from": "observation", "value": "Result: 10"},
            {"from": "gpt", "value": "<think>sum?</think>\nit is 26"},
        ],
        "system": "You are an agent.",
        "tools": json.dumps([SCHEMA]),
        **changes,
    }


def read(given: dict[str, Any], **options: Any) -> SFTRecord:
    (record,) = FORMAT.read(given, ReadOptions(multiturn=True, **options))
    return record


def test_roles_tools_and_system(tmp_path: Path) -> None:
    """The row in a JSON array is recognised; every role and the bare tool schema find their place.

    The text of answers is kept as it is, its thought included.
    """
    path = tmp_path / "merged.json"
    path.write_text(json.dumps([row(), row(system="")]))
    first, second = read_records(path)
    assert [m.role for m in first.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert first.tools == ({"type": "function", "function": SCHEMA},)
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": "1"}}}
    assert first.messages[2] == Message("assistant", None, tool_calls=(call,))
    assert first.messages[4].content == "<think>sum?</think>\nit is 26"
    assert first.supervise is None and first.source == "merged.json:0"
    assert second.messages[0].role == "user"


def test_names_of_columns_and_tags() -> None:
    """Other names of columns, keys and roles, as `dataset_info.json` gives them."""
    given = {
        "chat": [
            {"who": "Q", "text": "2+2?"},
            {"who": "A", "text": "4"},
        ],
        "rules": "Be short.",
    }
    tags = {"role_tag": "who", "content_tag": "text", "user_tag": "Q", "assistant_tag": "A"}
    record = read(
        given,
        columns=(("messages", "chat"), ("system", "rules")),
        tags=tuple(tags.items()),
    )
    assert [(m.role, m.content) for m in record.messages] == [
        ("system", "Be short."),
        ("user", "2+2?"),
        ("assistant", "4"),
    ]


def test_what_is_learned() -> None:
    """All answers, or those that a flag chooses, with its weight."""
    turns = row()["conversations"]
    flagged = [*turns[:3], {**turns[3], "weight": 0.5}]
    record = read(row(conversations=flagged))
    assert (record.supervise, record.weights) == ((2, 4), (1.0, 0.5))


@given(records())
def test_round_trip(record: SFTRecord) -> None:
    """Written and read again, a record is what it was."""
    assert FORMAT.write is not None
    (written,) = FORMAT.write(record)
    assert read(json.loads(json.dumps(written))) == record


def test_an_edited_text_wins_over_what_was_kept() -> None:
    """A thought is kept beside the text; once the text was edited, the text is the answer."""
    record = SFTRecord(
        messages=(Message("user", "a"), Message("assistant", "b", reasoning_content="hm"))
    )
    assert FORMAT.write is not None
    (written,) = FORMAT.write(record)
    written["conversations"][1]["value"] = "c"
    assert read(written).messages[1] == Message("assistant", "c")


@pytest.mark.parametrize(
    ("change", "field", "code"),
    [
        ({"conversations": []}, "conversations", "EMPTY"),
        ({"conversations": None}, "conversations", "NOT_A_LIST"),
        ({"conversations": "[{"}, "conversations", "BAD_JSON"),
        ({"conversations": ["a"]}, "conversations[0]", "BAD_TYPE"),
        ({"conversations": [{"from": "cat", "value": "a"}]}, "conversations[0].from", "BAD_ROLE"),
        ({"conversations": [{"from": 1, "value": "a"}]}, "conversations[0].from", "BAD_ROLE"),
        ({"conversations": [{"from": "gpt", "value": 1}]}, "conversations[0].value", "NO_TEXT"),
        ({"conversations": [{"from": "gpt"}]}, "conversations[0].content", "NO_TEXT"),
        ({"conversations": [{"from": "human", "value": "a"}]}, "conversations", "NO_ASSISTANT"),
        (
            {"conversations": [{"from": "function_call", "value": "{"}]},
            "conversations[0].value",
            "BAD_JSON",
        ),
        (
            {"conversations": [{"from": "function_call", "value": "[1]"}]},
            "conversations[0].value",
            "BAD_CALL",
        ),
        (
            {"conversations": [{"from": "gpt", "value": "a", "loss": -1}]},
            "conversations[0].loss",
            "BAD_WEIGHT",
        ),
        (
            {"conversations": [{"from": "gpt", "value": "a", "loss": 0}]},
            "messages",
            "NOTHING_LEARNED",
        ),
        ({"system": 5}, "system", "NO_TEXT"),
        ({"tools": "[{]"}, "tools", "BAD_JSON"),
        ({"tools": {"a": 1}}, "tools", "BAD_TYPE"),
        ({"verl_sft": {"seed": "x"}}, "verl_sft.seed", "BAD_VALUE"),
        ({"verl_sft": 5}, "verl_sft", "BAD_TYPE"),
    ],
)
def test_damage_is_named(change: dict[str, Any], field: str, code: str) -> None:
    """Each kind of damage has its field and code."""
    with pytest.raises(BadRowError) as bad:
        read(row(**change))
    assert (bad.value.field, bad.value.code) == (field, code)
