"""A pool of worker processes that play episodes; a crash or a hang costs one episode, not the run.

The pipes carry JSON lines, never pickles: what runs in a worker cannot run code here.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import IO, Any

from verl_sft.collect.rollout import EpisodeSpec, RolloutSettings, make_episode
from verl_sft.config.collect import CollectConfig
from verl_sft.errors import InputError, PartialError, UsageError, VerlSftError
from verl_sft.safe_io import dump_json
from verl_sft.types import JSON, Episode, StopReason

POLL_SECONDS = 0.2  # how soon a stop request or a hang is noticed
START_SECONDS = 120.0  # imports and the scan of the games, on a busy machine
MAX_CRASHES_IN_A_ROW = 10
_GOODBYE_SECONDS = 5.0
_STDERR_CHARS = 400


def play_in_workers(
    specs: Iterable[EpisodeSpec],
    *,
    config: CollectConfig,
    num_workers: int,
    stopping: Callable[[], bool],
) -> Iterator[JSON]:
    """Play `specs` in processes; yield episodes as JSON in the order in which they end.

    Args:
        specs: what to play.
        config: all a worker needs; `env.step_timeout` bounds every environment call, and the
            decision before it.
        num_workers: processes at a time.
        stopping: asked often; once it is true, workers are killed and the iteration ends.

    Raises:
        VerlSftError: a worker cannot start.
        PartialError: workers crash one after another.
    """
    waiting = deque(specs)
    workers: list[_Worker] = []
    crashes = 0
    with selectors.DefaultSelector() as selector:
        try:
            while waiting or any(w.spec for w in workers):
                while len(workers) < min(num_workers, len(waiting) + len(workers)):
                    workers.append(_start(config, selector))
                ready = {key.data.process.pid for key, _ in selector.select(POLL_SECONDS)}
                if stopping():
                    return
                for worker in list(workers):
                    lines = worker.read() if worker.process.pid in ready else ()
                    for line in lines:
                        if "episode" in line:
                            crashes = 0
                            yield line["episode"]
                    cause = worker.cause_of_death()
                    if cause:
                        workers.remove(worker)
                        selector.unregister(worker.stdout)
                        if worker.spec is not None:
                            crashes += 1
                            yield _crashed(worker, cause, config).to_json()
                        worker.kill()
                        _check_crashes(crashes, cause)
                    elif worker.idle and waiting:
                        worker.give(waiting.popleft())
            for worker in workers:
                worker.finish()
        finally:
            for worker in workers:
                worker.kill()


@dataclass(slots=True)
class _Worker:
    """A process, the episode it plays, and when it was last heard of."""

    process: subprocess.Popen[bytes]
    stderr: IO[bytes]
    step_timeout: float
    policy_name: str = ""
    spec: EpisodeSpec | None = None
    heard: float = field(default_factory=time.monotonic)
    closed: bool = False
    rest: bytes = b""

    @property
    def stdout(self) -> IO[bytes]:
        assert self.process.stdout is not None
        return self.process.stdout

    @property
    def idle(self) -> bool:
        return bool(self.policy_name) and self.spec is None

    def give(self, spec: EpisodeSpec) -> None:
        self.spec, self.heard = spec, time.monotonic()
        self._send(asdict(spec))

    def begin(self, config: CollectConfig) -> None:
        self._send(asdict(config))

    def _send(self, line: JSON) -> None:
        assert self.process.stdin is not None
        # A worker that is already dead is found out by the end of its output.
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(dump_json(line).encode() + b"\n")
            self.process.stdin.flush()

    def read(self) -> list[JSON]:
        """The complete lines that have arrived."""
        data = os.read(self.stdout.fileno(), 1 << 20)
        self.closed = not data
        self.heard = time.monotonic()
        *whole, self.rest = (self.rest + data).split(b"\n")
        lines = [json.loads(line) for line in whole]
        for line in lines:
            if "fatal" in line:
                raise _startup_error(*line["fatal"])
            self.policy_name = line.get("ready", self.policy_name)
            if "episode" in line:
                self.spec = None
        return lines

    def cause_of_death(self) -> str:
        """Why the worker must be replaced; empty: it lives and shows it."""
        if self.closed:
            code = self.process.wait()
            how = f"was killed by {_signal_name(-code)}" if code < 0 else f"exited with {code}"
            cause = f"the environment's process {how}"
        else:
            limit = self.step_timeout if self.spec else START_SECONDS
            if self.idle or time.monotonic() - self.heard <= limit:
                return ""
            cause = f"no answer from the environment within {limit:g} s (env.step_timeout)"
        if not self.policy_name:
            raise UsageError(
                f"a worker could not start: {cause}",
                why=self.last_words(),
                fix="Try rollout.num_workers=1, and see whether the environment imports",
            )
        return cause

    def last_words(self) -> str:
        """The end of what the process wrote to its standard error."""
        self.stderr.seek(0)
        return self.stderr.read().decode(errors="replace").strip()[-_STDERR_CHARS:]

    def finish(self) -> None:
        """Let an idle process close its environment and end by itself."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=_GOODBYE_SECONDS)

    def kill(self) -> None:
        """End the process and everything that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for stream in (self.process.stdin, self.stdout, self.stderr):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()


def _start(config: CollectConfig, selector: selectors.BaseSelector) -> _Worker:
    code = f"from verl_sft.collect.worker import main; main({os.getpid()})"
    # A fixed hash seed: an environment that walks over a set gives the same data in every worker.
    variables = {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
    path = os.pathsep.join(p for p in sys.path if p)
    stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the worker
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
        env={**os.environ, **variables, "PYTHONPATH": path},
        start_new_session=True,
    )
    worker = _Worker(process, stderr, config.env.step_timeout)
    worker.begin(config)
    selector.register(worker.stdout, selectors.EVENT_READ, worker)
    return worker


def _crashed(worker: _Worker, cause: str, config: CollectConfig) -> Episode:
    """The episode that a dead worker was playing."""
    assert worker.spec is not None
    return make_episode(
        worker.spec,
        settings=RolloutSettings.from_config(config),
        policy_name=worker.policy_name,
        stop_reason=StopReason.ENV_ERROR,
        error=cause,
    )


def _check_crashes(crashes: int, cause: str) -> None:
    if crashes >= MAX_CRASHES_IN_A_ROW:
        raise PartialError(
            f"{crashes} workers in a row were lost; the last one: {cause}",
            why="Finished episodes are kept in the journal",
            fix="Mend the environment, then run the same command again to resume",
        )


def _startup_error(what: str, where: str, why: str, fix: str, exit_code: int) -> VerlSftError:
    kind: Any = InputError if exit_code == InputError.exit_code else UsageError
    error: VerlSftError = kind(what, where=where, why=why, fix=fix)
    return error


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
