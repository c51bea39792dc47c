"""convert, stats and filters as a user meets them: counts, splits, leaks, exit codes."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from verl_sft.cli import main
from verl_sft.config.select import SelectConfig
from verl_sft.data.fold import conversations
from verl_sft.errors import UsageError
from verl_sft.records.io import write_parquet
from verl_sft.records.read import read_records
from verl_sft.records.schema import SFTRecord
from verl_sft.records.select import balanced, condition, drop_reason, select
from verl_sft.types import Message

SAMPLE = Path(__file__).parent.parent / "data" / "sample"


def record(number: int, **given: Any) -> SFTRecord:
    chat = (Message("user", f"{number}?"), Message("assistant", f"{number}!"))
    known: dict[str, Any] = {"messages": chat, "record_id": f"r{number}", "task_id": f"t{number}"}
    return SFTRecord(**{**known, **given})


def sharegpt(path: Path, rows: int, *, bad: int = 0) -> Path:
    good = [
        {"conversations": [{"from": "human", "value": f"{n}?"}, {"from": "gpt", "value": "a"}]}
        for n in range(rows)
    ]
    path.write_text(json.dumps(good + [{"conversations": []}] * bad))
    return path


def test_foreign_rows_become_a_data_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """ShareGPT in, train and val by group out; what cannot be read is in rejected.jsonl."""
    source = sharegpt(tmp_path / "a.json", 40, bad=1)
    assert main(["convert", f"in={source}", f"out={tmp_path / 'set'}", "from=sharegpt"]) == 0
    train = list(read_records(tmp_path / "set" / "train.parquet"))
    val = list(read_records(tmp_path / "set" / "val.parquet"))
    assert (len(train), len(val)) == (36, 4)
    assert not {r.group_id for r in train} & {r.group_id for r in val}
    (bad,) = (tmp_path / "set" / "rejected.jsonl").read_text().splitlines()
    assert json.loads(bad)["row"] == 40 and json.loads(bad)["code"] == "EMPTY"
    assert "refused: EMPTY 1" in capsys.readouterr().out


def test_too_many_bad_rows_fail_the_command(tmp_path: Path) -> None:
    """Above the threshold the exit code is 3; the good rows were written all the same."""
    source = sharegpt(tmp_path / "a.json", 3, bad=3)
    out = tmp_path / "b.jsonl"
    assert main(["convert", f"in={source}", f"out={out}"]) == 3
    assert len(out.read_text().splitlines()) == 3


def test_there_and_back(tmp_path: Path) -> None:
    """Our rows to ShareGPT and back are the rows, in order."""
    middle, back = tmp_path / "a.json", tmp_path / "b.parquet"
    train = SAMPLE / "train.parquet"
    assert main(["convert", f"in={train}", f"out={middle}", "to=sharegpt"]) == 0
    assert main(["convert", f"in={middle}", f"out={back}", "dedup=false"]) == 0
    one = list(read_records(train))
    two = list(read_records(back))
    assert [r.messages for r in one] == [r.messages for r in two]
    assert [r.record_id for r in one] == [r.record_id for r in two]


def test_views_per_turn(tmp_path: Path) -> None:
    """Each learned turn becomes a record of its own, with the chat before it."""
    chat = tuple(Message(role, str(i)) for i, role in enumerate(["user", "assistant"] * 3))
    write_parquet(tmp_path / "a.parquet", [SFTRecord(messages=chat, supervise=(1, 5))])
    out = tmp_path / "b.parquet"
    assert main(["convert", f"in={tmp_path / 'a.parquet'}", f"out={out}", "view=per_turn"]) == 0
    assert [(len(r.messages), r.supervise) for r in read_records(out)] == [(2, (1,)), (6, (5,))]


def test_shuffled_steps_are_put_in_order(tmp_path: Path) -> None:
    """`order=episode` lets training fold step rows again; each learned turn stays, once."""
    rows = [
        SFTRecord(
            messages=tuple(
                Message(role, f"{name}{i}")
                for i in range(step + 1)
                for role in ("user", "assistant")
            ),
            supervise=(2 * step + 1,),
            episode_id=name,
            step=step,
        )
        for name, step in (("b", 2), ("a", 10), ("", 0), ("b", 0), ("a", 9), ("b", 1))
    ]
    write_parquet(tmp_path / "a.parquet", rows)
    for order, chats in (("as_is", 6), ("episode", 3)):
        out = tmp_path / f"{order}.parquet"
        assert (
            main(["convert", f"in={tmp_path / 'a.parquet'}", f"out={out}", f"order={order}"]) == 0
        )
        found = list(read_records(out))
        folded = list(conversations(found, multiturn=True))
        assert len(folded) == chats and sum(len(c.weights or ()) for c in folded) == 6
    names = [(r.episode_id, r.step) for r in found]
    assert names == [("b", 0), ("b", 1), ("b", 2), ("a", 9), ("a", 10), ("", 0)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["in=a.json"], "in= and out= are needed"),
        (["in=nothing.json", "out=x"], "no such file"),
        (["in={source}", "out={tmp}/x.txt", "to=sharegpt"], "cannot write '.txt' files"),
        (["in={source}", "out={tmp}/x.jsonl", "to=shargpt"], "Did you mean 'sharegpt'"),
        (["in={source}", "out={tmp}/x.jsonl", "to=raw"], "can be read, not written"),
        (["in={source}", "out={tmp}/x.jsonl", "to=userrl"], "Let out= end in .json"),
        (["in={source}", "out={tmp}/x", "select.where=1; DROP"], "select.where"),
        (["in={source}", "out={tmp}/x", "select.where='zeroblob(999999999)'"], "too big"),
    ],
)
def test_wrong_words_help(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    """Missing words, files, formats and conditions: exit code 2 or 3 and what to do."""
    source = sharegpt(tmp_path / "a.json", 2)
    code = main(["convert", *(w.format(source=source, tmp=tmp_path) for w in words)])
    assert code in (2, 3) and message in capsys.readouterr().err


def test_every_filter_names_itself() -> None:
    """A record that a filter leaves out is counted under the filter's key."""
    one = record(1, success=False, reward=0.2, action_valid=False, task_type="a", agent_name="b")
    cases: dict[str, Any] = {
        "require_success": True,
        "require_agent_success": True,
        "min_reward": 0.5,
        "min_turns": 2,
        "max_chars": 3,
        "end_marker": "STOP",
        "valid_actions": True,
        "task_types": ["x"],
        "agents": ["x"],
        "statuses": ["done"],
    }
    for key, value in cases.items():
        assert drop_reason(one, SelectConfig(**{key: value})) == key
    assert drop_reason(one, SelectConfig(max_turns=1, min_reward=0.2, task_types=["a"])) == ""


def test_an_sql_condition_is_closed() -> None:
    """Columns, functions and nulls work; anything that is no condition on columns is refused."""
    rich = condition("reward > 0.5 AND task_type LIKE 'pick%' AND turns = 1 AND chars < 9")
    assert rich(record(1, reward=0.75, task_type="pick_two"))
    assert not rich(record(1, reward=None, task_type="pick_two"))
    for text in ("nothing > 1", "1) FROM sqlite_master --", "ATTACH 'x' AS y", "reward >", "1; 2"):
        with pytest.raises(UsageError, match=r"select\.where"):
            condition(text)
    dropped: Counter[str] = Counter()
    kept = select(
        [record(1), record(2)], config=SelectConfig(where="task_id = 't2'"), dropped=dropped
    )
    assert [r.record_id for r in kept] == ["r2"] and dropped == {"where": 1}


def test_balance_takes_as_many_of_each() -> None:
    """Of the commoner agents as many records as of the rarest, the same ones every time."""
    rows = [record(n, agent_name="ab"[n % 5 == 0]) for n in range(50)]
    dropped: Counter[str] = Counter()
    kept = list(balanced(lambda: rows, by="agent_name", seed=1, dropped=dropped))
    assert Counter(r.agent_name for r in kept) == {"a": 10, "b": 10} and dropped["balance"] == 30
    assert kept == list(balanced(lambda: rows, by="agent_name", seed=1, dropped=dropped))


def test_stats_find_leaks_and_repetitions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tasks and texts on both sides, and repeated records, are said; `strict` fails on them."""
    shared = record(1, success=True, task_type="pick", agent_name="coder")
    other = record(2, success=False, agent_name="tester")
    write_parquet(tmp_path / "train.parquet", [shared, shared, other])
    other = record(9, task_id="t2", record_id="x")
    write_parquet(tmp_path / "val.parquet", [record(1), other])
    out = tmp_path / "out"
    assert main(["stats", f"in={tmp_path}", f"out={out}"]) == 0
    told = capsys.readouterr().out
    assert "attention: train: 1 records repeat the record_id of another" in told
    assert "attention: train and val share 2 tasks" in told
    assert "attention: train and val share 1 contents" in told
    found = json.loads((out / "stats.json").read_text())
    assert found["train"]["by_task_type"]["pick"]["success_rate"] == 1.0
    agents = found["train"]["by_agent_name"]
    assert {name: (a["records"], a["success_rate"]) for name, a in agents.items()} == {
        "coder": (2, 1.0),
        "tester": (1, 0.0),
    }
    turns = found["train"]["turns"]
    assert turns["histogram"] == {"1": 3} and (turns["median"], turns["mean"]) == (1, 1.0)
    assert (out / "stats.png").stat().st_size > 1000
    assert main(["stats", f"in={tmp_path}", "strict=true"]) == 3


def test_clean_data_gives_no_alarm(capsys: pytest.CaptureFixture[str]) -> None:
    """The sample data set has nothing to be said about it."""
    assert main(["stats", f"in={SAMPLE}", "strict=true"]) == 0
    assert "attention" not in capsys.readouterr().out


@pytest.mark.parametrize("content", ["", "[]", '[{"conversations": []}]'])
def test_stats_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str) -> None:
    """Without a usable row there is nothing to count: exit code 3, and why."""
    path = tmp_path / "a.json"
    path.write_text(content)
    assert main(["stats", f"in={path}", "source=sharegpt", f"out={tmp_path / 'out'}"]) == 3
    told = capsys.readouterr().err
    assert "there is no record to count" in told
    assert ("EMPTY 1" if "conv" in content else "the files are empty") in told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("fraction", "rows"), [(0, (6, 0)), (1, (0, 6)), (0.01, (5, 1))])
def test_ends_of_the_fraction(tmp_path: Path, fraction: float, rows: tuple[int, int]) -> None:
    """0 and 1 mean none and all; between them neither side is empty."""
    source, out = sharegpt(tmp_path / "a.json", 6), tmp_path / "set"
    assert main(["convert", f"in={source}", f"out={out}", f"val_fraction={fraction}"]) == 0
    found = [len(list(read_records(out / f"{s}.parquet"))) for s in ("train", "val")]
    assert tuple(found) == rows


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("convert in=nowhere.json out=o", "in: nowhere.json: no such file"),
        ("convert in={sample} out=o from=sharegt", "from=sharegt: "),
        ("convert in={sample} out=o to=sharegt", "to=sharegt: "),
        ("stats in={sample} from=sharegt", "from=sharegt: "),
        ("stats in=nowhere.json", "in: nowhere.json: no such file"),
        ("stats in={sample} against=nowhere.json", "against: nowhere.json: no such file"),
        ("stats in={sample} model=./nowhere", "model=./nowhere: no such folder"),
        ("upload in=nowhere.json uri=mongodb://h/d", "in: nowhere.json: no such file"),
        ("upload in={sample} uri=mongodb://h/d from=sharegt", "from=sharegt: "),
    ],
)
def test_wrong_words_are_named(
    words: str, told: str, capsys: pytest.CaptureFixture[str], monkeypatch: Any, tmp_path: Path
) -> None:
    """Code 2 and the word as it was typed, before anything is written."""
    monkeypatch.chdir(tmp_path)
    assert main(words.format(sample=SAMPLE).split()) == 2
    assert f"verl-sft: error: {told}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["convert", "stats", "upload"])
def test_help_shows_the_words_to_type(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`in=` and `from=`, not the fields behind them."""
    assert main([command, "--help"]) == 0
    shown = capsys.readouterr().out
    assert "\n  in=null" in shown and "\n  from=auto" in shown and "inputs=" not in shown
