"""SIGTERM and Ctrl-C in a rank: the first one asks it to stop, a later one ends it at once."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from verl_sft.errors import Preempted

# A signal to a whole group arrives twice: from its sender, and from torchrun, which passes it on.
TWICE_S = 10.0

_raised: list[int] = []  # numbers of signals; a library's `except Exception` may have eaten one


def stop_on_signals(ask: Callable[[int], None]) -> None:
    """Call `ask` with the number of the first signal, and end the process at one that comes later.

    Args:
        ask: what the main thread does between two instructions; it should only note the number.
            Called at once if one came before, and what was raised then has been lost.
    """
    first: list[float] = []

    def handle(number: int, frame: Any) -> None:
        if first and time.monotonic() > first[0] + TWICE_S:
            os._exit(128 + number)
        if not first:
            first.append(time.monotonic())
            ask(number)

    for number in _ours():
        signal.signal(number, handle)
    if _raised:
        handle(_raised[0], None)


def stop_at_signals(*, interrupts: bool = False) -> None:
    """Let a signal raise `Preempted` where it comes: what is left of the run can be done again.

    Args:
        interrupts: Ctrl-C as well from now on, unless it is ignored; in the process of somebody
            else it stays a `KeyboardInterrupt`.
    """
    _raised.clear()
    if interrupts and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _raise)
    for number in _ours():
        signal.signal(number, _raise)


@contextlib.contextmanager
def handlers_kept() -> Iterator[None]:
    """What signals do behind the block is what they did before it."""
    _raised.clear()
    before = {number: signal.getsignal(number) for number in _ours()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def raised_signal() -> int:
    """Number of the signal that was raised since `stop_at_signals`; 0 if there was none."""
    return _raised[0] if _raised else 0


def stopped_at(step: int, *, total: int, number: int) -> Preempted:
    """The error of a run that all ranks leave behind the same step, with a checkpoint.

    Args:
        step: that was the last.
        total: steps of the run.
        number: of the signal; Ctrl-C has an exit code of its own.
    """
    error = Preempted(
        f"stopped by a signal at step {step} of {total}",
        fix="Run the same command again to go on from there",
    )
    error.agreed = True
    return _with_code(error, number)


def stopped_outside(number: int) -> Preempted:
    """The error of a run that a signal stopped before its first step, or behind its last one."""
    error = Preempted(
        "stopped by a signal outside of the training steps",
        fix="Run the same command again to go on from the last checkpoint, if there is one",
    )
    return _with_code(error, number)


def _with_code(error: Preempted, number: int) -> Preempted:
    if number == signal.SIGINT:
        error.exit_code = 130
    return error


def _ours() -> list[signal.Signals]:
    """SIGTERM, and Ctrl-C where `stop_at_signals` has taken it over; none in another thread."""
    if threading.current_thread() is not threading.main_thread():
        return []  # Python lets the main thread alone have handlers
    ours = getattr(signal.getsignal(signal.SIGINT), "__module__", "") == __name__
    return [signal.SIGTERM, *([signal.SIGINT] if ours else [])]


def _raise(number: int, frame: Any) -> None:
    for name in _ours():
        signal.signal(name, signal.SIG_IGN)
    _raised.append(number)
    raise stopped_outside(number)
