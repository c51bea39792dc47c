"""Faults of a run as people start it: `verl-sft train nproc=2` on tokenised files."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.test_trainer import write_data
from tests.train_ranks import toy_model
from verl_sft.trainer.tracking import read_metrics

ROOT = Path(__file__).parent.parent


class Run:
    """A started `verl-sft train` with two ranks."""

    def __init__(self, model: Path, folder: Path, *words: str) -> None:
        data = folder / "data"
        if not data.exists():
            write_data(data)
        self.out, self.log = folder / "run", folder / "log"
        given = (
            *("nproc=2", f"data.train_files={data}", f"model.partial_pretrain={model}"),
            *(f"trainer.default_local_dir={self.out}", "trainer.total_epochs=1000"),
            *("data.max_length=128", "data.train_batch_size=4", "trainer.logger=[file]"),
            *("data.num_workers=0", "trainer.save_freq=2", "trainer.max_ckpt_to_keep=2"),
        )
        command = [sys.executable, "-m", "verl_sft.cli", "train", *given, *words]
        with self.log.open("ab") as stream:
            # torchrun gives ranks sessions of their own; the environment goes through to them.
            self.mark = f"TEST_RUN={folder.name}-{time.monotonic_ns()}"
            env = {**os.environ, "TEST_RUN": self.mark.partition("=")[2]}
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=env, stdout=stream, stderr=stream, start_new_session=True
            )

    @property
    def steps(self) -> int:
        path = self.out / "metrics.jsonl"
        return len(read_metrics(path)) if path.is_file() else 0

    def rank(self, number: int) -> int:
        """Process id of a rank."""
        (found,) = [
            pid
            for pid in self.alive()
            if f"RANK={number}".encode() in _read(pid, "environ").split(b"\0")
            and b"fsdp_sft_trainer" in _read(pid, "cmdline")
        ]
        return found

    def alive(self) -> list[int]:
        """Processes of this run; of one that has ended no environment can be read."""
        found = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
        return [pid for pid in found if self.mark.encode() in _read(pid, "environ").split(b"\0")]

    def told(self) -> str:
        return self.log.read_text()


def _read(pid: int, name: str) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/{name}").read_bytes()
    return b""


def soon(true: Callable[[], bool], seconds: float = 90) -> bool:
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.02)
    return true()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def start(model: Path, tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """Starts runs in one directory, and leaves none behind."""
    runs: list[Run] = []

    def begin(*words: str) -> Run:
        runs.append(Run(model, tmp_path, *words))
        return runs[-1]

    yield begin
    for run in runs:
        for pid in run.alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        run.process.wait(30)


def test_a_killed_rank_is_named(start: Callable[..., Run]) -> None:
    """All gone soon, exit code 8, one line: which rank, which signal, which step to go on from."""
    run = start()
    assert soon(lambda: run.steps >= 3), run.told()
    os.kill(run.rank(1), signal.SIGKILL)
    assert run.process.wait(30) == 8, run.told()
    assert soon(lambda: not run.alive(), 5)
    told = run.told()
    assert "Traceback" not in told and told.count("verl-sft: ") == 1, told
    assert "rank 1 was killed by SIGKILL (possible OOM) at step" in told
    assert "last checkpoint step" in told
    status = json.loads((run.out / "status.json").read_text())
    assert status["exit_code"] == 8 and "rank 1" in status["message"]


def test_a_frozen_rank_is_named(start: Callable[..., Run]) -> None:
    """A rank that reacts to nothing is the one that no longer answers; the launcher ends it."""
    run = start("trainer.step_timeout_s=4")
    assert soon(lambda: run.steps >= 3), run.told()
    os.kill(run.rank(1), signal.SIGSTOP)
    assert run.process.wait(40) == 8, run.told()
    assert soon(lambda: not run.alive(), 5)
    assert "rank 1 no longer answers" in run.told()
    assert run.told().count("verl-sft: ") == 1, run.told()


def test_one_rank_that_raises_is_the_only_one_told(
    start: Callable[..., Run], tmp_path: Path
) -> None:
    """Its peer's broken connection is not shown, and neither is torchrun's report."""
    run = start()
    assert soon(lambda: run.steps >= 2), run.told()
    os.kill(run.rank(1), signal.SIGFPE)
    assert run.process.wait(30) == 8, run.told()
    assert "rank 1 was killed by SIGFPE at step" in run.told()
    assert run.told().count("verl-sft: ") == 1, run.told()


def test_sigterm_and_ctrl_c_at_any_phase(start: Callable[..., Run]) -> None:
    """While importing, starting, training and exporting: no traceback, nobody left, resumable."""
    rng = random.Random(4)
    for number in range(6):
        interrupt = number % 2 == 1
        run = start("trainer.test_freq=1")
        before = run.steps
        if number < 4:
            time.sleep(rng.uniform(0.3, 3.0))
        else:
            assert soon(lambda run=run, before=before: run.steps > before + 1), run.told()
            time.sleep(rng.uniform(0, 0.2))
        os.kill(run.process.pid, signal.SIGINT if interrupt else signal.SIGTERM)
        code = run.process.wait(60)
        told = run.told()
        assert code == 130 if interrupt else code in (75, 143), (number, code, told)
        assert "Traceback" not in told, told
        assert soon(lambda run=run: not run.alive(), 5)
        if number >= 4:
            assert (run.out / f"global_step_{run.steps}").is_dir(), told
    rows = read_metrics(run.out / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))


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
