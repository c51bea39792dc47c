"""`data.val_size`: whole groups leave the training files for validation, chosen by a hash."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from verl_sft.config.load import load_config
from verl_sft.config.train import DataConfig, MultiturnConfig, TrainConfig
from verl_sft.data.sources import open_sources
from verl_sft.errors import UsageError
from verl_sft.records.build import group_of
from verl_sft.records.mix import Source, read_mix
from verl_sft.records.parse import ReadOptions
from verl_sft.records.schema import SFTRecord

CHATS = MultiturnConfig(enable=True)
OPTIONS = ReadOptions(multiturn=True)


def write(path: Path, rows: int, **more: Callable[[int], Any]) -> Path:
    """Rows that ask different things, with more columns by number of the row."""
    lines = [
        {
            "messages": [
                {"role": "user", "content": f"{path.stem} {n}?"},
                {"role": "assistant", "content": "4"},
            ],
            **{key: column(n) for key, column in more.items()},
        }
        for n in range(rows)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def sides(
    tmp_path: Path, spec: Any, size: float, **more: Any
) -> tuple[list[SFTRecord], list[SFTRecord]]:
    config = DataConfig(train_files=spec, val_size=size, multiturn=CHATS, **more)
    train, val = open_sources(config, cache=tmp_path / "cache")
    assert list(val) == [""]
    return list(read_mix(train, options=OPTIONS)), list(read_mix(val[""], options=OPTIONS))


@pytest.mark.parametrize(("size", "wanted"), [(0.1, 20), (0.5, 100), (30, 30), (1, 1), (199, 199)])
def test_shares_and_counts(tmp_path: Path, size: float, wanted: int) -> None:
    """Rows without groups: as many as asked for; each row is on one side."""
    path = write(tmp_path / "rows.jsonl", 200)
    train, val = sides(tmp_path, str(path), size)
    assert len(val) == wanted and len(train) == 200 - wanted
    assert len({r.source for r in [*train, *val]}) == 200


def test_groups_stay_whole(tmp_path: Path) -> None:
    """Rows of a task are all on one side; the number of rows comes as near as groups allow."""
    path = write(tmp_path / "rows.jsonl", 100, group_id=lambda n: f"task {n % 10}")
    train, val = sides(tmp_path, str(path), 0.2)
    assert len(val) == 20
    assert not {group_of(r) for r in train} & {group_of(r) for r in val}
    _, other = sides(tmp_path, str(path), 0.2, val_seed=2)
    assert {group_of(r) for r in val} != {group_of(r) for r in other}


def test_turns_of_one_chat_stay_together(tmp_path: Path) -> None:
    """Rows that hold the same chat up to different turns begin alike, and are one group."""
    chats = [
        [{"role": r, "content": f"{n} {i}"} for i, r in enumerate(["user", "assistant"] * turns)]
        for n in range(20)
        for turns in (1, 2, 3)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    train, val = sides(tmp_path, str(path), 0.25)
    openings = [{r.messages[0].content for r in side} for side in (train, val)]
    assert len(val) == 15 and not openings[0] & openings[1]


def test_caps_come_first_and_the_order_of_files_does_not_matter(tmp_path: Path) -> None:
    """A capped source gives no other rows to validation, and a row's side is its own."""
    a, b = write(tmp_path / "a.jsonl", 50), write(tmp_path / "b.jsonl", 50)
    spec: list[Any] = [{"path": str(a), "max_rows": 10, "repeat": 2}, {"path": str(b)}]
    train, val = sides(tmp_path, spec, 0.5)
    first = {r.source for r in [*train, *val] if r.source.startswith("a")}
    assert first == {f"a.jsonl:{n}" for n in range(10)}
    turned, again = sides(tmp_path, spec[::-1], 0.5)
    assert {r.source for r in again} == {r.source for r in val}
    assert {r.source for r in turned} == {r.source for r in train}


def test_the_cut_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks and restarts that find the cut do not read the rows again; changed files are read."""
    path = write(tmp_path / "rows.jsonl", 20)
    config = DataConfig(train_files=str(path), val_size=5, multiturn=CHATS)
    first = open_sources(config, cache=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("verl_sft.records.hold_out.read_mix", lambda *a, **k: pytest.fail("read"))
        assert open_sources(config, cache=tmp_path) == first
    write(path, 40)
    train, _ = open_sources(config, cache=tmp_path)
    assert train[0].split_cut != first[0][0].split_cut


@pytest.mark.parametrize(
    ("rows", "size", "group", "said"),
    [(10, 10, "", "10 usable rows"), (10, 0.5, "one", "10 rows of one group"), (0, 0.5, "", "0")],
)
def test_nothing_would_be_left(
    tmp_path: Path, rows: int, size: float, group: str, said: str
) -> None:
    """The error names both numbers; a group is never divided to satisfy a share."""
    path = write(tmp_path / "rows.jsonl", rows, group_id=lambda n: group)
    with pytest.raises(UsageError, match=said):
        sides(tmp_path, str(path), size)


def test_two_ways_to_validate_are_one_too_many() -> None:
    """Beside `data.val_files` or a filter of documents the key is refused, not ignored."""
    for word in ("data.val_files=b.parquet", "data.mongo.val_filter={split: valid}"):
        with pytest.raises(UsageError, match="Take one out"):
            load_config(TrainConfig, ["data.train_files=a", "data.val_size=0.1", word])
    load_config(TrainConfig, ["data.train_files=a", "data.val_size=0.1", "data.val_files=none"])
    with pytest.raises(UsageError, match="at least 0"):
        load_config(TrainConfig, ["data.val_size=-1"])


def test_users_cannot_choose_sides(tmp_path: Path) -> None:
    """The fields that divide files are not part of what a source can be told."""
    with pytest.raises(UsageError, match="side"):
        open_sources(DataConfig(train_files={"path": "a", "side": "val"}), cache=tmp_path)
    assert Source((tmp_path,)).side == ""
