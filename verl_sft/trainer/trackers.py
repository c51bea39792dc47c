"""wandb, mlflow, trackio and swanlab, each at arm's length: they cannot block or fail a run.

Every tracker lives in a thread of its own behind a bounded queue. What it raises is told once,
what it has no time for is dropped and counted, and a run waits for it at the end only so long.
Without a login all of them write to this machine; their own environment variables say otherwise.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

QUEUE_SIZE = 1000  # steps that a tracker may lag behind
CLOSE_SECONDS = 30.0  # that a run waits for it at the end
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASS", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class RunInfo:
    """What a tracker is told about a run."""

    project: str
    name: str
    directory: Path
    config: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Session:
    """A started tracker: `log(metrics, step)` and `finish()`, both of which may raise or hang."""

    log: Callable[[Mapping[str, float], int], Any]
    finish: Callable[[], Any]


def _wandb(module: Any, info: RunInfo) -> Session:
    run = module.init(
        project=info.project,
        name=info.name,
        config=dict(info.config),
        dir=str(info.directory),
        mode=os.environ.get("WANDB_MODE") or "offline",
    )
    return Session(lambda metrics, step: run.log(dict(metrics), step=step), run.finish)


def _mlflow(module: Any, info: RunInfo) -> Session:
    # A database: mlflow 3 refuses to write plain files.
    place = f"sqlite:///{(info.directory / 'mlflow.db').absolute()}"
    module.set_tracking_uri(os.environ.get("MLFLOW_TRACKING_URI") or place)
    module.set_experiment(info.project)
    module.start_run(run_name=info.name)

    def log(metrics: Mapping[str, float], step: int) -> None:
        # mlflow takes letters, digits and a few signs in a name.
        named = {re.sub(r"[^\w\-. /]", "_", k): float(v) for k, v in metrics.items()}
        module.log_metrics(named, step=step)

    return Session(log, module.end_run)


def _trackio(module: Any, info: RunInfo) -> Session:
    run = module.init(
        project=info.project, name=info.name, config=dict(info.config), resume="allow"
    )
    return Session(lambda metrics, step: run.log(dict(metrics), step=step), run.finish)


def _swanlab(module: Any, info: RunInfo) -> Session:
    module.init(
        project=info.project,
        experiment_name=info.name,
        config=dict(info.config),
        logdir=str(info.directory / "swanlog"),
        mode=os.environ.get("SWANLAB_MODE") or "offline",
    )
    return Session(lambda metrics, step: module.log(dict(metrics), step=step), module.finish)


ADAPTERS: dict[str, Callable[[Any, RunInfo], Session]] = {
    "wandb": _wandb,
    "mlflow": _mlflow,
    "trackio": _trackio,
    "swanlab": _swanlab,
}


class Remote:
    """One tracker in its thread.

    Args:
        name: one of `ADAPTERS`, also the name of its package.
        info: about the run.
        say: tells the user; called from the tracker's thread.
        size: steps it may lag behind.
    """

    def __init__(
        self, name: str, *, info: RunInfo, say: Callable[[str], None], size: int = QUEUE_SIZE
    ) -> None:
        self.name, self.dropped, self.failed = name, 0, False
        self.say = say
        self._queue: queue.Queue[tuple[Mapping[str, float], int] | None] = queue.Queue(size)
        self._thread = threading.Thread(target=self._work, args=(info,), name=name, daemon=True)
        self._thread.start()

    def log(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Hand over the metrics of a step, or drop them if the tracker is that far behind."""
        if self.failed:
            return
        try:
            self._queue.put_nowait((metrics, step))
        except queue.Full:
            self.dropped += 1
            if self.dropped == 1:
                self.say(f"{self.name} does not keep up: steps are dropped there, not in the run")

    def close(self, *, seconds: float = CLOSE_SECONDS) -> None:
        """Let the tracker finish what it has, but not for longer than `seconds`."""
        close_all([self], seconds=seconds)

    def end(self) -> None:
        """Tell the tracker that nothing follows; if its queue is full, it will not hear it."""
        with contextlib.suppress(queue.Full):
            self._queue.put_nowait(None)

    def wait(self, *, until: float) -> bool:
        """Whether the tracker finished before that time of the monotonic clock."""
        if self._queue.full() and not self.failed:
            with contextlib.suppress(queue.Full):
                self._queue.put(None, timeout=max(until - time.monotonic(), 0))
        self._thread.join(max(until - time.monotonic(), 0))
        return not self._thread.is_alive()

    def _work(self, info: RunInfo) -> None:
        try:
            session = ADAPTERS[self.name](importlib.import_module(self.name), info)
            while (item := self._queue.get()) is not None:
                session.log(*item)
            session.finish()
        except BaseException as error:  # SystemExit as well: some trackers call sys.exit
            self.failed = True
            self.say(f"{self.name} is switched off: {without_secrets(_told(error))}")


def close_all(remotes: Sequence[Remote], *, seconds: float = CLOSE_SECONDS) -> None:
    """Let all trackers finish at the same time, for `seconds` in all however many hang."""
    until = time.monotonic() + seconds
    for remote in remotes:
        remote.end()
    for remote in remotes:
        if not remote.wait(until=until):
            remote.say(f"{remote.name} did not finish within {seconds:g} s and is left alone")


def without_secrets(text: str) -> str:
    """`text` without the values of environment variables whose names speak of keys or tokens."""
    for name, value in os.environ.items():
        if _SECRET.search(name) and len(value) > 3:
            text = text.replace(value, "***")
    return text


def _told(error: BaseException) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name in ADAPTERS:
        return f"the package '{error.name}' is not installed"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
