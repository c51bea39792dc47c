"""Records: the same rows at any time, through any file, on one side of the split."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from verl_sft.errors import InputError, UsageError
from verl_sft.prompts.alfworld import DEFAULT
from verl_sft.records.build import episode_rows
from verl_sft.records.io import CSV_COLUMNS, METADATA_KEY, csv_writer, write_parquet
from verl_sft.records.parse import ReadOptions, Reject
from verl_sft.records.read import read_records
from verl_sft.records.resolve import resolve_files
from verl_sft.records.schema import COLUMNS, SFTRecord
from verl_sft.records.split import split_groups
from verl_sft.records.text import escape, unescape
from verl_sft.types import Episode, HistoryStyle, Message, Observation, Step, StopReason

# Every code point, lone surrogates and NUL included, with the ones that break files made likely.
TEXT = st.text(
    st.one_of(
        st.characters(codec=None, categories=None), st.sampled_from("\x00\x1a\r\n\t\",'=+-@")
    ),
    max_size=12,
)
F32 = st.floats(width=32, allow_nan=False, allow_infinity=False)
OBJECT = st.dictionaries(TEXT, st.none() | st.booleans() | st.integers() | TEXT, max_size=2)
CALL = st.builds(lambda name, rest: {"function": {"name": name, "arguments": rest}}, TEXT, OBJECT)
RECORDS = st.builds(
    SFTRecord,
    messages=st.lists(
        st.builds(
            Message,
            role=st.just("assistant"),
            content=TEXT,
            reasoning_content=st.none() | TEXT.filter(bool),
            tool_calls=st.none() | st.tuples(CALL),
        ),
        min_size=1,
        max_size=3,
    ).map(tuple),
    prompt=st.none() | TEXT,
    response=st.none() | TEXT,
    tools=st.none() | st.tuples(OBJECT),
    supervise=st.none() | st.just((0,)),
    weights=st.none(),
    sample_weight=F32.filter(lambda x: x >= 0),
    success=st.none() | st.booleans(),
    reward=st.none() | F32,
    action=st.none() | TEXT,
    action_valid=st.none() | st.booleans(),
    task_id=TEXT,
    seed=st.integers(-(2**63), 2**63 - 1),
    extra_info=OBJECT,
    meta=OBJECT,
)


def _episode(weights: tuple[float, ...] = (1.0, 0.0, 1.0)) -> Episode:
    steps: list[Step] = []
    for index, weight in enumerate(weights):
        seen = Observation(f"You see {index}.", "find it", ("look", "go"))
        steps.append(
            Step(
                index=index,
                observation=seen,
                prompt=DEFAULT.windowed(seen, steps, history_length=2),
                response=Message("assistant", f"<think>{index}</think>\n<action>go</action>"),
                action="go",
                action_valid=True,
                next_observation=f"You see {index + 1}.",
                reward=float(index),
                terminated=False,
                truncated=False,
                weight=weight,
            )
        )
    return Episode(
        episode_id="e1",
        env_name="toy",
        task_id="t1",
        task_type="find",
        split="train",
        seed=5,
        attempt=0,
        policy_name="p",
        prompt_template=DEFAULT.label,
        history_style=HistoryStyle.WINDOWED,
        history_length=2,
        steps=tuple(steps),
        stop_reason=StopReason.TERMINATED,
        success=True,
        reward=3.0,
    )


def _back(path: Path) -> list[SFTRecord]:
    return [dataclasses.replace(r, source="") for r in read_records(path)]


def test_step_rows_learn_each_weighted_step_once() -> None:
    """A step of weight 0 has no row, stays as context, and every row learns its last message."""
    rows = episode_rows(_episode(), DEFAULT, rows="step")
    assert [r.step for r in rows] == [0, 2]
    assert [r.supervise for r in rows] == [(1,), (5,)]
    assert all(r.messages[-1].role == "assistant" for r in rows)
    assert rows[1].messages[3] == _episode().steps[1].response
    assert rows[1].prompt == _episode().steps[2].prompt[0].content
    assert rows[1].response == _episode().steps[2].response.content


def test_episode_row_learns_the_same_turns() -> None:
    """The episode row supervises exactly the turns that step rows learn, and carries weights."""
    (row,) = episode_rows(_episode(), DEFAULT, rows="episode")
    assert (row.supervise, row.weights) == ((1, 5), None)
    (row,) = episode_rows(_episode((0.5, 1.0)), DEFAULT, rows="episode")
    assert (row.supervise, row.weights) == ((1, 3), (0.5, 1.0))
    assert episode_rows(_episode((0.0, 0.0)), DEFAULT, rows="episode") == []


@pytest.mark.parametrize("rows", ["step", "episode"])
def test_rows_rebuilt_from_raw_json_are_equal(rows: str) -> None:
    """Raw JSON is lossless: rows built from it later are the rows built at once."""
    episode = _episode()
    raw = json.loads(json.dumps(episode.to_json()))
    assert episode_rows(Episode.from_json(raw), DEFAULT, rows=rows) == episode_rows(
        episode, DEFAULT, rows=rows
    )


def test_record_id_follows_what_is_trained() -> None:
    """Another seed keeps the id; another answer changes it."""
    first = episode_rows(_episode(), DEFAULT, rows="step")[0]
    same = episode_rows(dataclasses.replace(_episode(), seed=9), DEFAULT, rows="step")[0]
    other = episode_rows(_episode((1.0,)), DEFAULT, rows="episode")[0]
    assert first.record_id == same.record_id != other.record_id


@given(TEXT)
def test_escape_is_reversible(text: str) -> None:
    """Any string survives, as valid UTF-8 without NUL."""
    assert unescape(escape(text)) == text
    assert b"\x00" not in escape(text).encode("utf-8")


def write_csv(path: Path, records: list[SFTRecord], *, spreadsheet_safe: bool = False) -> None:
    with csv_writer(path, spreadsheet_safe=spreadsheet_safe) as write:
        for record in records:
            write(record)


@settings(max_examples=60, deadline=None)
@given(st.lists(RECORDS, max_size=4))
def test_every_format_gives_back_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, records: list[SFTRecord]
) -> None:
    """reader(writer(x)) == x for parquet, CSV, and CSV made safe for spreadsheets."""
    folder = tmp_path_factory.mktemp("rt")
    write_parquet(folder / "a.parquet", records)
    write_csv(folder / "a.csv", records)
    write_csv(folder / "s.csv", records, spreadsheet_safe=True)
    assert _back(folder / "a.parquet") == records
    assert _back(folder / "a.csv") == records
    assert _back(folder / "s.csv") == records
    frame = pd.read_csv(folder / "a.csv", dtype=str, keep_default_na=False)
    assert frame.shape == (len(records), len(CSV_COLUMNS))
    actions = [escape(r.action or "") or ("" if r.action is None else "\x1a") for r in records]
    assert frame["action"].tolist() == actions


def test_spreadsheet_mode_neutralises_formulas(tmp_path: Path) -> None:
    """No cell begins like a formula in the safe mode; without it they do (negative control)."""
    record = SFTRecord(messages=(Message("assistant", "x"),), action="=1+1", task_id="@x")
    for safe in (True, False):
        write_csv(tmp_path / "a.csv", [record], spreadsheet_safe=safe)
        frame = pd.read_csv(tmp_path / "a.csv", dtype=str, keep_default_na=False)
        starts = [str(v)[:1] in "=+-@" for v in frame.iloc[0] if v]
        assert any(starts) is not safe


def test_parquet_bytes_are_a_function_of_the_rows(tmp_path: Path) -> None:
    """Same rows, same bytes; the schema is COLUMNS; stock readers see role and content."""
    rows = episode_rows(_episode(), DEFAULT, rows="step")
    for name in ("a", "b"):
        write_parquet(tmp_path / f"{name}.parquet", rows, metadata={"config": {"seed": 1}})
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
    kept = json.loads(pq.read_schema(tmp_path / "a.parquet").metadata[METADATA_KEY])
    assert kept["config"] == {"seed": 1}
    frame = pd.read_parquet(tmp_path / "a.parquet")
    assert list(frame.columns) == list(COLUMNS)
    assert [m["role"] for m in frame["messages"][0]] == ["user", "assistant"]
    assert frame["response_data"][0] == {"content": rows[0].response}


def test_a_flipped_bit_is_noticed_or_harmless(tmp_path: Path) -> None:
    """After a flip in the pages, reading fails with the file's name or gives the true rows."""
    path = tmp_path / "a.parquet"
    rows = episode_rows(_episode(), DEFAULT, rows="step")
    write_parquet(path, rows)
    good = path.read_bytes()
    end = len(good) - 8 - int.from_bytes(good[-8:-4], "little")
    caught = 0
    for position in range(4, end, 11):
        data = bytearray(good)
        data[position] ^= 1 << position % 8
        path.write_bytes(data)
        try:
            assert _back(path) == rows, f"byte {position} changed the rows unnoticed"
        except InputError as error:
            assert str(path) in str(error)
            caught += 1
    assert caught > 50


def test_reading_streams(tmp_path: Path) -> None:
    """Records come before the file is read to its end: many rows, one batch at a time."""
    path = tmp_path / "a.parquet"
    row = episode_rows(_episode(), DEFAULT, rows="step")[0]
    write_parquet(path, (dataclasses.replace(row, seed=n) for n in range(12_000)))
    assert pq.ParquetFile(path).num_row_groups == 2
    reader = read_records(path)
    assert [next(reader).seed for _ in range(3)] == [0, 1, 2]
    assert sum(1 for _ in reader) == 11_997


def _write(path: Path, rows: list[dict[str, Any]]) -> Path:
    pd.DataFrame(rows).to_parquet(path)
    return path


CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("messages", CHAT),
        ("messages", json.dumps(CHAT)),
        ("messages", np.array(CHAT, dtype=object)),
        ("chat", [json.dumps(m) for m in CHAT]),
    ],
)
def test_verl_messages_in_every_encoding(tmp_path: Path, column: str, value: Any) -> None:
    """A struct list, JSON text, a numpy array and a list of JSON texts are the same messages."""
    path = _write(tmp_path / "v.parquet", [{column: value, "reward": float("nan")}])
    options = ReadOptions(multiturn=True, messages_key=column)
    (record,) = read_records(path, options=options)
    assert [(m.role, m.content) for m in record.messages] == [("user", "q"), ("assistant", "a")]
    assert record.reward is None and record.supervise is None
    assert record.source == "v.parquet:0"


@pytest.mark.parametrize(
    ("prompt", "keys"),
    [
        ("q", None),
        ({"content": "q"}, None),
        ({"a": {"b": "q"}}, ("a", "b")),
        ([{"role": "user", "content": "q"}], None),
    ],
)
def test_verl_pairs_in_every_encoding(tmp_path: Path, prompt: Any, keys: Any) -> None:
    """Text, a struct, a key path and a list of messages give the same pair."""
    path = _write(tmp_path / "v.parquet", [{"prompt": prompt, "response": "a"}])
    options = ReadOptions(prompt_key="prompt", response_key="response", prompt_dict_keys=keys)
    (record,) = read_records(path, options=options)
    assert (record.prompt, record.response, record.supervise) == ("q", "a", (1,))


def test_tools_lose_only_the_nulls_that_arrow_invented(tmp_path: Path) -> None:
    """Keys of another row's tool do not appear; a null inside JSON text stays."""
    tools = [[{"name": "f", "only_f": 1}], [{"name": "g", "only_g": 2}]]
    path = _write(tmp_path / "t.parquet", [{"messages": CHAT, "tools": t} for t in tools])
    read = list(read_records(path, options=ReadOptions(multiturn=True)))
    assert [list(r.tools or ()) for r in read] == tools
    text = json.dumps([{"name": "f", "default": None}])
    path = _write(tmp_path / "j.parquet", [{"messages": CHAT, "tools": text}])
    (record,) = read_records(path, options=ReadOptions(multiturn=True))
    assert record.tools == ({"name": "f", "default": None},)


@pytest.mark.parametrize("alias", ["loss_mask", "loss", "weight", "loss_weight", "trainable"])
def test_message_flags_decide_what_is_learned(tmp_path: Path, alias: str) -> None:
    """A per-message flag under any of its names becomes supervise and weights."""
    chat = [*CHAT, *CHAT, *CHAT]
    flags = [0, 0, 0, 1, 0, 0.5]
    value = [{**m, alias: f} for m, f in zip(chat, flags, strict=True)]
    path = _write(tmp_path / "f.parquet", [{"messages": json.dumps(value)}])
    (record,) = read_records(path, options=ReadOptions(multiturn=True))
    assert (record.supervise, record.weights) == ((3, 5), (1.0, 0.5))


BAD = [
    ("EMPTY", []),
    ("NOT_A_LIST", "7"),
    ("BAD_JSON", "[{"),
    ("BAD_JSON", "[" * 100_000),
    ("BAD_JSON", '[{"role": "user", "content": NaN}]'),
    ("BAD_TYPE", "[3]"),
    ("BAD_ROLE", '[{"role": "gpt", "content": "x"}]'),
    ("NO_TEXT", '[{"role": "user"}]'),
    ("NO_ASSISTANT", '[{"role": "user", "content": "x"}]'),
    ("NOT_ASSISTANT", '[{"role": "user", "content": "x", "loss": 1}]'),
    ("BAD_WEIGHT", '[{"role": "assistant", "content": "x", "loss": -1}]'),
    ("NOTHING_LEARNED", '[{"role": "assistant", "content": "x", "loss": 0}]'),
    ("BAD_TYPE", '[{"role": "assistant", "content": 5}]'),
]


def test_bad_rows_are_reported_and_the_good_ones_come(tmp_path: Path) -> None:
    """Each bad row is one reject with file, row, field and code; the stream goes on."""
    values = [v if isinstance(v, str) else json.dumps(v) for _, v in BAD]
    rows = [{"messages": v} for v in [*values, json.dumps(CHAT)]]
    path = _write(tmp_path / "bad.parquet", rows)
    rejects: list[Reject] = []
    options = ReadOptions(multiturn=True)
    (good,) = read_records(path, options=options, reject=rejects.append)
    assert good.source == f"bad.parquet:{len(BAD)}"
    assert [(r.row, r.code) for r in rejects] == [(i, code) for i, (code, _) in enumerate(BAD)]
    assert all(r.file == str(path) and r.field for r in rejects)
    with pytest.raises(InputError, match=r"bad\.parquet:0:messages"):
        list(read_records(path, options=options))


def test_a_missing_column_names_what_is_there(tmp_path: Path) -> None:
    """The error has the file, the column, the columns that are there and the key to set."""
    path = _write(tmp_path / "v.parquet", [{"question": "q", "messages": CHAT}])
    with pytest.raises(InputError) as caught:
        list(read_records(path, options=ReadOptions()))
    for part in (str(path), "'prompt_data'", "messages, question", "data.prompt_key", "multiturn"):
        assert part in str(caught.value)


def test_episode_rows_have_no_single_turn_pair(tmp_path: Path) -> None:
    """Asked for pairs, a file of whole episodes is refused row by row, with the two ways out."""
    path = tmp_path / "e.parquet"
    write_parquet(path, episode_rows(_episode(), DEFAULT, rows="episode"))
    rejects: list[Reject] = []
    assert list(read_records(path, options=ReadOptions(), reject=rejects.append)) == []
    assert rejects[0].code == "NO_PROMPT" and "multiturn" in rejects[0].fix
    assert len(list(read_records(path, options=ReadOptions(multiturn=True)))) == 1


def test_unstorable_records_are_refused(tmp_path: Path) -> None:
    """A seed beyond int64 or NaN in JSON is an error, and the old file stays as it was."""
    path = tmp_path / "a.parquet"
    good = SFTRecord(messages=(Message("assistant", "x"),))
    write_parquet(path, [good])
    before = path.read_bytes()
    for bad in ({"seed": 2**63}, {"meta": {"x": float("nan")}}):
        with pytest.raises(InputError):
            write_parquet(path, [good, dataclasses.replace(good, **bad)])
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.parquet"]


def test_files_that_are_not_parquet(tmp_path: Path) -> None:
    """Garbage, a truncated file and a foreign CSV are one-line errors that name the file."""
    write_parquet(tmp_path / "ok.parquet", [])
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "ok.parquet").read_bytes()[:-9])
    (tmp_path / "x.parquet").write_bytes(b"hello")
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    (tmp_path / "x.txt").write_text("x")
    for name in ("cut.parquet", "x.parquet", "x.csv", "x.txt"):
        with pytest.raises(InputError, match=name.replace(".", r"\.")):
            list(read_records(tmp_path / name))
    assert list(read_records(tmp_path / "ok.parquet")) == []


def test_resolve_files(tmp_path: Path) -> None:
    """A data directory, shards, a glob, a file and a list of these; nothing there is an error."""
    data = tmp_path / "d"
    data.mkdir()
    for name in ("train.parquet", "val-00000-of-2.parquet", "val-00001-of-2.parquet"):
        (data / name).touch()
    assert [p.name for p in resolve_files(data, split="train")] == ["train.parquet"]
    assert len(resolve_files(data, split="val")) == 2
    assert len(resolve_files(str(data / "val-*.parquet"), split="train")) == 2
    assert len(resolve_files([data, data / "train.parquet"], split="train")) == 2
    assert resolve_files(f"{tmp_path}/*", split="train") == [data / "train.parquet"]  # folders too
    for spec in (tmp_path, tmp_path / "no.parquet"):
        with pytest.raises(UsageError):
            resolve_files(spec, split="train")


GROUPS = st.dictionaries(st.text(max_size=6), st.sampled_from("abc"), max_size=40)


@example({"g": "a", "h": "a"}, 1.0, 0)
@given(GROUPS, st.floats(0, 1), st.integers(0, 5))
def test_split_is_by_group(groups: dict[str, str], fraction: float, seed: int) -> None:
    """Disjoint and complete; exact in number; both sides filled when they can be."""
    split = split_groups(groups, val_fraction=fraction, seed=seed)
    assert split.overlap == 0 and split.train | split.val == set(groups)
    if fraction == 1:  # asked for in so many words
        assert not split.train and "all rows are for validation" in split.note
    elif len(groups) >= 2 and fraction > 0:
        assert split.train and split.val and not split.note
        wanted = min(max(round(fraction * len(groups)), 1), len(groups) - 1)
        assert len(split.val) == wanted
        for kind in "abc":
            size = sum(k == kind for k in groups.values())
            held = sum(groups[g] == kind for g in split.val)
            assert abs(held - wanted * size / len(groups)) < 1 + 1e-9
    else:
        assert not split.val and (split.note or fraction == 0)


@given(GROUPS, st.randoms())
def test_split_ignores_the_order_of_groups(groups: dict[str, str], rng: Any) -> None:
    """The same groups in another order are divided alike."""
    items = list(groups.items())
    rng.shuffle(items)
    assert split_groups(groups, val_fraction=0.3, seed=1) == split_groups(
        dict(items), val_fraction=0.3, seed=1
    )


def test_split_depends_on_the_seed() -> None:
    """Negative control: over a few seeds the held-out groups differ."""
    groups = {str(n): "a" for n in range(30)}
    held = {split_groups(groups, val_fraction=0.1, seed=s).val for s in range(5)}
    assert len(held) > 1


def test_arrow_types_follow_the_schema() -> None:
    """The Arrow schema spells exactly the types of COLUMNS."""
    from verl_sft.records.io import arrow_schema

    spelled = {f.name: str(f.type).replace("element", "item") for f in arrow_schema()}
    assert spelled["messages"].startswith("list<") and spelled["seed"] == "int64"
    assert list(spelled) == list(COLUMNS) and pa.types.is_float32(
        arrow_schema().field("reward").type
    )


def test_the_sample_set_is_in_the_format() -> None:
    """The rows of `data/sample` read back, CSV equals parquet, sides share no task, docs agree."""
    data = Path(__file__).parent.parent / "data"
    groups = []
    for side in ("train", "val"):
        rows = _back(data / "sample" / f"{side}.parquet")
        assert rows and rows == _back(data / "sample" / f"{side}.csv")
        assert all(r.success and r.response and r.action_valid for r in rows)
        groups.append({r.group_id for r in rows})
    assert not groups[0] & groups[1]
    readme = (data / "README.md").read_text()
    assert [c for c in COLUMNS if f"`{c}`" not in readme] == []
    assert sum(p.stat().st_size for p in (data / "sample").iterdir()) < 200 * 1024
