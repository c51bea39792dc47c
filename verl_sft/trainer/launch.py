"""Start the ranks of one machine with torchrun, and say how the run truly ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from verl_sft.errors import PeerLostError
from verl_sft.processes import die_with_parent
from verl_sft.trainer.status import STATUS_ENV, write_status

TARGET = "verl_sft.trainer.fsdp_sft_trainer"


def launch(config_argv: Sequence[str], nproc: int) -> int:
    """Train with `nproc` ranks on this machine; returns the run's own exit code.

    Args:
        config_argv: `key=value` arguments of the trainer.
        nproc: ranks to start.
    """
    with tempfile.TemporaryDirectory(prefix="verl_sft_") as folder:
        status = Path(folder) / "status.json"
        env = {**os.environ, STATUS_ENV: str(status)}
        env.setdefault("OMP_NUM_THREADS", str(max(1, _num_cores() // nproc)))
        start = f"from verl_sft.trainer.launch import agent; agent({os.getpid()})"
        command = [
            *(sys.executable, "-c", start, f"--log-dir={folder}"),
            *("--nnodes=1", f"--nproc_per_node={nproc}"),
            *("--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"),
            *("-m", TARGET, *config_argv),
        ]
        child = subprocess.Popen(command, env=env)
        previous = signal.signal(signal.SIGTERM, lambda number, frame: child.terminate())
        try:
            code = _wait(child)
        finally:
            signal.signal(signal.SIGTERM, previous)
        return exit_code(status, launcher_code=code)


def agent(parent: int) -> None:
    """Be torchrun, but die with the launcher, and end on a signal without a traceback."""
    die_with_parent(parent)
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.run import main as torchrun

    try:
        torchrun(sys.argv[1:])
    except SignalException as stopped:
        sys.exit(128 + int(stopped.sigval))


def default_nproc() -> int:
    """One rank per GPU, or two gloo ranks on a machine without."""
    import torch

    return torch.cuda.device_count() or 2


def exit_code(status: Path, *, launcher_code: int) -> int:
    """The run's own code where it left one, else what the launcher's code means."""
    try:
        left: dict[str, Any] = json.loads(status.read_text("utf-8"))
    except (OSError, ValueError):
        left = {}
    code = left.get("exit_code")
    if isinstance(code, int):
        return code
    if launcher_code in (0, -signal.SIGINT, 130):
        return 0 if launcher_code == 0 else 130
    if not left:
        return launcher_code if launcher_code > 0 else 1
    error = PeerLostError(
        "a rank was killed before it could say why (out of memory is the usual reason)",
        fix="Run the same command again to go on from the last checkpoint",
    )
    print(f"verl-sft: {error}", file=sys.stderr, flush=True)
    if left.get("directory"):
        place = Path(left["directory"])
        write_status(place, state="failed", code=error.exit_code, message=str(error))
    return error.exit_code


def _wait(child: subprocess.Popen[bytes]) -> int:
    """Wait through Ctrl-C, which reaches the child's group as well."""
    interrupted = False
    while True:
        try:
            code = child.wait()
            return 130 if interrupted else code
        except KeyboardInterrupt:
            interrupted = True


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main() -> int:
    """`python -m verl_sft.trainer.launch NPROC key=value ...`."""
    words = sys.argv[1:]
    if not words or not words[0].isdigit() or words[0] == "0":
        print("usage: python -m verl_sft.trainer.launch NPROC key=value ...", file=sys.stderr)
        return 2
    return launch(words[1:], int(words[0]))


if __name__ == "__main__":
    sys.exit(main())
