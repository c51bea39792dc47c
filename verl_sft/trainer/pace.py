"""Which rank is slow: each one's own work of a step, told to all with the next step's counts.

Wall time says nothing, as every rank takes as long as the slowest. Own work is the time to read and
build the batches, and the processor time of the main thread for the rest of the step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median

from verl_sft.distributed.setup import World

_FACTOR = 3.0  # times the median of the others
_LEAST_S = 0.05  # above it: less is noise
_IN_A_ROW = 3  # steps
_SILENCE_S = 600.0  # between two warnings about the same rank


class Pace:
    """Measures this rank's own work, and warns about ranks that need far more than the others.

    Args:
        world: the ranks.
        say: takes the warning.
    """

    def __init__(self, world: World, *, say: Callable[[str], None]) -> None:
        self._world, self._say = world, say
        self._began = self._cpu = self._own = self._last = 0.0
        self._slow = [0] * world.size
        self._told = [-_SILENCE_S] * world.size

    def begin(self) -> None:
        """The step begins, with reading."""
        self._began, self._last = time.perf_counter(), self._own

    def loaded(self) -> None:
        """The batches are there."""
        self._own, self._cpu = time.perf_counter() - self._began, time.thread_time()

    def end(self) -> None:
        """The step is done."""
        self._own += time.thread_time() - self._cpu

    def share(self) -> list[float]:
        """Seconds of the step before, to be summed over ranks: one number for each rank."""
        own = [0.0] * self._world.size
        own[self._world.rank] = self._last
        return own

    def judge(self, seconds: Sequence[float], *, step: int) -> None:
        """Warn about a rank that was slow several times in a row, not often.

        Args:
            seconds: own work of each rank.
            step: whose work that was.
        """
        if len(seconds) < 2:
            return
        for rank, own in enumerate(seconds):
            usual = median(other for index, other in enumerate(seconds) if index != rank)
            slow = own > _FACTOR * usual and own > usual + _LEAST_S
            self._slow[rank] = self._slow[rank] + 1 if slow else 0
            now = time.monotonic()
            if self._slow[rank] >= _IN_A_ROW and now - self._told[rank] >= _SILENCE_S:
                self._told[rank] = now
                self._say(
                    f"WARNING: rank {rank} is slow: {own:.2f} s of own work at step {step}, "
                    f"the median of the others is {usual:.2f} s"
                )
