"""Faults inside a run: NaN, hangs, slow ranks, no memory, no disk, damaged checkpoints."""

from __future__ import annotations

import errno
import os
import random
import resource
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train_ranks import run_ranks, steps_of, toy_config, toy_model, weights_of
from verl_sft.errors import PeerLostError, StorageError
from verl_sft.trainer import saving, train_loop
from verl_sft.trainer.checkpoint import find_resume, list_checkpoints, verify
from verl_sft.trainer.failures import as_user_error
from verl_sft.trainer.pace import Pace
from verl_sft.trainer.state import TrainState
from verl_sft.trainer.tracking import read_metrics
from verl_sft.trainer.watchdog import lost

LORA = {"model__lora_rank": 4, "model__lora_dropout": 0.1}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_model(tmp_path_factory.mktemp("model"))


def codes(reports: list[dict[str, Any]]) -> list[int]:
    return [report["code"] for report in reports]


def logs(folder: Path) -> list[str]:
    return [path.read_text() for path in sorted(folder.glob(".store-*.log"))]


def poison(trainer: Any) -> None:
    """NaN in the forward pass of step 2, on rank 1 only."""
    if trainer.world.rank != 1:
        return
    inputs = train_loop.model_inputs

    def poisoned(batch: Any, device: Any) -> dict[str, Any]:
        found = inputs(batch, device)
        if trainer.progress.step == 1:
            found["weights"] = found["weights"] * float("nan")
        return found

    train_loop.model_inputs = poisoned


def all_finite(folder: Path) -> bool:
    return all(
        bool(tensor.isfinite().all())
        for name, tensor in weights_of(folder).items()
        if not name.startswith("optim.number")
    )


@pytest.mark.parametrize("lora", [False, True])
def test_a_step_with_nan_is_skipped_by_all(model: Path, tmp_path: Path, lora: bool) -> None:
    """NaN on one rank: no rank updates, the line is flagged, and resuming behind it is exact."""
    given = {"trainer__nan_policy": "skip", "trainer__save_freq": 1, **(LORA if lora else {})}
    config = toy_config(model, tmp_path / "run", **given)
    assert codes(run_ranks(config, size=2, hook=poison)) == [0, 0]
    rows = read_metrics(tmp_path / "run/metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 7))
    assert [row.get("train/skipped", 0) for row in rows] == [0, 1, 0, 0, 0, 0]
    flagged = rows[1]
    assert "train/loss" not in flagged and flagged["train/skipped_total"] == 1
    assert flagged["skipped_samples"] and set(flagged["skipped_samples"]) < {
        f"sample-{index}" for index in range(10)
    }
    assert any("step 2 SKIPPED" in log for log in logs(tmp_path))
    assert all_finite(tmp_path / "run")
    before, after = tmp_path / "before", tmp_path / "after"
    for step, folder in ((1, before), (2, after)):
        folder.mkdir()
        shutil.copytree(tmp_path / f"run/global_step_{step}", folder / f"global_step_{step}")
        shutil.copy(tmp_path / "run/metrics.jsonl", folder)
    one, two = weights_of(before), weights_of(after)
    assert all(torch.equal(one[name], two[name]) for name in one if "rng" not in name)
    for folder in (before, after):
        assert codes(run_ranks(toy_config(model, folder, **given), size=2, hook=poison)) == [0, 0]
        names = ("step", "train/grad_norm", "train/loss")
        for row, whole in zip(read_metrics(folder / "metrics.jsonl"), rows, strict=True):
            assert [row.get(name) for name in names] == [whole.get(name) for name in names]
        whole_weights, found = weights_of(tmp_path / "run"), weights_of(folder)
        assert all(torch.equal(found[name], whole_weights[name]) for name in whole_weights)


def test_skipping_is_bounded(model: Path, tmp_path: Path) -> None:
    """More skipped steps than allowed, or none allowed, end the run with exit code 6."""
    for number, given in enumerate(
        ({"trainer__nan_policy": "skip", "trainer__max_skipped_steps": 0}, {})
    ):
        config = toy_config(model, tmp_path / str(number), trainer__save_freq=1, **given)
        reports = run_ranks(config, size=2, hook=poison)
        assert codes(reports) == [6, 6]
        assert "at step 2" in reports[0]["error"] and "sample-" in reports[0]["error"]
        assert [step for step, _ in list_checkpoints(tmp_path / str(number))] == [1]
        assert all_finite(tmp_path / str(number))


@pytest.mark.parametrize("beside", [False, True])
def test_weights_that_are_not_finite_are_not_saved(
    model: Path, tmp_path: Path, beside: bool
) -> None:
    """NaN in a weight of one rank stops the save on all, whatever brought it there."""

    def spoil(trainer: Any) -> None:
        save = trainer.save

        def spoiled(**given: Any) -> None:
            if trainer.progress.step == 2 and trainer.world.rank == 1:
                with torch.no_grad():
                    next(p for p in trainer.parameters if p.numel()).mul_(float("nan"))
            save(**given)

        trainer.save = spoiled

    given = {"trainer__save_freq": 1, "trainer__async_save": beside}
    reports = run_ranks(toy_config(model, tmp_path / "run", **given), size=2, hook=spoil)
    assert codes(reports) == [6, 6], reports
    assert [step for step, _ in list_checkpoints(tmp_path / "run")] == [1]
    assert all_finite(tmp_path / "run")


def test_a_hanging_rank_is_named(model: Path, tmp_path: Path) -> None:
    """All end soon after the timeout; the message says which rank stands where."""

    def hang(trainer: Any) -> None:
        batch = trainer._batch

        def stuck(*args: Any) -> Any:
            if trainer.world.rank == 1 and trainer.progress.step == 2:
                time.sleep(600)
            return batch(*args)

        trainer._batch = stuck

    config = toy_config(model, tmp_path / "run", trainer__step_timeout_s=2.5)
    started = time.monotonic()
    run_ranks(config, size=2, hook=hang)
    assert time.monotonic() - started < 60
    told = "\n".join(logs(tmp_path))
    assert "step 3 took longer than trainer.step_timeout_s=2.5" in told, told
    assert "wait for rank 1 (rank 1 is at test_faults.py" in told
    for rank in (0, 1):
        assert "Current thread" in (tmp_path / f"run/stacks_rank_{rank}.txt").read_text()
    assert "stuck" in (tmp_path / "run/stacks_rank_1.txt").read_text()
    assert '"exit_code": 8' in (tmp_path / "run/status.json").read_text()


def test_who_is_lost(tmp_path: Path) -> None:
    """Silent ranks come first, then those that wait for nobody; all waiting is said so."""

    def told(*answers: tuple[int, bool]) -> str:
        given = {r: {"waits": w, "at": "here", "phase": "step 3"} for r, w in answers}
        return str(lost(given, num_ranks=3, timeout=5, directory=tmp_path))

    assert "rank 1 no longer answers" in told((0, True), (2, False))
    assert "ranks 1, 2 no longer answer" in told((0, True))
    assert "the others wait for rank 2 (rank 2 is at here)" in told(
        (0, True), (1, True), (2, False)
    )
    assert "all ranks wait for one another" in told((0, True), (1, True), (2, True))


def test_a_slow_rank_is_named_once() -> None:
    """Three slow steps in a row are told, then nothing for a while; noise is not."""
    said: list[str] = []

    class Four:
        size, rank = 4, 0

    pace: Any = Pace(Four, say=said.append)  # type: ignore[arg-type]
    for step in range(20):
        pace.judge([0.1, 0.12, 0.5 if step != 1 else 0.1, 0.08], step=step)
        assert len(said) == (step >= 4)
    assert "rank 2 is slow: 0.50 s of own work at step 4" in said[0]
    for step in range(5):
        pace.judge([0.001, 0.02, 0.001, 0.001], step=step)
    assert len(said) == 1


def test_a_rank_that_reads_slowly_is_named(model: Path, tmp_path: Path) -> None:
    """In a real run of two ranks, where both take the same time for a step."""

    def sleepy(trainer: Any) -> None:
        batch = trainer._batch

        def slow(*args: Any) -> Any:
            time.sleep(0.5 * trainer.world.rank)
            return batch(*args)

        trainer._batch = slow

    assert codes(run_ranks(toy_config(model, tmp_path / "run"), size=2, hook=sleepy)) == [0, 0]
    assert "\n".join(logs(tmp_path)).count("WARNING: rank 1 is slow") == 1


def test_out_of_memory_says_where(model: Path, tmp_path: Path) -> None:
    """Exit code 7 with step, tokens, the longest sample and three ways out."""

    def exhaust(trainer: Any) -> None:
        forward = train_loop.model_inputs

        def full(batch: Any, device: Any) -> Any:
            if trainer.progress.step == 2:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            return forward(batch, device)

        train_loop.model_inputs = full

    config = toy_config(model, tmp_path / "run", trainer__save_freq=1)
    (report,) = run_ranks(config, hook=exhaust)
    assert report["code"] == 7
    for part in (
        "out of memory at step 3, in a micro-batch of",
        "Its longest sample is sample-",
        "data.max_token_len_per_gpu",
        "model.enable_gradient_checkpointing=true",
        "more ranks",
    ):
        assert part in report["error"]
    found = find_resume(tmp_path / "run")
    assert found is not None and found[0].name == "global_step_2"


_WRITES = ("open", "write", "fsync", "replace", "rename", "mkdir", "symlink")


def failing_writes(number: int) -> Callable[[], int]:
    """Let call `number` of the operating system's writes fail; returns how to undo that."""
    kept = {name: getattr(os, name) for name in _WRITES}
    count = [0]

    def wrap(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            count[0] += 1
            if count[0] - 1 == number:
                raise OSError(errno.ENOSPC, "No space left on device")
            return kept[name](*args, **kwargs)

        return call

    for name in _WRITES:
        setattr(os, name, wrap(name))

    def undo() -> int:
        for name, function in kept.items():
            setattr(os, name, function)
        return count[0]

    return undo


@pytest.mark.parametrize("beside", [False, True])
def test_a_full_disk_costs_no_checkpoint(model: Path, tmp_path: Path, beside: bool) -> None:
    """Whichever write of a save fails: an error with exit code 5, and the others still verify."""

    def fill(trainer: Any) -> None:
        state = TrainState(trainer.model, trainer.optimizer)
        trainer.saver.save(state, progress=trainer.progress)
        trainer.saver.finish()
        for number in range(100):
            good = {path for _, path in list_checkpoints(trainer.directory)}
            progress = replace(trainer.progress, step=number + 1)
            undo, failed = failing_writes(number), False
            try:
                trainer.saver.save(state, progress=progress)
                trainer.saver.finish()
            except StorageError as error:
                failed = "No space left" in str(error)
                assert failed, error
            calls = undo()
            for path in good:
                verify(path)
            left = {p for _, p in list_checkpoints(trainer.directory)} - good
            assert not list(trainer.directory.glob(".tmp-global_step*.safetensors"))
            assert failed or (calls <= number and left), (calls, number, failed)
            if not failed:
                assert number > 10, number
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
                trainer.progress = replace(trainer.progress, step=200)
                trainer.save()

    config = toy_config(model, tmp_path / "run", trainer__async_save=beside)
    (report,) = run_ranks(config, hook=fill)
    assert report["code"] == 5, report["error"]
    assert "File too large" in report["error"]


def damage(folder: Path, rng: random.Random, *, flips: int, cuts: int, files: int) -> None:
    """Damage a checkpoint in so many ways, one at a time; each must be found, the file named."""
    paths = sorted(path for path in folder.iterdir() if path.is_file())
    weights = [path.stat().st_size for path in paths]
    for kind in ["flip"] * flips + ["cut"] * cuts + ["files"] * files:
        # Half of the damage by size, half by file, so that the manifest gets its share.
        path = rng.choice(paths) if rng.random() < 0.5 else rng.choices(paths, weights)[0]
        clean, name = path.read_bytes(), path.name
        extra = folder / f"foreign-{rng.randrange(99)}.bin"
        if kind == "flip":
            damaged = bytearray(clean)
            damaged[rng.randrange(len(clean))] ^= 1 << rng.randrange(8)
            path.write_bytes(damaged)
        elif kind == "cut":
            path.write_bytes(clean[: rng.randrange(len(clean))])
        elif rng.random() < 0.5:
            path.unlink()
        else:
            extra.write_bytes(b"")
            name = extra.name
        with pytest.raises(StorageError) as error:
            verify(folder)
        assert name in str(error.value), (kind, name, str(error.value))
        extra.unlink(missing_ok=True)
        path.write_bytes(clean)
    verify(folder)


@pytest.mark.parametrize(
    ("flips", "cuts", "files"),
    [(300, 60, 20), pytest.param(2000, 500, 50, marks=pytest.mark.release)],
)
def test_all_damage_is_found(
    model: Path, tmp_path: Path, flips: int, cuts: int, files: int
) -> None:
    """Flipped bits, cut, missing and foreign files: found before a tensor is read, file named."""
    given = {"trainer__save_freq": 3, **LORA}
    assert codes(run_ranks(toy_config(model, tmp_path / "run", **given), size=2)) == [0, 0]
    (_, newest), (_, older) = list_checkpoints(tmp_path / "run")
    damage(newest, random.Random(5), flips=flips, cuts=cuts, files=files)
    shard = next(newest.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    said: list[str] = []
    found = find_resume(tmp_path / "run", say=said.append)
    assert found is not None and found[0] == older
    assert len(said) == 1 and shard.name in said[0]


def test_a_failed_thread_fails_all_ranks(model: Path, tmp_path: Path) -> None:
    """A write beside the steps that fails on one rank is raised on both, at a step boundary."""

    def fail(trainer: Any) -> None:
        if trainer.world.rank == 1:
            write = saving.write_shard

            def full(path: Path, tensors: Any, **given: Any) -> Any:
                if "global_step_2." in str(path):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return write(path, tensors, **given)

            saving.write_shard = full

    given = {"trainer__async_save": True, "trainer__save_freq": 1}
    config = toy_config(model, tmp_path / "run", **given)
    reports = run_ranks(config, size=2, hook=fail)
    assert codes(reports) == [5, 5] and "No space left" in reports[0]["error"]
    assert [step for step, _ in list_checkpoints(tmp_path / "run")] == [1]
    assert not list((tmp_path / "run").glob(".tmp-*"))
    assert codes(run_ranks(config, size=2)) == [0, 0]
    assert [row[0] for row in steps_of(config, "step")] == list(range(1, 7))


def test_a_closed_pipe_is_no_lost_rank() -> None:
    """Broken connections of torch are of ranks; those of pipes and servers are not."""
    lost_rank = as_user_error(RuntimeError("gloo/pair.cc: Connection closed by peer"))
    assert isinstance(lost_rank, PeerLostError)
    for error in (BrokenPipeError(errno.EPIPE, "Broken pipe"), ConnectionResetError("reset")):
        assert as_user_error(error) is None
