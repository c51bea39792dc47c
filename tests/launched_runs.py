"""Runs as people start them, with `verl-sft train` or torchrun, with faults injected."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.test_trainer import write_data
from tests.train_ranks import toy_model
from verl_sft.trainer.status import true_code
from verl_sft.trainer.tracking import read_metrics

ROOT = Path(__file__).parent.parent
INJECTED = Path(__file__).with_name("injected")
TORCHRUN = (
    *("-m", "torch.distributed.run", "--nnodes=1", "--rdzv-backend=c10d"),
    *("--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"),
)


class Run:
    """A started run in `folder/run`; several in one folder go on from one another.

    Args:
        model: that is trained.
        folder: of the test.
        words: of the command, behind small defaults.
        ranks: processes.
        torchrun: start torchrun itself, and not `verl-sft train`.
        faults: what happens inside, see `injected/sitecustomize.py`.
    """

    def __init__(
        self,
        model: Path,
        folder: Path,
        *words: str,
        ranks: int = 2,
        torchrun: bool = False,
        faults: tuple[dict[str, Any], ...] = (),
    ) -> None:
        data = folder / "data"
        if not data.exists():
            write_data(data)
        self.out, self.log = folder / "run", folder / f"log-{time.monotonic_ns()}"
        self.mark = folder / f"mark-{time.monotonic_ns()}"
        given = (
            *(f"data.train_files={data}", f"model.partial_pretrain={model}"),
            *(f"trainer.default_local_dir={self.out}", "trainer.total_epochs=1000"),
            *("data.max_length=128", "data.train_batch_size=4", "trainer.logger=[file]"),
            *("data.num_workers=1", "trainer.save_freq=2", "trainer.max_ckpt_to_keep=2"),
        )
        start: tuple[str, ...] = ("-m", "verl_sft", "train", f"nproc={ranks}")
        if torchrun:
            start = (*TORCHRUN, f"--nproc_per_node={ranks}", "-m")
            start += ("verl_sft.trainer.fsdp_sft_trainer",)
        self.torchrun = torchrun
        # torchrun gives ranks sessions of their own; the environment goes through to them.
        self.name = f"{folder.name}-{time.monotonic_ns()}"
        env = {
            **os.environ,
            "TEST_RUN": self.name,
            "TEST_FAULTS": json.dumps([{"mark": str(self.mark), **fault} for fault in faults]),
            "PYTHONPATH": os.pathsep.join([str(INJECTED), str(ROOT)]),
        }
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a background job of a shell
            signal.signal(signal.SIGINT, signal.default_int_handler)
        with self.log.open("wb") as stream:
            self.process = subprocess.Popen(
                [sys.executable, *start, *given, *words],
                **{"cwd": ROOT, "env": env, "stdout": stream, "stderr": stream},
                start_new_session=True,
            )

    @property
    def steps(self) -> int:
        path = self.out / "metrics.jsonl"
        return len(read_metrics(path)) if path.is_file() else 0

    @property
    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.out / "status.json").read_text())
        return found

    def rank(self, number: int) -> int:
        """Process id of a rank."""
        (found,) = [
            pid
            for pid in self.alive()
            if f"RANK={number}".encode() in _read(pid, "environ").split(b"\0")
            and b"verl_sft.trainer." in _read(pid, "cmdline")
        ]
        return found

    def alive(self) -> list[int]:
        """Processes of this run; of one that has ended no environment can be read."""
        found = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
        mark = f"TEST_RUN={self.name}".encode()
        return [pid for pid in found if mark in _read(pid, "environ").split(b"\0")]

    def told(self) -> str:
        return self.log.read_text()

    def lines(self) -> list[str]:
        """What was told on the way out."""
        return [line for line in self.told().splitlines() if line.startswith("verl-sft: ")]

    def reaches_fault(self) -> bool:
        def there() -> bool:
            return any(self.mark.parent.glob(f"{self.mark.name}.*"))

        return soon(lambda: there() or self.process.poll() is not None) and there()

    def send(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def end(self, seconds: float = 90) -> int:
        """Its exit code; under torchrun the one that the documented look at its status gives."""
        code = self.process.wait(seconds)
        return true_code(self.out, launcher_code=code) if self.torchrun else code


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

    def begin(*words: str, **kind: Any) -> Run:
        runs.append(Run(model, tmp_path, *words, **kind))
        return runs[-1]

    yield begin
    for run in runs:
        for pid in run.alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        run.process.wait(30)
