"""Files that are published together: whoever dies where, a reader finds the old set or the new."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from verl_sft.cli import main
from verl_sft.config.train import TrainConfig
from verl_sft.errors import InputError
from verl_sft.records import convert
from verl_sft.records.convert import ConvertReport, write_split
from verl_sft.records.file_set import COMMITTED, check_versions, publishing_set, settle, versions_of
from verl_sft.records.read import read_records
from verl_sft.records.resolve import held_out_files, resolve_files
from verl_sft.records.schema import SFTRecord
from verl_sft.trainer import inputs
from verl_sft.trainer.inputs import read_splits
from verl_sft.types import Message

CALLS = ("open", "fsync", "replace", "rename", "mkdir", "rmdir", "unlink")


def write(folder: Path, label: str, *, rows: int = 8) -> None:
    """A converted set whose every record carries `label`."""
    made = [
        SFTRecord(
            messages=(Message("user", f"{label} {i}"), Message("assistant", "a")),
            record_id=f"{label}{i}",
            group_id=str(i),
            data_source=label,
        )
        for i in range(rows)
    ]
    write_split(
        folder, lambda: made, val_fraction=0.25, seed=1, report=ConvertReport(), reject=print
    )


def labels(folder: Path) -> tuple[set[str], set[str]]:
    """What the sides hold, as a command would read them."""
    found = [
        {r.data_source for r in read_records(files)}
        for files in (resolve_files(str(folder), split="train"), held_out_files(str(folder)))
    ]
    return found[0], found[1]


def child(work: Callable[[], None]) -> int:
    """Run `work` in a forked process; its id."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return pid


def dying_at(number: int) -> None:
    """Let this process die just before write number `number`, without any clean-up."""
    count = [0]

    def wrapped(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            count[0] += 1
            if count[0] > number:
                os._exit(9)
            return function(*args, **kwargs)

        return call

    for name in CALLS:
        setattr(os, name, wrapped(getattr(os, name)))


@pytest.mark.parametrize("before", [False, True])
def test_death_at_every_write(tmp_path: Path, before: bool) -> None:
    """Whichever system call is the last: never train of one set beside val of another."""
    seen: Counter[str] = Counter()
    for number in range(200):
        folder = tmp_path / str(number)
        if before:
            write(folder, "old")

        def work(folder: Path = folder, number: int = number) -> None:
            dying_at(number)
            write(folder, "new")

        _, status = os.waitpid(child(work), 0)
        code = os.waitstatus_to_exitcode(status)
        assert code in (0, 9)
        if (folder / "train.parquet").exists() or (folder / COMMITTED).exists():
            train, val = labels(folder)
            assert train == val and len(train) == 1, (number, train, val)
            seen.update(train)
        else:
            assert not before and not (folder / "val.parquet").exists()
            seen["nothing"] += 1
        write(folder, "last")  # goes on, and clears what was left
        assert labels(folder) == ({"last"}, {"last"})
        assert sorted(p.name for p in folder.iterdir()) == [
            "train.csv", "train.parquet", "val.csv", "val.parquet"
        ]  # fmt: skip
        if code == 0:
            break
    assert number > 20 and seen["new"] > 5 and seen["old" if before else "nothing"] > 10, seen


def test_kills_at_any_moment(tmp_path: Path) -> None:
    """A writer that is killed again and again, and readers beside it, never mix sets."""
    rng = random.Random(3)
    write(tmp_path / "set", "0")
    for turn in range(12):

        def work(turn: int = turn) -> None:
            for number in range(1000):
                write(tmp_path / "set", f"{turn}.{number}")

        pid = child(work)
        time.sleep(rng.uniform(0.01, 0.2))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        train, val = labels(tmp_path / "set")
        assert train == val and len(train) == 1


def test_two_readers_may_settle_at_once(tmp_path: Path) -> None:
    """Settling twice is settling once; a living writer's folder is left alone."""
    with publishing_set(tmp_path) as mine:
        (mine / "a").write_text("mine")
        with publishing_set(tmp_path) as other:
            (other / "a").write_text("other")
        assert mine.exists() and (tmp_path / "a").read_text() == "other"
    assert (tmp_path / "a").read_text() == "mine"
    (tmp_path / COMMITTED).mkdir()
    (tmp_path / COMMITTED / "a").write_text("new")
    settle(tmp_path)
    settle(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_text() == "new"


def test_what_cannot_be_moved_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the reader may not write, a half published set is an error, not a mixture."""
    write(tmp_path, "old")
    (tmp_path / COMMITTED).mkdir()
    (tmp_path / COMMITTED / "train.parquet").write_bytes(b"new")

    def refuse(*args: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(InputError, match="cannot be moved"):
        labels(tmp_path)


@pytest.mark.parametrize("moved", [True, False])
def test_a_set_published_between_two_files_is_seen(tmp_path: Path, moved: bool) -> None:
    """Old train beside new val is an error, also where the new set is not yet at its names."""
    write(tmp_path, "old")
    files = [tmp_path / "train.parquet", tmp_path / "val.parquet"]
    before = versions_of(files)
    assert labels(tmp_path) == ({"old"}, {"old"})
    check_versions(before)  # nobody wrote: negative control
    write(tmp_path if moved else tmp_path / "new", "new")
    if not moved:
        (tmp_path / "new").rename(tmp_path / COMMITTED)
    with pytest.raises(InputError, match="written to while"):
        check_versions(before)
    assert labels(tmp_path) == ({"new"}, {"new"})


def test_training_refuses_halves_of_two_sets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pair that is published between the reading of train and of val ends the run."""
    write(tmp_path, "old")
    sides = []

    def load(sources: Any, **_: Any) -> Any:
        sides.append({r.data_source for s in sources for r in read_records(s.files)})
        if publish:
            write(tmp_path, "new")
        return sides[-1]

    monkeypatch.setattr(inputs, "load_samples", load)
    monkeypatch.setattr(inputs, "tokenizer_spec", lambda *args, **options: None)
    config = TrainConfig()
    config.data.train_files = config.data.val_files = str(tmp_path)
    world: Any = SimpleNamespace(is_main=True, size=1, rank=0)
    for publish in (False, True):
        sides.clear()
        with pytest.raises(InputError) if publish else nullcontext():
            read_splits(config, tokenizer=None, directory=tmp_path / "run", world=world)
        assert sides == [{"old"}, {"new"} if publish else {"old"}]


def test_convert_publishes_nothing_of_two_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An input that is replaced between the reading of groups and of rows: exit code 3."""
    write(tmp_path / "in", "old")
    read = convert.write_split

    def late(directory: Path, records: Any, **options: Any) -> Any:
        list(records())
        write(tmp_path / "in", "new")
        return read(directory, records, **options)

    monkeypatch.setattr(convert, "write_split", late)
    assert main(["convert", f"in={tmp_path / 'in'}", f"out={tmp_path / 'out'}"]) == 3
    assert "written to while it was read" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*.parquet"))
