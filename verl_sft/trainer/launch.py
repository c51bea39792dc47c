"""Start the ranks of one machine with torchrun, and say how the run truly ended."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from verl_sft.errors import PeerLostError, Preempted
from verl_sft.processes import die_with_parent
from verl_sft.trainer.rank import LAUNCHER_ENV
from verl_sft.trainer.status import STATUS_ENV, write_status

TARGET = "verl_sft.trainer.rank"
MOST_RANKS = 1024  # of one machine; more are a mistyped number
_CODES = "exit_codes.json"  # of the ranks, beside the launcher's copy of the status
_GRACE_S = 5.0  # for the other ranks, once one is lost
_SAVE_S = 1800  # for ranks that save behind a signal; torchrun's own 30 do not suffice for a model


def launch(config_argv: Sequence[str], nproc: int) -> int:
    """Train with `nproc` ranks on this machine; returns the run's own exit code.

    Args:
        config_argv: `key=value` arguments of the trainer.
        nproc: ranks to start.
    """
    with tempfile.TemporaryDirectory(prefix="verl_sft_") as folder:
        status = Path(folder) / "status.json"
        env = {**os.environ, STATUS_ENV: str(status)}
        env.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(_SAVE_S))
        env.setdefault("OMP_NUM_THREADS", str(max(1, _num_cores() // nproc)))
        start = f"from verl_sft.trainer.launch import agent; agent({os.getpid()})"
        command = [
            *(sys.executable, "-c", start, f"--log-dir={folder}"),
            *("--nnodes=1", f"--nproc_per_node={nproc}"),
            *("--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"),
            *("-m", TARGET, *config_argv),
        ]
        # A group of its own: Ctrl-C is for this process, which then asks the ranks to save.
        child = subprocess.Popen(command, env=env, process_group=0)
        with _passing_on(child) as signals:
            code = _wait(child, status=status, signals=signals)
        left = _left(status)
        unsaid = len(signals) > 1 or not left.get("told")
        if signals and unsaid and left.get("exit_code") != 0:
            return _stopped(left, signals)
        code = exit_code(status, launcher_code=code)
        if signals and signals[0] == signal.SIGINT and code == Preempted.exit_code:
            return _interrupted(status)
        return code


def agent(parent: int) -> None:
    """Be torchrun, but die with the launcher, and end on a signal without a traceback."""
    die_with_parent(parent)
    os.environ[LAUNCHER_ENV] = str(os.getpid())
    from torch.distributed.elastic.multiprocessing import SignalException, api
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    logging.getLogger("torch.distributed.run").setLevel(logging.CRITICAL)
    api._terminate_process_handler = _only_once(api._terminate_process_handler)
    try:
        torchrun(sys.argv[1:])
    except SignalException as stopped:
        sys.exit(128 + int(stopped.sigval))
    except ChildFailedError as failed:
        codes = {rank: failure.exitcode for rank, failure in failed.failures.items()}
        Path(os.environ[STATUS_ENV]).with_name(_CODES).write_text(json.dumps(codes))
        sys.exit(1)


def _only_once(handler: Callable[[int, Any], None]) -> Any:
    """A signal to all processes of a run comes to torchrun twice; the second would stop a save."""

    def handle(number: int, frame: Any) -> None:
        for name in (signal.SIGTERM, signal.SIGINT):
            signal.signal(name, signal.SIG_IGN)
        handler(number, frame)

    return handle


def number_of_ranks(word: str) -> int:
    """How many ranks a word of the command asks for; 0 if that is no number of them."""
    count = int(word) if word.isdecimal() and len(word) < 9 else 0
    return count if count <= MOST_RANKS else 0


def default_nproc() -> int:
    """One rank per GPU, or two gloo ranks on a machine without."""
    import torch

    return torch.cuda.device_count() or 2


def exit_code(status: Path, *, launcher_code: int) -> int:
    """The run's own code where it left one, else what the launcher's code means."""
    left = _left(status)
    code = left.get("exit_code")
    if isinstance(code, int) and (code != PeerLostError.exit_code or left.get("told")):
        return code
    if launcher_code in (0, -signal.SIGINT, 130):
        return 0 if launcher_code == 0 else 130
    if not left:
        return launcher_code if launcher_code > 0 else 128 - launcher_code
    place = _directory(left)
    error = PeerLostError(
        f"{_who_died(status.with_name(_CODES))}{_how_far(place)}",
        fix="Run the same command again to go on from the last checkpoint",
    )
    print(f"verl-sft: {error}", file=sys.stderr, flush=True)
    if place:
        write_status(place, state="failed", code=error.exit_code, message=str(error))
    return error.exit_code


def _left(status: Path) -> dict[str, Any]:
    """What the ranks recorded."""
    try:
        found: dict[str, Any] = json.loads(status.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found


def _who_died(codes: Path) -> str:
    """Which rank a signal ended; the others are ended by torchrun, with SIGTERM, or by the loss."""
    try:
        found: dict[str, int] = json.loads(codes.read_text("utf-8"))
    except (OSError, ValueError):
        found = {}
    killed = {rank: -code for rank, code in found.items() if code < 0 and -code != signal.SIGTERM}
    if not killed:
        return "a rank was lost before it could say why"
    rank, number = min(killed.items(), key=lambda item: int(item[0]))
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = f"signal {number}"
    hint = " (possible OOM)" if number == signal.SIGKILL else ""
    return f"rank {rank} was killed by {name}{hint}"


def _how_far(directory: Path | None) -> str:
    """Behind which step the run was, and what there is to go on from."""
    if directory is None:
        return ""
    steps = [0]
    with contextlib.suppress(OSError):
        for line in (directory / "metrics.jsonl").read_text("utf-8").splitlines():
            with contextlib.suppress(ValueError):
                steps.append(int(json.loads(line)["step"]))
    saved = [
        int(path.parent.name.rpartition("_")[2])
        for path in directory.glob("global_step_*/manifest.json")
        if path.parent.name.rpartition("_")[2].isdecimal()
    ]
    last = f"last checkpoint step {max(saved)}" if saved else "no checkpoint yet"
    return f" at step {steps[-1] + 1}; {last}"


@contextlib.contextmanager
def _passing_on(child: subprocess.Popen[bytes]) -> Iterator[list[int]]:
    """Let the first SIGTERM or Ctrl-C end the ranks with a checkpoint, and a second one at once.

    Yields the signals that came. When the child is killed, the kernel kills its ranks.
    """
    signals: list[int] = []

    def handle(number: int, frame: Any) -> None:
        signals.append(number)
        child.send_signal(signal.SIGTERM if len(signals) == 1 else signal.SIGKILL)

    before = {
        number: signal.signal(number, handle)
        for number in (signal.SIGTERM, signal.SIGINT)
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stopped(left: Mapping[str, Any], signals: Sequence[int]) -> int:
    """Say what a second signal left, or one that came before a rank could say it."""
    place, twice = _directory(left), len(signals) > 1
    why = "ended at once by a second signal" if twice else "stopped by a signal"
    message = f"{why}{_how_far(place)}. Run the same command again to go on"
    code = 130 if signals[0] == signal.SIGINT else 143 if twice else Preempted.exit_code
    print(f"verl-sft: {message}.", file=sys.stderr, flush=True)
    if place:
        write_status(place, state="preempted", code=code, message=message)
    return code


def _interrupted(status: Path) -> int:
    """Ranks are asked to save by SIGTERM; the user knows that it was Ctrl-C."""
    left = _left(status)
    place = _directory(left)
    if place:
        write_status(place, state="preempted", code=130, message=left.get("message", ""))
    return 130


def _directory(left: Mapping[str, Any]) -> Path | None:
    return Path(left["directory"]) if left.get("directory") else None


def _wait(child: subprocess.Popen[bytes], *, status: Path, signals: Sequence[int]) -> int:
    """The child's code.

    Once a rank is lost, one that is frozen must not keep the others; and where a run is to stop
    that holds no directory yet, a rank that waits for the others to start is not waited for.
    """
    lost_at = 0.0
    while True:
        try:
            return child.wait(timeout=0.5)
        except subprocess.TimeoutExpired:
            left = _left(status)
            lost = left.get("exit_code") == PeerLostError.exit_code
            if not lost_at and (lost or (signals and not left.get("directory"))):
                lost_at = time.monotonic()
            if lost_at and time.monotonic() > lost_at + _GRACE_S:
                child.kill()


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main() -> int:
    """`python -m verl_sft.trainer.launch NPROC key=value ...`."""
    words = sys.argv[1:]
    nproc = number_of_ranks(words[0]) if words else 0
    if not nproc:
        print("usage: python -m verl_sft.trainer.launch NPROC key=value ...", file=sys.stderr)
        return 2
    try:
        return launch(words[1:], nproc)
    except KeyboardInterrupt:
        print("verl-sft: stopped by Ctrl-C", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
