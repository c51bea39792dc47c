"""A user's own function as a data format: records, dicts, several, none, and its failures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from verl_sft.errors import UsageError
from verl_sft.records.parse import ReadOptions, Reject
from verl_sft.records.read import read_records

READER = """
from verl_sft.records.schema import SFTRecord
from verl_sft.types import Message

def pairs(row):
    if row["q"] == "skip":
        return None
    chat = (Message("user", row["q"]), Message("assistant", row["a"]))
    return [SFTRecord(messages=chat), {"messages": [m.to_json() for m in chat]}]

def one_by_one(row):
    yield from pairs(row) or ()

def leaves(row):
    raise SystemExit(3)

notes = "no function"
"""


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(READER)
    path = tmp_path / "rows.jsonl"
    given: list[dict[str, Any]] = [{"q": "a", "a": "b"}, {"q": "skip"}, {"q": "no answer"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in given))
    return path


def test_a_function_reads_rows(rows: Path) -> None:
    """Records and plain dicts come out, a row can be left out, a failure names row and cause."""
    options = ReadOptions(multiturn=True, format=f"{rows.parent / 'mine.py'}:pairs")
    bad: list[Reject] = []
    found = list(read_records(rows, options=options, reject=bad.append))
    assert [r.source for r in found] == ["rows.jsonl:0", "rows.jsonl:0"]
    assert found[0].messages == found[1].messages
    (reject,) = bad
    assert (reject.row, reject.code) == (2, "READER_FAILED") and "KeyError: 'a'" in reject.message


def test_a_generator_is_a_list(rows: Path) -> None:
    """What it yields are the row's records; what it raises refuses the row, as `sys.exit` does."""
    for name, count, code in (("one_by_one", 2, "KeyError"), ("leaves", 0, "SystemExit")):
        options = ReadOptions(multiturn=True, format=f"{rows.parent / 'mine.py'}:{name}")
        bad: list[Reject] = []
        assert len(list(read_records(rows, options=options, reject=bad.append))) == count
        assert bad[-1].code == "READER_FAILED" and code in bad[-1].message


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (":pairs", "cannot load the data format"),
        ("{folder}/leaves.py:pairs", "leaves.py: the file cannot be run: SystemExit"),
        ("nothing.py:pairs", "no such file"),
        ("{folder}/mine.py:pears", "cannot load the data format"),
        ("{folder}/mine.py:notes", "is not a function"),
        ("shargpt", "Did you mean 'sharegpt'"),
    ],
)
def test_a_wrong_name_is_an_error(rows: Path, name: str, message: str) -> None:
    """Missing files and attributes, values that are no function, unknown names."""
    (rows.parent / "leaves.py").write_text("raise SystemExit(3)")
    options = ReadOptions(multiturn=True, format=name.format(folder=rows.parent))
    with pytest.raises(UsageError, match=message):
        list(read_records(rows, options=options))
