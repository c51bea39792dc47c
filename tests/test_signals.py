"""SIGTERM and Ctrl-C in every phase of a launched run: nothing half-written, resumed exactly."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.launched_runs import Run, model, soon, start
from verl_sft.trainer import checkpoint
from verl_sft.trainer.tracking import read_metrics

__all__ = ["model", "start"]  # fixtures

# Where the run waits for the signal, in the order in which one start after the other meets them.
PHASES: dict[str, dict[str, Any]] = {
    "tokenising": {"call": "verl_sft.data.workers:tokenise"},
    "building the model": {"call": "verl_sft.trainer.assemble:assemble"},
    "a step": {"call": "verl_sft.trainer.train_loop:TrainLoop._update", "nth": 2},
    "validation": {"call": "verl_sft.trainer.validation:validate"},
    "games": {"call": "verl_sft.trainer.env_eval:run_evaluation", "do": "mark"},
    "a save": {"call": "verl_sft.trainer.state:write_shard"},
    "the export": {"call": "verl_sft.export.hf:write_folder"},
    "behind the last step": {"call": "verl_sft.trainer.tracking:Tracker.close"},
}
OFTEN = ("tokenising", "a step", "a save", "the export")
WORDS = ("trainer.total_epochs=4", "trainer.save_freq=3", "trainer.test_freq=2")
TOY = Path(__file__).with_name("toy_env.py")
GAMES = (
    "trainer.env_eval_freq=2",
    f"trainer.env_eval=env.name={TOY}:make_env policy.name={TOY}:make_policy policy.expert=planner",
)
EXACT = ("step", "train/loss", "train/grad_norm", "train/lr", "val/loss")
TOTAL = 12


def outcome(out: Path) -> tuple[list[Any], str]:
    """Exact figures of all steps, and what was exported."""
    rows = [tuple(row.get(key) for key in EXACT) for row in read_metrics(out / "metrics.jsonl")]
    exported = (out / "huggingface" / "model.safetensors").read_bytes()
    return rows, hashlib.sha256(exported).hexdigest()


def check_stopped(run: Run, *, code: int, ranks: int) -> None:
    """It said so in one line, left nobody behind, and its newest checkpoint is of all ranks."""
    assert run.end() == code, (code, run.told())
    assert soon(lambda: not run.alive(), 10)
    assert len(run.lines()) == 1 and "stopped by a signal" in run.lines()[0], run.told()
    assert run.torchrun or "Traceback" not in run.told(), run.told()
    if (run.out / "status.json").exists():
        assert run.status["exit_code"] == code and run.status["state"] == "preempted"
    found = checkpoint.list_checkpoints(run.out)
    assert (found[0][0] if found else 0) == run.steps
    for _, path in found:
        checkpoint.verify(path)
        assert len(list(path.glob("*.safetensors"))) == ranks
    assert not (run.out / "huggingface").exists()


@pytest.mark.parametrize(
    ("number", "torchrun", "ranks", "phases"),
    [
        (signal.SIGTERM, False, 2, OFTEN),
        *(
            pytest.param(*kind, tuple(PHASES), marks=pytest.mark.release)
            for kind in (
                (signal.SIGTERM, False, 2),
                (signal.SIGTERM, True, 2),
                (signal.SIGTERM, False, 1),
                (signal.SIGINT, False, 2),
                (signal.SIGINT, True, 2),
            )
        ),
    ],
)
def test_a_signal_in_every_phase(
    start: Callable[..., Run],
    model: Path,
    tmp_path: Path,
    number: signal.Signals,
    torchrun: bool,
    ranks: int,
    phases: tuple[str, ...],
) -> None:
    """One start after the other is stopped in the next phase; the sum is a run without a stop."""
    kind = {"torchrun": torchrun, "ranks": ranks}
    for phase in phases:
        words = (*WORDS, *(GAMES if phase == "games" else ()))
        run = start(*words, faults=({"do": "wait", **PHASES[phase]},), **kind)
        assert run.reaches_fault(), (phase, run.told())
        time.sleep(0.3)  # so that all ranks are there
        run.send(number)
        check_stopped(run, code=130 if number == signal.SIGINT else 75, ranks=ranks)
    assert run.steps == TOTAL
    run = start(*WORDS, **kind)
    assert run.end() == 0, run.told()
    (tmp_path / "whole").mkdir()
    whole = Run(model, tmp_path / "whole", *WORDS, **kind)
    assert whole.end() == 0, whole.told()
    assert outcome(run.out) == outcome(whole.out)
    assert not list(run.out.glob(".tmp-*"))


@pytest.mark.release
@pytest.mark.parametrize("torchrun", [False, True])
def test_twenty_signals_at_random(
    start: Callable[..., Run], model: Path, tmp_path: Path, torchrun: bool
) -> None:
    """SIGTERM at twenty random moments: always 75, and in the end the run without a stop."""
    (tmp_path / "whole").mkdir()
    whole = Run(model, tmp_path / "whole", *WORDS, torchrun=torchrun)
    began = time.monotonic()
    assert whole.end(300) == 0, whole.told()
    rng, seconds, stops = random.Random(), time.monotonic() - began, 0
    while stops < 20:
        run = start(*WORDS, torchrun=torchrun)
        early = 1.0 if torchrun else 0.3  # before, no line of ours has run
        time.sleep(rng.uniform(early, seconds))
        if run.process.poll() is not None:  # it was done: begin anew
            assert run.end() == 0 and outcome(run.out) == outcome(whole.out)
            run.out.rename(tmp_path / f"done-{stops}")
            continue
        run.send(signal.SIGTERM)
        code = run.end()
        stops += 1
        assert code in (75, 0) or (torchrun and not run.lines()), run.told()
        assert soon(lambda run=run: not run.alive(), 10)
    run = start(*WORDS, torchrun=torchrun)
    assert run.end(300) == 0 and outcome(run.out) == outcome(whole.out)


def test_ctrl_c_while_modules_load(start: Callable[..., Run]) -> None:
    """In the first seconds: one line, no traceback, exit code 130, nobody left."""
    rng = random.Random()
    for moment in (rng.uniform(0.0, 0.2), rng.uniform(0.2, 1.0), rng.uniform(1.0, 3.0)):
        # A wait of ours marks that the interpreter itself has begun; it cannot be interrupted well.
        begun = {"call": "verl_sft.cli:main", "do": "mark", "everywhere": True}
        run = start(faults=(begun,))
        assert run.reaches_fault(), run.told()
        time.sleep(moment)
        run.send(signal.SIGINT)
        assert run.process.wait(60) == 130, (moment, run.told())
        assert len(run.lines()) == 1 and "Traceback" not in run.told(), (moment, run.told())
        assert soon(lambda run=run: not run.alive(), 5)


def test_a_second_signal_ends_at_once(start: Callable[..., Run]) -> None:
    """Without waiting for a step that would take long: 143, one line, nobody left."""
    stuck = {"call": "verl_sft.trainer.train_loop:TrainLoop._update", "nth": 3, "do": "sleep"}
    run = start(faults=(stuck,))
    assert run.reaches_fault(), run.told()
    run.send(signal.SIGTERM)
    time.sleep(1)
    assert run.process.poll() is None
    run.send(signal.SIGTERM)
    assert run.process.wait(10) == 143, run.told()
    assert soon(lambda: not run.alive(), 2)
    (line,) = run.lines()
    assert "at once" in line and "at step 3; last checkpoint step 2" in line
    assert run.status["exit_code"] == 143


@pytest.mark.parametrize("torchrun", [False, pytest.param(True, marks=pytest.mark.release)])
def test_a_signal_to_all_processes_at_once(start: Callable[..., Run], torchrun: bool) -> None:
    """As service managers send it: the copy that torchrun passes on does not stop the save."""
    run = start(torchrun=torchrun)
    assert soon(lambda: run.steps >= 2), run.told()
    for pid in run.alive():
        os.kill(pid, signal.SIGTERM)
    check_stopped(run, code=75, ranks=2)


def test_a_rank_that_waits_for_others_to_start_is_not_waited_for(start: Callable[..., Run]) -> None:
    """SIGTERM while one rank has not come to the rendezvous yet: gone soon, exit code 75."""
    late = {"call": "verl_sft.distributed.setup:setup_world", "rank": "1", "do": "wait"}
    run = start(faults=(late,))
    assert run.reaches_fault(), run.told()
    time.sleep(1)
    run.send(signal.SIGTERM)
    assert run.process.wait(30) == 75, run.told()
    assert len(run.lines()) == 1, run.told()
    assert soon(lambda: not run.alive(), 5)
