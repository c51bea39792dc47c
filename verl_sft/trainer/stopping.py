"""SIGTERM and Ctrl-C in a rank: the first one asks it to stop, a later one ends it at once."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

from verl_sft.errors import Preempted

# A signal to a whole group arrives twice: from its sender, and from torchrun, which passes it on.
TWICE_S = 10.0


def stop_on_signals(ask: Callable[[int], None]) -> None:
    """Call `ask` with the number of the first signal, and end the process at one that comes later.

    Args:
        ask: what the main thread does between two instructions; it should only note the number.
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


def stop_at_signals(*, interrupts: bool = False) -> None:
    """Let a signal raise `Preempted` where it comes: what is left of the run can be done again.

    Args:
        interrupts: Ctrl-C as well from now on, unless it is ignored; in the process of somebody
            else it stays a `KeyboardInterrupt`.
    """
    if interrupts and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _raise)
    for number in _ours():
        signal.signal(number, _raise)


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
    """SIGTERM, and Ctrl-C where `stop_at_signals` has taken it over."""
    other = (signal.SIG_IGN, signal.SIG_DFL, signal.default_int_handler, None)
    interrupts = signal.getsignal(signal.SIGINT) not in other
    return [signal.SIGTERM, *([signal.SIGINT] if interrupts else [])]


def _raise(number: int, frame: Any) -> None:
    for name in _ours():
        signal.signal(name, signal.SIG_IGN)
    raise stopped_outside(number)
