"""Saving by itself, without a run: the bytes, failing writes, what is kept, what is passed over."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.train_ranks import run_ranks, toy_config, toy_model
from verl_sft import safe_io
from verl_sft.errors import NonFiniteError, StorageError, UsageError
from verl_sft.hashed_file import write_hashed
from verl_sft.trainer import saving
from verl_sft.trainer.best import best_of
from verl_sft.trainer.checkpoint import (
    MANIFEST,
    TrainProgress,
    clean_leftovers,
    find_resume,
    list_checkpoints,
    verify,
)
from verl_sft.trainer.line_file import LineFile
from verl_sft.trainer.resume import find_start
from verl_sft.trainer.saving import Saver
from verl_sft.trainer.state import TrainState, shard_tensors
from verl_sft.trainer.tensor_file import file_parts
from verl_sft.trainer.tracking import read_metrics

ALONE: Any = SimpleNamespace(
    rank=0, size=1, is_main=True, replica=0, shard_rank=0, shard_size=1, device=torch.device("cpu")
)
WRITES = ("open", "write", "fsync", "replace", "rename", "mkdir", "symlink")
ERRORS = (errno.ENOSPC, errno.EFBIG, errno.EIO, errno.EACCES, errno.EDQUOT)


def small_state() -> TrainState:
    """Two layers with AdamW's moments of one step."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 8)).sum().backward()
    optimizer.step()
    return TrainState(model, optimizer)


def make_saver(folder: Path, **given: Any) -> tuple[Saver, list[str]]:
    """A saver of one rank, and what it says."""
    folder.mkdir(exist_ok=True)
    said: list[str] = []
    return Saver(folder, fingerprint={"a": 1}, world=ALONE, say=said.append, **given), said


def save(saver: Saver, step: int, *, state: TrainState | None = None, **given: Any) -> None:
    saver.save(state or small_state(), progress=TrainProgress(step=step), **given)
    saver.finish()


@contextlib.contextmanager
def failing(number: int, *, code: int = errno.ENOSPC) -> Iterator[list[int]]:
    """Let call `number` of the system's writes fail; yields a list that holds the count."""
    kept, count = {name: getattr(os, name) for name in WRITES}, [0]

    def wrap(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            count[0] += 1
            if count[0] - 1 == number:
                raise OSError(code, os.strerror(code))
            return kept[name](*args, **kwargs)

        return call

    try:
        for name in WRITES:
            setattr(os, name, wrap(name))
        yield count
    finally:
        for name, function in kept.items():
            setattr(os, name, function)


def whole(folder: Path) -> set[str]:
    """Names of the checkpoints that verify."""
    found = set()
    for _, path in list_checkpoints(folder):
        with contextlib.suppress(StorageError):
            verify(path)
            found.add(path.name)
    return found


def flip(path: Path) -> None:
    """Change one bit of a checkpoint's tensors."""
    shard = next(path.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)


def test_files_are_those_of_safetensors(tmp_path: Path) -> None:
    """Every dtype, no rows, no dimensions, shared and strided memory: the library's very bytes."""
    from safetensors.torch import load_file, save_file

    kinds = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn]
    kinds += [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]
    tensors = {f"kind.{kind}": torch.arange(15).reshape(3, 5).to(kind) for kind in kinds}
    tensors.update(
        empty=torch.zeros(0, 4),
        number=torch.tensor(3.5),
        large=torch.randn(300, 1001).t().contiguous(),
        quoted=torch.ones(1),
    )
    facts = write_hashed(tmp_path / "ours", file_parts(tensors))
    save_file(tensors, tmp_path / "theirs")
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert facts["sha256"] == safe_io.file_sha256(tmp_path / "theirs")
    assert facts["size"] == (tmp_path / "theirs").stat().st_size
    shared = {"one": tensors["large"], "two": tensors["large"]}
    write_hashed(tmp_path / "shared", file_parts(shared))
    assert torch.equal(load_file(tmp_path / "shared")["two"], tensors["large"])


@pytest.mark.parametrize("size", [0, 1, 4096, 8 * 2**20 - 1, 8 * 2**20, 17 * 2**20 + 5])
@pytest.mark.parametrize("way", ["direct", "refused", "short", "late"])
def test_every_byte_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, way: str
) -> None:
    """Past the page cache or not, whatever the file system refuses or does only in part."""
    import fcntl

    data = random.Random(size).randbytes(size)
    parts = [memoryview(data[: size // 3]), memoryview(data[size // 3 :])]
    write, change, calls = os.write, fcntl.fcntl, [0]

    def control(descriptor: int, command: int, *given: int) -> int:
        if way == "refused" and command == fcntl.F_SETFL:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return change(descriptor, command, *given)

    def odd(descriptor: int, block: Any) -> int:
        calls[0] += 1
        if way == "late" and calls[0] == 2 and change(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        if way == "short" and not change(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            return write(descriptor, bytes(block)[: 1 << 19])
        return write(descriptor, block[: 1 << 22] if way == "short" else block)

    monkeypatch.setattr(fcntl, "fcntl", control)
    monkeypatch.setattr(os, "write", odd)
    facts = write_hashed(tmp_path / "file", iter(parts))
    assert (tmp_path / "file").read_bytes() == data
    assert facts["size"] == size and facts["sha256"] == safe_io.file_sha256(tmp_path / "file")


def test_copies_are_of_the_moment(tmp_path: Path) -> None:
    """What is written beside the steps is the state of its step, save after save."""
    state, copies = small_state(), dict[str, torch.Tensor]()
    first = shard_tensors(state, world=ALONE, into=copies)
    kept = {name: tensor.clone() for name, tensor in first.items()}
    with torch.no_grad():
        for parameter in state.model.parameters():
            parameter.add_(1)
    assert all(torch.equal(first[name], kept[name]) for name in kept)
    second = shard_tensors(state, world=ALONE, into=copies)
    assert second.keys() == first.keys()
    assert torch.equal(second["model.0.weight"], kept["model.0.weight"] + 1)
    assert second["model.0.weight"] is first["model.0.weight"]


@pytest.mark.parametrize("beside", [False, True])
def test_a_warned_failure_costs_nothing_else(tmp_path: Path, beside: bool) -> None:
    """Whichever write fails, and why: a line is told, older ones verify, the next save works."""
    saver, said = make_saver(tmp_path / "run", beside=beside, warn=True)
    save(saver, 1)
    number, step = 0, 2
    while True:
        before, code = whole(tmp_path / "run"), ERRORS[number % len(ERRORS)]
        with failing(number, code=code) as count:
            save(saver, step)
        if count[0] <= number:
            break
        (line,) = said
        assert line.startswith("SAVE FAILED") and os.strerror(code) in line and "\n" not in line
        assert str(tmp_path) in line and "The last good checkpoint is" in line
        assert ("MB are free" in line) == (code in (errno.ENOSPC, errno.EDQUOT))
        assert before <= whole(tmp_path / "run")
        assert not list((tmp_path / "run").glob(".tmp-global*"))
        save(saver, step + 1)
        assert f"global_step_{step + 1}" in whole(tmp_path / "run")
        assert len(said) == 1 and saver.failed == number + 1
        said.clear()
        number, step = number + 1, step + 2
    assert number > 12 and not said


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("warn", [False, True])
def test_the_last_save_must_succeed(tmp_path: Path, beside: bool, warn: bool) -> None:
    """Also where failures are only warned of; the message names the last good checkpoint."""
    saver, said = make_saver(tmp_path / "run", beside=beside, warn=warn)
    with failing(5), pytest.raises(StorageError, match="There is none before it"):
        save(saver, 1, last=True)
    save(saver, 3)
    with failing(5), pytest.raises(StorageError, match=r"last good checkpoint is .*global_step_3"):
        save(saver, 6, last=True)
    assert whole(tmp_path / "run") == {"global_step_3"} and not said
    save(saver, 6, last=True)
    save(saver, 6, last=True)
    assert whole(tmp_path / "run") == {"global_step_3", "global_step_6"}


def test_a_pending_failure_is_tried_again_at_the_end(tmp_path: Path) -> None:
    """The last step was being saved beside the steps and failed: it is saved once more."""
    saver, said = make_saver(tmp_path / "run", beside=True, warn=True)
    with failing(2):
        saver.save(small_state(), progress=TrainProgress(step=4))
        assert saver._pending is not None and saver._pending.thread is not None
        saver._pending.thread.join()
    saver.save(small_state(), progress=TrainProgress(step=4), last=True)
    assert whole(tmp_path / "run") == {"global_step_4"} and len(said) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_is_never_published(tmp_path: Path, dtype: torch.dtype) -> None:
    """NaN and both infinities, at either end of a tensor; warning does not cover them."""
    saver, _ = make_saver(tmp_path / "run", warn=True)
    for value in (float("nan"), float("inf"), -float("inf")):
        for place in (0, -1):
            state = small_state()
            state.model.to(dtype)
            with torch.no_grad():
                state.model[1].weight.view(-1)[place] = value
            with pytest.raises(NonFiniteError, match=r"1\.weight"):
                save(saver, 1, state=state)
    assert not list((tmp_path / "run").iterdir())


def test_a_part_that_is_not_here_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank whose file is not where rank 0 looks: no checkpoint, the file is named."""
    saver, _ = make_saver(tmp_path / "run")
    write = saving.write_shard

    def elsewhere(path: Path, tensors: Any, **given: Any) -> dict[str, Any]:
        facts = write(path, tensors, **given)
        path.unlink()
        return facts

    monkeypatch.setattr(saving, "write_shard", elsewhere)
    with pytest.raises(StorageError, match=r"shard_00000.*0 are here.*all nodes share"):
        save(saver, 1)
    assert not list((tmp_path / "run").iterdir())


def test_one_rank_fails_for_all(tmp_path: Path) -> None:
    """A failure of one rank is everybody's: warned of and counted, at the end exit code 5."""
    model = toy_model(tmp_path)

    def fail(trainer: Any) -> None:
        write = saving.write_shard

        def full(path: Path, tensors: Any, **given: Any) -> Any:
            if trainer.world.rank == 1 and any(f"_step_{n}." in str(path) for n in (2, 6)):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return write(path, tensors, **given)

        saving.write_shard = full

    given = {"trainer__async_save": True, "trainer__save_freq": 1, "trainer__on_save_error": "warn"}
    config = toy_config(model, tmp_path / "run", **given)
    reports = run_ranks(config, size=2, hook=fail)
    assert [r["code"] for r in reports] == [5, 5], reports
    assert "The last good checkpoint is" in reports[0]["error"]
    assert "global_step_5" in reports[0]["error"]
    assert whole(tmp_path / "run") == {f"global_step_{n}" for n in (1, 3, 4, 5)}
    rows = read_metrics(tmp_path / "run/metrics.jsonl")
    told = [row.get("train/saves_failed", 0) for row in rows]
    assert told[:2] == [0, 0] and told[3:] == [1, 1, 1]
    logs = "".join(path.read_text() for path in tmp_path.glob(".store-*.log"))
    assert logs.count("SAVE FAILED") == 1
    assert [r["code"] for r in run_ranks(config, size=2)] == [0, 0]
    assert [row["step"] for row in read_metrics(tmp_path / "run/metrics.jsonl")] == [*range(1, 7)]
    assert "global_step_6" in whole(tmp_path / "run")


def test_saves_of_each_epoch(tmp_path: Path) -> None:
    """Behind the last step of every epoch and nowhere else."""
    config = toy_config(
        toy_model(tmp_path), tmp_path / "run", trainer__save_freq="after_each_epoch"
    )
    assert run_ranks(config)[0]["code"] == 0
    assert whole(tmp_path / "run") == {"global_step_3", "global_step_6"}


def test_a_damaged_checkpoint_is_passed_over_or_stops(tmp_path: Path) -> None:
    """By trainer.on_corrupt; which files are read is said, and another word is refused."""
    saver, _ = make_saver(tmp_path / "run")
    for step in (1, 2):
        save(saver, step)
    flip(tmp_path / "run/global_step_2")
    said: list[str] = []
    for word in ("fallback", "stop"):
        config = toy_config(tmp_path, tmp_path / "run", trainer__on_corrupt=word)
        given: dict[str, Any] = {"directory": tmp_path / "run", "marks": {"a": 1}, "store": None}
        if word == "stop":
            with pytest.raises(StorageError, match=r"global_step_2/shard.*on_corrupt=fallback"):
                find_start(config, **given, say=said.append)
        else:
            found = find_start(config, **given, say=said.append)
            assert found is not None and found[0].name == "global_step_1"
    assert len(said) == 1 and "DAMAGED" in said[0]
    with pytest.raises(UsageError, match="on_corrupt"):
        toy_config(tmp_path, tmp_path / "run", trainer__on_corrupt="ignore")
    with pytest.raises(UsageError, match="on_save_error"):
        toy_config(tmp_path, tmp_path / "run", trainer__on_save_error="ignore")


def test_only_whole_checkpoints_count_as_kept(tmp_path: Path) -> None:
    """Damage of an earlier start costs no good one: they stay until enough whole ones are there."""
    folder = tmp_path / "run"
    saver, _ = make_saver(folder)
    for step in (1, 2, 3):
        save(saver, step)
    flip(folder / "global_step_3")
    (next((folder / "global_step_2").glob("*.safetensors"))).unlink()
    saver, _ = make_saver(folder, keep=2)
    saver.start_from(1, path=folder / "global_step_1")
    save(saver, 4)
    assert whole(folder) == {"global_step_1", "global_step_4"}
    save(saver, 5)
    assert {path.name for _, path in list_checkpoints(folder)} == {"global_step_4", "global_step_5"}


def test_links_follow_what_is_there(tmp_path: Path) -> None:
    """The best one stays beside the newest; deleted by hand, its link goes or moves."""
    folder = tmp_path / "run"
    saver, _ = make_saver(folder, keep=1)
    for step, score in ((1, -2.0), (2, -1.0), (3, None)):
        saver.save(small_state(), progress=TrainProgress(step=step, score=score))
    assert (folder / "best").resolve().name == "global_step_2"
    assert whole(folder) == {"global_step_2", "global_step_3"}
    shutil.rmtree(folder / "global_step_2")
    save(saver, 4)
    assert not (folder / "best").is_symlink()
    assert (folder / "last").resolve().name == "global_step_4"


def test_replacing_a_checkpoint_never_loses_it(tmp_path: Path) -> None:
    """Saved once more after a return to an earlier step: at every failing write one is whole."""
    folder = tmp_path / "run"
    saver, _ = make_saver(folder, warn=True)
    save(saver, 1)
    number = 0
    while True:
        saver.start_from(0)
        with failing(number) as count:
            save(saver, 1)
        if count[0] <= number:
            break
        assert whole(folder) == {"global_step_1"}, number
        number += 1
    hidden = folder / ".tmp-global_step_1.aside-12345678"
    (folder / "global_step_1").rename(hidden)  # a kill between the two renames
    clean_leftovers(folder)
    assert whole(folder) == {"global_step_1"} and not hidden.exists()
    shutil.copytree(folder / "global_step_1", hidden)
    clean_leftovers(folder)
    assert whole(folder) == {"global_step_1"} and not hidden.exists()


@pytest.mark.parametrize("seed", range(6))
def test_any_history_keeps_what_it_promises(tmp_path: Path, seed: int) -> None:
    """Saves, restarts, damage, deletions and failing writes in any order, with retention."""
    rng, folder, step, keep = random.Random(seed), tmp_path / "run", 0, 1 + seed % 3
    saver, _ = make_saver(folder, keep=keep, warn=True)
    for _ in range(14):
        found = [path for _, path in list_checkpoints(folder)]
        deed = rng.choice(("save", "save", "fail", "restart", "damage", "delete"))
        if deed == "restart":
            saver, _ = make_saver(folder, keep=keep, warn=True, beside=rng.random() < 0.5)
            clean_leftovers(folder)
            with contextlib.suppress(StorageError):
                start = find_resume(folder, say=lambda text: None)
                step = start[1]["progress"]["step"] if start else 0
                saver.start_from(step, path=start[0] if start else None)
        elif deed in ("damage", "delete") and len(found) > 1:
            victim = rng.choice(found)
            flip(victim) if deed == "damage" else shutil.rmtree(victim)
            saver._retention._whole.discard(victim.absolute())  # it looks but once
        elif deed in ("save", "fail"):
            before, step = whole(folder), step + 1
            place = rng.randrange(25) if deed == "fail" else -1
            progress = TrainProgress(step=step, score=rng.choice((None, rng.random())))
            with failing(place):
                saver.save(small_state(), progress=progress)
                saver.finish()
            after = whole(folder)
            if deed == "fail":
                assert len(after) >= min(len(before), keep), (before, after)
                continue
            assert f"global_step_{step}" in after
            assert len(after) >= min(keep, len(before | after)), (before, after)
            there = list_checkpoints(folder)
            best = best_of(there, manifest=MANIFEST)
            assert (folder / "last").resolve() == there[0][1].resolve()
            assert best is None or (folder / "best").resolve() == best.resolve()
            assert all(link.exists() for link in folder.iterdir() if link.is_symlink())


def test_lines_wait_for_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines that a full disk refuses, whole or in part, are there once it takes them again."""
    path, write, room = tmp_path / "metrics.jsonl", os.write, [9]

    def full(descriptor: int, data: Any) -> int:
        if room[0] == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        done = write(descriptor, bytes(data)[: room[0]])
        room[0] -= done
        return done

    lines = LineFile(path)
    monkeypatch.setattr(os, "write", full)
    problems = [lines.add(f'{{"step": {step}}}') for step in (1, 2, 3)]
    assert all(problem is not None and "No space left" in str(problem) for problem in problems)
    with pytest.raises(StorageError, match=r"metrics\.jsonl"):
        lines.sync()
    assert read_metrics(path) == []
    room[0] = 1000
    assert lines.add('{"step": 4}') is None
    lines.sync()
    lines.close()
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3, 4]
