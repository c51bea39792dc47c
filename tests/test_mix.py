"""Mixes of data sets: shares, caps, weights and limits, exact and repeatable."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.test_load import SPEC, config
from verl_sft.data.load import load_samples
from verl_sft.errors import UsageError
from verl_sft.records.mix import mix_lines, read_mix, resolve_sources
from verl_sft.records.parse import ReadOptions
from verl_sft.records.schema import SFTRecord


def sharegpt(path: Path, count: int, *, words: int = 1) -> str:
    turns = [
        [{"from": "human", "value": f"{n}?"}, {"from": "gpt", "value": " ".join([str(n)] * words)}]
        for n in range(count)
    ]
    path.write_text(json.dumps([{"conversations": t} for t in turns]))
    return str(path)


def taken(spec: Any) -> tuple[list[SFTRecord], Counter[str]]:
    counts: Counter[str] = Counter()
    sources = resolve_sources(spec, split="train")
    options = ReadOptions(multiturn=True)
    return list(read_mix(sources, options=options, counts=counts)), counts


def test_shares_caps_and_weights(tmp_path: Path) -> None:
    """A third of one set, a cap on another, a third one twice at half weight; the mix is told."""
    spec = [
        {"path": sharegpt(tmp_path / "a.json", 300), "fraction": 0.35, "name": "travel"},
        {"path": sharegpt(tmp_path / "b.json", 300), "max_rows": 20},
        {"path": sharegpt(tmp_path / "c.json", 10), "repeat": 2, "weight": 0.5, "name": "c"},
    ]
    records, counts = taken(spec)
    travel = [r for r in records if r.data_source == "travel"]
    assert 75 <= len(travel) <= 135 and travel == taken(spec[:1])[0]
    assert [r.source for r in records if r.source.startswith("b")][-1] == "b.json:19"
    doubled = [r for r in records if r.data_source == "c"]
    assert len(doubled) == 20 and {r.sample_weight for r in doubled} == {0.5}
    assert counts["b.json:read"] == 300 and counts["b.json:taken"] == 20
    lines = mix_lines(counts)
    assert lines[1].startswith("mix: b.json: 20 of 300 records, ")
    assert taken([{**spec[0], "seed": 2}])[0] != travel


def test_one_whole_source_needs_no_line(tmp_path: Path) -> None:
    """Nothing is said about a mix that is none."""
    assert mix_lines(taken(sharegpt(tmp_path / "a.json", 3))[1]) == []


def test_a_mix_trains_with_its_own_length_limit(tmp_path: Path) -> None:
    """Formats are recognised per source; a limit of one source drops its samples alone."""
    spec = [
        {"path": sharegpt(tmp_path / "long.json", 4, words=30), "max_length": 60},
        {"path": sharegpt(tmp_path / "free.json", 3, words=30), "weight": 2},
    ]
    store = load_samples(
        resolve_sources(spec, split="train"),
        tokenizer=SPEC,
        config=config(),
        cache_dir=tmp_path / "cache",
        num_workers=1,
    )
    assert len(store) == 3 and store.report.dropped == {"dropped_too_long": 4}
    assert {float(w) for w in store[0].weights} == {0.0, 2.0}
    assert store.report.mix["free.json:taken"] == 3


def test_history_can_be_masked_for_every_format(tmp_path: Path) -> None:
    """`mask_history` learns the last answer alone, per source or for all."""
    turns = [
        {"from": who, "value": text}
        for who, text in (("human", "a"), ("gpt", "b"), ("human", "c"), ("gpt", "d"))
    ]
    (tmp_path / "a.json").write_text(json.dumps([{"conversations": turns}]))
    path = str(tmp_path / "a.json")
    assert taken(path)[0][0].supervise is None
    assert taken({"path": path, "mask_history": True})[0][0].supervise == (3,)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"path": "a.json", "fractoin": 1}, "unknown field of a data source 'fractoin'"),
        ({"fraction": 1}, "a data source without a path"),
        ({"path": "a.json", "fraction": 1.5}, "fraction=1.5: out of range"),
        ({"path": "a.json", "repeat": 0}, "repeat=0: out of range"),
        ({"path": "a.json", "weight": -1}, "weight=-1: out of range"),
        ({"path": "a.json", "fraction": "half"}, "fraction='half': must be a number"),
        ({"path": "a.json", "repeat": 1.5}, "repeat=1.5: must be a whole number"),
        ({"path": "a.json", "mask_history": "false"}, "must be true or false"),
        ({"path": "a.json", "columns": "x"}, "columns='x': not an object of names"),
        ({"path": {"path": "a.json"}}, "names no file"),
        (5, "5 names no file"),
        ([None], "None names no file"),
    ],
)
def test_wrong_sources_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: Any, message: str
) -> None:
    """Unknown fields and values out of range."""
    sharegpt(tmp_path / "a.json", 1)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=message):
        resolve_sources(spec, split="train")
