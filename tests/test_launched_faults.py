"""Faults of a run as people start it: `verl-sft train nproc=2`, or torchrun, on tokenised files."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.launched_runs import Run, model, soon, start
from verl_sft.trainer.tracking import read_metrics

__all__ = ["model", "start"]  # fixtures


def test_a_killed_rank_is_named(start: Callable[..., Run]) -> None:
    """All gone soon, exit code 8, one line: which rank, which signal, which step to go on from."""
    run = start()
    assert soon(lambda: run.steps >= 3), run.told()
    os.kill(run.rank(1), signal.SIGKILL)
    assert run.process.wait(30) == 8, run.told()
    assert soon(lambda: not run.alive(), 5)
    told = run.told()
    assert "Traceback" not in told and len(run.lines()) == 1, told
    assert "rank 1 was killed by SIGKILL (possible OOM) at step" in told
    assert "last checkpoint step" in told
    assert run.status["exit_code"] == 8 and "rank 1" in run.status["message"]


def test_a_frozen_rank_is_named(start: Callable[..., Run]) -> None:
    """A rank that reacts to nothing is the one that no longer answers; the launcher ends it."""
    run = start("trainer.step_timeout_s=8")
    assert soon(lambda: run.steps >= 3), run.told()
    os.kill(run.rank(1), signal.SIGSTOP)
    assert run.process.wait(40) == 8, run.told()
    assert soon(lambda: not run.alive(), 5)
    assert "rank 1 no longer answers" in run.told()
    assert len(run.lines()) == 1, run.told()


def test_a_rank_that_crashes_is_the_only_one_told(start: Callable[..., Run]) -> None:
    """Its peer's broken connection is not shown, and neither is torchrun's report."""
    run = start()
    assert soon(lambda: run.steps >= 2), run.told()
    os.kill(run.rank(1), signal.SIGFPE)
    assert run.process.wait(30) == 8, run.told()
    assert "rank 1 was killed by SIGFPE at step" in run.told()
    assert len(run.lines()) == 1, run.told()


@pytest.mark.parametrize(
    ("torchrun", "kind", "code"),
    [
        (True, "bug", 1),
        (False, "memory", 7),
        pytest.param(True, "memory", 7, marks=pytest.mark.release),
        pytest.param(False, "bug", 1, marks=pytest.mark.release),
    ],
)
def test_a_rank_that_raises_is_the_only_one_told(
    start: Callable[..., Run], torchrun: bool, kind: str, code: int
) -> None:
    """An exception on rank 1: its own message, once; the code of its cause; all gone soon."""
    call = "verl_sft.trainer.train_loop:TrainLoop._update"
    fault: dict[str, Any] = {"call": call, "rank": "1", "nth": 3, "do": "raise", "kind": kind}
    run = start(torchrun=torchrun, faults=(fault,))
    assert run.reaches_fault(), run.told()
    raised = time.monotonic()
    assert run.end(30) == code, run.told()
    assert soon(lambda: not run.alive(), 10 - (time.monotonic() - raised))
    told, status = run.told(), run.status
    assert told.count(": the injected fault") == 1 and "losed by peer" not in told, told
    assert status["exit_code"] == code and "the injected fault" in status["message"]
    assert len(run.lines()) == (kind == "memory"), told
    assert ("rank      : 1" if torchrun else "") in told
    if not torchrun:
        assert told.count("Traceback") == (kind == "bug"), told


def test_ranks_that_still_load_die_with_their_launcher(start: Callable[..., Run]) -> None:
    """SIGKILL of the launcher while the ranks import torch: nobody is left a second later."""
    loading = {"call": "verl_sft.processes:die_with_parent", "do": "mark"}
    run = start(faults=(loading,))
    assert run.reaches_fault(), run.told()
    time.sleep(0.2)
    run.process.kill()
    run.process.wait()
    assert soon(lambda: not run.alive(), 1), "ranks outlive their launcher"


@pytest.mark.parametrize("count", [1, pytest.param(200, marks=pytest.mark.release)])
def test_finished_runs_say_so(start: Callable[..., Run], tmp_path: Path, count: int) -> None:
    """One run after the other ends with code 0; a finished one is left as it is, to the byte."""
    words = ("trainer.total_epochs=1", "trainer.export=False")
    for number in range(count):
        run = start(*words)
        assert run.end() == 0, (number, run.told())
        assert run.steps == 3 and run.status["state"] == "done"
        assert not run.lines() and "Traceback" not in run.told(), run.told()
        print(number + 1, end=" ", flush=True)
        if number < count - 1:
            run.out.rename(tmp_path / f"done-{number}")

    def files() -> dict[str, tuple[int, bytes]]:
        found = [path for path in run.out.rglob("*") if path.is_file() and path.name[0] != "."]
        anew = ("audit.json", "plan.json", "status.json")  # with the same contents
        return {
            str(p.relative_to(run.out)): (p.name in anew or p.stat().st_mtime_ns, p.read_bytes())
            for p in found
        }

    before = files()
    again = start(*words)
    assert again.end() == 0 and "nothing to do" in again.told(), again.told()
    assert files() == before


@pytest.mark.release
def test_kills_through_the_launcher(start: Callable[..., Run]) -> None:
    """A handful of SIGKILLs of the real launcher: the metrics have each step once."""
    rng = random.Random(9)
    for _ in range(5):
        run = start()
        before = run.steps
        assert soon(lambda run=run, before=before: run.steps > before + 2), run.told()
        time.sleep(rng.uniform(0, 0.3))
        run.process.kill()
        run.process.wait()
        assert soon(lambda run=run: not run.alive(), 5), "ranks outlive their launcher"
    run = start()
    before = run.steps
    assert soon(lambda: run.steps > before + 2), run.told()
    os.kill(run.process.pid, signal.SIGTERM)
    assert run.process.wait(60) == 75, run.told()
    rows = read_metrics(run.out / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
