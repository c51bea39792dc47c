"""Damaged rows among good ones: exactly the damaged are reported, with row, field and code.

Each damage is a function that spoils one good row and says what must be reported. Good rows come
in many shapes; none of them may be reported.
"""

from __future__ import annotations

import copy
import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.test_load import SPEC, config
from verl_sft.data.load import load_samples
from verl_sft.errors import InputError
from verl_sft.records.io import write_parquet
from verl_sft.records.parse import ReadOptions, Reject
from verl_sft.records.read import read_records
from verl_sft.records.rows import record_to_row
from verl_sft.records.schema import SFTRecord
from verl_sft.types import Message

Row = dict[str, Any]
Damage = tuple[Callable[[Row], Any], str, str]  # spoil in place (or give a line), field, code
PR_ROWS, RELEASE_ROWS = 20_000, 1_000_000


def put(path: str, value: Any) -> Callable[[Row], Any]:
    """A damage that sets one place of a row, as `messages.1.role`."""

    def spoil(row: Row) -> None:
        *parts, last = path.split(".")
        place: Any = row
        for part in parts:
            place = place[int(part)] if part.isdigit() else place[part]
        if isinstance(place, list):
            place[int(last)] = value
        else:
            place[last] = value

    return spoil


def chat(*messages: Row) -> Callable[[Row], Any]:
    """A damage that replaces the whole conversation."""

    def spoil(row: Row) -> None:
        row.clear()
        row["messages"] = list(messages)

    return spoil


def drop(path: str) -> Callable[[Row], Any]:
    """A damage that removes one key."""

    def spoil(row: Row) -> None:
        *parts, last = path.split(".")
        place: Any = row
        for part in parts:
            place = place[int(part)] if part.isdigit() else place[part]
        del place[last]

    return spoil


def line(text: str) -> Callable[[Row], str]:
    """A damage of the line itself."""
    return lambda row: text


DEEP = "[" * 50_000 + "]" * 50_000
CALL = "messages.2.tool_calls"
DAMAGES: dict[str, Damage] = {
    "not json": (line("{"), "", "BAD_JSON"),
    "cut line": (line('{"messages": [{"role": "user"'), "", "BAD_JSON"),
    "number": (line("7"), "", "NOT_AN_OBJECT"),
    "null": (line("null"), "", "NOT_AN_OBJECT"),
    "array": (line("[]"), "", "NOT_AN_OBJECT"),
    "string": (line('"text"'), "", "NOT_AN_OBJECT"),
    "NaN": (line('{"messages": NaN}'), "", "BAD_JSON"),
    "infinity": (line('{"messages": [], "reward": Infinity}'), "", "BAD_JSON"),
    "deep nesting": (line('{"messages": ' + DEEP + "}"), "", "BAD_JSON"),
    "two objects": (line('{"messages": []} {}'), "", "BAD_JSON"),
    "single quotes": (line("{'messages': []}"), "", "BAD_JSON"),
    "control character": (line('{"messages": "\x01"}'), "", "BAD_JSON"),
    "no messages": (drop("messages"), "messages", "NOT_A_LIST"),
    "messages null": (put("messages", None), "messages", "NOT_A_LIST"),
    "messages number": (put("messages", 3), "messages", "NOT_A_LIST"),
    "messages object": (put("messages", {"role": "user"}), "messages", "NOT_A_LIST"),
    "messages empty": (put("messages", []), "messages", "EMPTY"),
    "messages bad text": (put("messages", "hello"), "messages", "BAD_JSON"),
    "messages text of a number": (put("messages", "5"), "messages", "NOT_A_LIST"),
    "messages deep text": (put("messages", DEEP[:50_000]), "messages", "BAD_JSON"),
    "message null": (put("messages.1", None), "messages[1]", "BAD_TYPE"),
    "message list": (put("messages.1", []), "messages[1]", "BAD_TYPE"),
    "message bad text": (put("messages.1", "{"), "messages[1]", "BAD_JSON"),
    "role missing": (drop("messages.1.role"), "messages[1].role", "BAD_ROLE"),
    "role null": (put("messages.1.role", None), "messages[1].role", "BAD_ROLE"),
    "role number": (put("messages.1.role", 1), "messages[1].role", "BAD_ROLE"),
    "role list": (put("messages.1.role", []), "messages[1].role", "BAD_ROLE"),
    "role of another format": (put("messages.1.role", "human"), "messages[1].role", "BAD_ROLE"),
    "role in capitals": (put("messages.1.role", "User"), "messages[1].role", "BAD_ROLE"),
    "content missing": (drop("messages.1.content"), "messages[1].content", "NO_TEXT"),
    "content null": (put("messages.1.content", None), "messages[1].content", "NO_TEXT"),
    "content number": (put("messages.1.content", 1.5), "messages[1].content", "BAD_TYPE"),
    "content object": (put("messages.1.content", {"a": 1}), "messages[1].content", "BAD_TYPE"),
    "content true": (put("messages.1.content", True), "messages[1].content", "BAD_TYPE"),
    "part not an object": (put("messages.1.content", ["a"]), "messages[1].content", "BAD_TYPE"),
    "text part without text": (
        put("messages.1.content", [{"type": "text"}]),
        "messages[1].content[0]",
        "BAD_PART",
    ),
    "text part with a number": (
        put("messages.1.content", [{"type": "text", "text": "a"}, {"type": "text", "text": 1}]),
        "messages[1].content[1]",
        "BAD_PART",
    ),
    "thought number": (
        put("messages.2.reasoning_content", 1),
        "messages[2].reasoning_content",
        "BAD_TYPE",
    ),
    "calls object": (put(CALL, {"name": "f"}), "messages[2].tool_calls", "BAD_TYPE"),
    "calls bad text": (put(CALL, "[{"), "messages[2].tool_calls", "BAD_JSON"),
    "call text": (put(CALL + ".0", "f"), "messages[2].tool_calls[0]", "BAD_CALL"),
    "call without a name": (
        drop(CALL + ".0.function.name"),
        "messages[2].tool_calls[0]",
        "BAD_CALL",
    ),
    "call name null": (
        put(CALL + ".0.function.name", None),
        "messages[2].tool_calls[0]",
        "BAD_CALL",
    ),
    "call function text": (put(CALL + ".0.function", "f"), "messages[2].tool_calls[0]", "BAD_CALL"),
    "arguments bad text": (
        put(CALL + ".0.function.arguments", "{'a': 1}"),
        "messages[2].tool_calls[0].arguments",
        "BAD_JSON",
    ),
    "arguments a list": (
        put(CALL + ".0.function.arguments", [1]),
        "messages[2].tool_calls[0].arguments",
        "BAD_TYPE",
    ),
    "arguments text of a list": (
        put(CALL + ".0.function.arguments", "[1]"),
        "messages[2].tool_calls[0].arguments",
        "BAD_TYPE",
    ),
    "result of an unknown call": (
        put("messages.3.tool_call_id", "other"),
        "messages[3].tool_call_id",
        "UNKNOWN_CALL",
    ),
    "result id number": (put("messages.3.tool_call_id", 5), "messages[3].tool_call_id", "BAD_TYPE"),
    "result name object": (put("messages.3.name", {}), "messages[3].name", "BAD_TYPE"),
    "result before any call": (
        chat({"role": "tool", "content": "x"}, {"role": "assistant", "content": "y"}),
        "messages[0]",
        "TOOL_WITHOUT_CALL",
    ),
    "no answer": (chat({"role": "user", "content": "x"}), "messages", "NO_ASSISTANT"),
    "weight negative": (put("messages.2.loss", -1), "messages[2].loss", "BAD_WEIGHT"),
    "weight text": (put("messages.2.weight", "high"), "messages[2].weight", "BAD_WEIGHT"),
    "weight list": (put("messages.2.loss_mask", [1]), "messages[2].loss_mask", "BAD_WEIGHT"),
    "question learned": (put("messages.1.train", 1), "messages[1].train", "NOT_ASSISTANT"),
    "nothing learned": (
        chat({"role": "assistant", "content": "x", "loss": 0}),
        "supervise",
        "NOTHING_LEARNED",
    ),
    "supervise out of range": (put("supervise", [99]), "supervise", "BAD_INDEX"),
    "supervise a question": (put("supervise", [1]), "supervise", "BAD_INDEX"),
    "supervise text": (put("supervise", ["2"]), "supervise", "BAD_INDEX"),
    "supervise number": (put("supervise", 2), "supervise", "NOT_A_LIST"),
    "supervise nothing": (put("supervise", []), "supervise", "NOTHING_LEARNED"),
    "weights too many": (
        lambda row: row.update(supervise=[2], weights=[1, 1]),
        "weights",
        "BAD_LENGTH",
    ),
    "weights text": (lambda row: row.update(supervise=[2], weights=["a"]), "weights", "BAD_WEIGHT"),
    "sample weight negative": (put("sample_weight", -2), "sample_weight", "BAD_WEIGHT"),
    "sample weight text": (put("sample_weight", "1"), "sample_weight", "BAD_WEIGHT"),
    "tools bad text": (put("tools", "[{"), "tools", "BAD_JSON"),
    "tools number": (put("tools", 5), "tools", "NOT_A_LIST"),
    "tool number": (put("tools", [5]), "tools", "BAD_TYPE"),
    "thinking switch text": (put("enable_thinking", "maybe"), "enable_thinking", "BAD_TYPE"),
}


def good(rng: random.Random) -> Row:
    """A row with a system text, a call with its result, and a closing answer, varied."""
    words = ["apple", "naive cafe", "\u00e9\u4e16", "\U0001f600", "a\tb", "", "\u2028", "'\"\\"]
    text = lambda: " ".join(rng.choices(words, k=rng.randrange(4)))  # noqa: E731
    arguments: Any = {"at": text(), "note": rng.choice([None, 1, [1]])}
    if rng.random() < 0.3:
        arguments = json.dumps(arguments)
    function = {"name": "f", "arguments": arguments}
    row: Row = {
        "messages": [
            {"role": "system", "content": text()},
            {"role": "user", "content": text()},
            {
                "role": "assistant",
                "content": text(),
                "tool_calls": [{"id": "c1", "type": "function", "function": function}],
            },
            {"role": "tool", "tool_call_id": "c1", "content": text()},
            {"role": "assistant", "content": text(), "reasoning_content": text()},
        ]
    }
    if rng.random() < 0.3:
        row["supervise"], row["weights"] = [2, 4], [1, 0.5]
    if rng.random() < 0.3:
        row["tools"] = rng.choice([[{"type": "function"}], "[]", None])
    if rng.random() < 0.2:
        row["messages"] = json.dumps(row["messages"])
    if rng.random() < 0.2:
        row |= {"reward": rng.random(), "success": True, "unknown": {"x": None}}
    if rng.random() < 0.2:
        row["enable_thinking"] = rng.choice([True, "false", 0])
    return row


def spoiled(row: Row, damage: Damage) -> str:
    """The line of a damaged row."""
    row = copy.deepcopy(row)
    if isinstance(row["messages"], str):
        row["messages"] = json.loads(row["messages"])
    text = damage[0](row)
    return text if isinstance(text, str) else json.dumps(row)


def fuzz(path: Path, *, count: int, seed: int) -> None:
    """Write `count` rows, damage a third of them, and compare the reports with what was done."""
    rng = random.Random(seed)
    wanted = set()
    with path.open("w", encoding="utf-8") as stream:
        for number in range(count):
            row = good(rng)
            if rng.random() < 1 / 3:
                name = rng.choice(list(DAMAGES))
                wanted.add((number, *DAMAGES[name][1:]))
                stream.write(spoiled(row, DAMAGES[name]) + "\n")
            else:
                stream.write(json.dumps(row, ensure_ascii=rng.random() < 0.5) + "\n")
    bad: list[Reject] = []
    read = sum(1 for _ in read_records(path, reject=bad.append))
    found = {(b.row, b.field, b.code) for b in bad}
    assert found == wanted, f"seed {seed}: {sorted(found ^ wanted)[:5]}"
    assert read == count - len(wanted) and len(bad) == len(wanted)
    assert all(b.file == str(path) and b.message for b in bad)


def test_there_are_sixty_kinds_of_damage() -> None:
    """The table is as large as promised, and every kind is named by its own row."""
    assert len(DAMAGES) >= 60


@pytest.mark.parametrize("name", DAMAGES)
def test_each_damage_is_reported_alone(tmp_path: Path, name: str) -> None:
    """One damaged row between two good ones."""
    rng = random.Random(name)
    rows = [good(rng) for _ in range(3)]
    lines = [json.dumps(rows[0]), spoiled(rows[1], DAMAGES[name]), json.dumps(rows[2])]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n")
    bad: list[Reject] = []
    assert len(list(read_records(path, reject=bad.append))) == 2
    assert [(b.row, b.field, b.code) for b in bad] == [(1, *DAMAGES[name][1:])]


def test_many_rows(tmp_path: Path) -> None:
    """Twenty thousand rows: no report is missing, none is invented."""
    fuzz(tmp_path / "rows.jsonl", count=PR_ROWS, seed=7)


@pytest.mark.release
def test_a_million_rows(tmp_path: Path) -> None:
    """The same at release size."""
    for seed in range(RELEASE_ROWS // 50_000):
        fuzz(tmp_path / "rows.jsonl", count=50_000, seed=seed)


def own_row() -> Row:
    chat = (Message("user", "a"), Message("assistant", "b"))
    return record_to_row(SFTRecord(messages=chat, supervise=(1,), record_id="r"))


OWN_DAMAGES: dict[str, Damage] = {
    "messages not json": (put("messages_json", "{"), "messages_json", "BAD_VALUE"),
    "messages null": (put("messages_json", None), "messages_json", "BAD_VALUE"),
    "messages empty": (put("messages_json", "[]"), "messages_json", "EMPTY"),
    "role": (
        put("messages_json", '[{"role": "gpt", "content": "a"}]'),
        "messages_json[0].role",
        "BAD_ROLE",
    ),
    "tools": (put("tools_json", "{}"), "tools_json", "BAD_VALUE"),
    "meta": (put("meta_json", "[]"), "meta_json", "BAD_VALUE"),
    "extra": (put("extra_info", "{'a': 1}"), "extra_info", "BAD_VALUE"),
    "supervise": (put("supervise", [0]), "supervise", "BAD_INDEX"),
    "supervise text": (put("supervise", ["x"]), "supervise", "BAD_VALUE"),
    "success": (put("success", "yes"), "success", "BAD_VALUE"),
    "step": (put("step", 1.5), "step", "BAD_VALUE"),
    "reward": (put("reward", "much"), "reward", "BAD_VALUE"),
    "weights": (put("weights", [1, 2]), "weights", "BAD_LENGTH"),
}


@pytest.mark.parametrize("name", OWN_DAMAGES)
def test_damage_of_our_own_rows_names_the_column(tmp_path: Path, name: str) -> None:
    """Rows of our schema, as JSON lines that someone edited."""
    row = own_row()
    OWN_DAMAGES[name][0](row)
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in (own_row(), row)))
    bad: list[Reject] = []
    assert len(list(read_records(path, reject=bad.append))) == 1
    assert [(b.row, b.field, b.code) for b in bad] == [(1, *OWN_DAMAGES[name][1:])]


def test_what_only_rendering_sees_is_in_the_same_journal(tmp_path: Path) -> None:
    """A lone surrogate and a text beyond the limit are reported with file and row; NUL is text."""
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows: list[Row] = [{"messages": copy.deepcopy(chat)} for _ in range(4)]
    rows[1]["messages"][0]["content"] = "\ud835"
    rows[2]["messages"][0]["content"] = "x" * 16_000_001
    rows[3]["messages"][0]["content"] = "a\x00b"
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    store = load_samples(
        [path],
        tokenizer=SPEC,
        config=config(max_reject_fraction=0.6),
        cache_dir=tmp_path / "cache",
        num_workers=1,
    )
    journal = [json.loads(t) for t in (store.path / "rejected.jsonl").read_text().splitlines()]
    assert {(j["row"], j["code"]) for j in journal} == {(1, "bad_unicode"), (2, "TOO_LARGE")}
    assert len(store) == 2


def broken(tmp_path: Path, kind: str) -> Path:
    path = tmp_path / "train.parquet"
    write_parquet(path, [SFTRecord(messages=(Message("assistant", "b" * 500),))] * 500)
    data = path.read_bytes()
    if kind == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif kind == "no footer":
        path.write_bytes(data[:-8])
    elif kind == "bit":
        path.write_bytes(data[:200] + bytes([data[200] ^ 16]) + data[201:])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("not parquet at all")
    elif kind == "zip":
        path.write_bytes(b"PK\x03\x04" + data)
    elif kind == "cut gzip":
        path = tmp_path / "rows.jsonl.gz"
        path.write_bytes(gzip.compress(b'{"messages": []}\n' * 1000)[:-20])
    elif kind == "not gzip":
        path = tmp_path / "rows.json.gz"
        path.write_text("[]")
    elif kind == "cut array":
        path = tmp_path / "rows.json"
        path.write_text('[{"messages": [{"role": "assistant", "content": "a"}]}, {"mess')
    elif kind == "suffix":
        path = tmp_path / "rows.xlsx"
        path.write_bytes(b"x")
    elif kind == "unknown format":
        path = tmp_path / "rows.jsonl"
        path.write_text('{"riddle": "a", "answer": "b"}\n')
    return path


KINDS = ("cut", "no footer", "bit", "empty", "text", "zip", "cut gzip", "not gzip", "cut array",
         "suffix", "unknown format")  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_broken_file_is_named(tmp_path: Path, kind: str) -> None:
    """Cut, foreign and damaged files are one error with the file's name."""
    path = broken(tmp_path, kind)
    with pytest.raises(InputError, match=path.name):
        list(read_records(path, reject=lambda bad: None))


def test_shards_of_different_schemas(tmp_path: Path) -> None:
    """Each shard is read by its own columns; one without the needed column is an error."""
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    pq.write_table(pa.Table.from_pylist([{"messages": chat}]), tmp_path / "a.parquet")
    text = [{"messages": json.dumps(chat), "reward": 1.0}]
    pq.write_table(pa.Table.from_pylist(text), tmp_path / "b.parquet")
    pq.write_table(pa.Table.from_pylist([{"other": 1}]), tmp_path / "c.parquet")
    files = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    assert len({r.messages for r in read_records(files)}) == 1
    with pytest.raises(InputError, match="there is no column 'messages'"):
        list(read_records(tmp_path / "c.parquet", options=ReadOptions(multiturn=True)))
