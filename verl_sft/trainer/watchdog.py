"""A rank that hangs, and ranks that wait for it, end within a bounded time and say which it is.

Each rank has a thread that looks at the clock while its main thread is inside a watched phase. When
the time is over it dumps all Python stacks, tells the others where its main thread stands, hears
where theirs stand, and ends the process. Ranks inside torch, or in our exchange between ranks, wait
for somebody; one that stands elsewhere, or cannot even answer, is the one they wait for.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch

import verl_sft.distributed
from verl_sft.distributed.setup import World
from verl_sft.errors import PeerLostError

STACKS = "stacks_rank_{rank}.txt"
_HEAR_S = 3.0  # how long the others may take to tell where they stand
_LAST_RESORT_S = 8.0  # behind the timeout: even if nothing in Python runs any more
_WAITING = tuple(
    str(Path(str(place)).parent) + os.sep
    for place in (torch.__file__, Path(next(iter(verl_sft.distributed.__path__))) / "x")
)


class Board(Protocol):
    """What all ranks can write to and read; torch's stores can."""

    def set(self, key: str, value: str) -> None:
        """Publish a value."""
        ...

    def get(self, key: str) -> bytes:
        """A value that is there."""
        ...

    def check(self, keys: list[str]) -> bool:
        """Whether all keys are there."""
        ...


class Watchdog:
    """Watches the main thread of one rank.

    Args:
        timeout: seconds that a phase may take; 0 watches nothing.
        world: the ranks.
        board: for telling the other ranks; None: nobody is told.
        directory: where stacks are written.
        on_lost: called with the error before the process ends with its exit code.
    """

    def __init__(
        self,
        timeout: float,
        *,
        world: World,
        board: Board | None,
        directory: Path,
        on_lost: Callable[[PeerLostError], None],
    ) -> None:
        self._timeout, self._world, self._board = timeout, world, board
        self._directory, self._on_lost = directory, on_lost
        self._main = threading.get_ident()
        self._phase, self._until = "", 0.0
        self._thread: threading.Thread | None = None

    @contextlib.contextmanager
    def watch(self, phase: str) -> Iterator[None]:
        """Give the block `timeout` seconds."""
        if self._timeout <= 0:
            yield
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._look, name="watchdog", daemon=True)
            self._thread.start()
        self._phase, self._until = phase, time.monotonic() + self._timeout
        faulthandler.dump_traceback_later(self._timeout + _LAST_RESORT_S, exit=True)
        try:
            yield
        finally:
            self._until = 0.0
            faulthandler.cancel_dump_traceback_later()

    def _look(self) -> None:
        while True:
            time.sleep(min(1.0, self._timeout / 10))
            until = self._until
            if until and time.monotonic() > until:
                self._end()

    def _end(self) -> None:
        frame = sys._current_frames().get(self._main)
        mine = {"waits": frame is None or _waits(frame), "at": _place(frame), "phase": self._phase}
        with contextlib.suppress(OSError):
            path = self._directory / STACKS.format(rank=self._world.rank)
            with path.open("w", encoding="utf-8") as stream:
                faulthandler.dump_traceback(stream, all_threads=True)
        faulthandler.dump_traceback(all_threads=True)
        answers = self._hear(mine)
        error = lost(
            answers, num_ranks=self._world.size, timeout=self._timeout, directory=self._directory
        )
        speaker = min(answers)
        if self._world.rank == speaker:
            self._on_lost(error)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(error.exit_code)

    def _hear(self, mine: Mapping[str, Any]) -> dict[int, Mapping[str, Any]]:
        """Where each rank that still answers stands."""
        found = {self._world.rank: mine}
        if self._board is None:
            return found
        with contextlib.suppress(RuntimeError):  # a store whose owner is gone
            self._board.set(_key(self._world.rank), json.dumps(mine))
            end = time.monotonic() + _HEAR_S
            while len(found) < self._world.size and time.monotonic() < end:
                for rank in set(range(self._world.size)) - set(found):
                    if self._board.check([_key(rank)]):
                        found[rank] = json.loads(self._board.get(_key(rank)))
                time.sleep(0.05)
            time.sleep(0.2)  # so that the others hear us before a store in this process is gone
        return found


def lost(
    answers: Mapping[int, Mapping[str, Any]], *, num_ranks: int, timeout: float, directory: Path
) -> PeerLostError:
    """The error that names the ranks that everybody waits for.

    Args:
        answers: `waits`, `at` and `phase` of each rank that answered.
        num_ranks: of the run.
        timeout: seconds that were given.
        directory: where the stacks are.
    """
    silent = sorted(set(range(num_ranks)) - set(answers))
    busy = [rank for rank in sorted(answers) if not answers[rank]["waits"]]
    phase = answers[min(answers)]["phase"]
    if silent:
        who = f"{_ranks(silent)} no longer answer{'s' if len(silent) == 1 else ''}"
    elif busy:
        places = "; ".join(f"rank {rank} is at {answers[rank]['at']}" for rank in busy)
        who = f"the others wait for {_ranks(busy)} ({places})"
    else:
        who = "all ranks wait for one another"
    return PeerLostError(
        f"{phase} took longer than trainer.step_timeout_s={timeout:g}: {who}",
        where=str(directory),
        why=f"The stacks of the ranks are in {STACKS.format(rank='N')}",
        fix="Run the same command again to go on from the last checkpoint, or allow more seconds",
    )


def _waits(frame: FrameType) -> bool:
    return frame.f_code.co_filename.startswith(_WAITING)


def _place(frame: FrameType | None) -> str:
    """The innermost line of Python, as `file:line function`."""
    if frame is None:
        return "?"
    code = frame.f_code
    return f"{Path(code.co_filename).name}:{frame.f_lineno} {code.co_name}"


def _ranks(ranks: Sequence[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))


def _key(rank: int) -> str:
    return f"verl_sft/stands/{rank}"
