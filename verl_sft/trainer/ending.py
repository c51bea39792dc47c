"""How a rank ends: who speaks, what is recorded, and which code it leaves with.

An error that all ranks raised alike is told by rank 0. One that a single rank met is told by that
rank; the others only see a broken connection, and stay silent once the cause is recorded.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from verl_sft.errors import PeerLostError, Preempted
from verl_sft.trainer.failures import as_user_error
from verl_sft.trainer.status import STATUS_ENV, STATUS_FILE, write_status
from verl_sft.trainer.stopping import raised_signal, stopped_outside

_MAIN_FIRST_S = 1.0  # the others of a stopped run only record what rank 0 cannot


@dataclass(frozen=True)
class End:
    """How this rank ended; `agreed` if every rank ends alike."""

    code: int
    agreed: bool


def failed(error: BaseException, *, directory: Path | None) -> End:
    """Tell and record why this rank did not finish.

    Args:
        error: that ended it.
        directory: of the run, once it is held; else None.
    """
    if isinstance(error, KeyboardInterrupt):
        return _record(130, "stopped by Ctrl-C", directory, speak=_is_main())
    assert isinstance(error, Exception)
    known = as_user_error(error)
    if known is None:
        traceback.print_exception(error)
        _write_end(1, f"{type(error).__name__}: {error}", directory, told=True)
        return End(1, agreed=False)
    if isinstance(known, PeerLostError) and raised_signal():
        known = stopped_outside(raised_signal())  # the others were told to stop, too, and are gone
    agreed = known.agreed or not dist.is_initialized()
    if agreed:
        if _is_main():
            _record(known.exit_code, str(known), directory, speak=True)
        return End(known.exit_code, agreed=True)
    if isinstance(known, Preempted) and not _is_main():
        time.sleep(_MAIN_FIRST_S)
    before = _recorded(directory)
    if isinstance(known, PeerLostError):
        if not before:  # our own launcher knows better which rank is gone, and why
            speak = not os.environ.get(STATUS_ENV)
            return _record(known.exit_code, str(known), directory, speak=speak)
        if _is_main() and not before.get("told") and before.get("state") == "preempted":
            return _record(before["exit_code"], before["message"], directory, speak=True)
        return End(known.exit_code, agreed=False)
    speak = _is_main() or not isinstance(known, Preempted)
    if before and (before.get("told") or not speak):
        return End(known.exit_code, agreed=False)
    return _record(known.exit_code, str(known), directory, speak=speak)


def lost_peer(error: PeerLostError, *, directory: Path) -> None:
    """Tell and record that other ranks no longer answer; the process ends by other means."""
    print(f"verl-sft: {error}", file=sys.stderr, flush=True)
    write_status(directory, state="failed", code=error.exit_code, message=str(error), told=True)


def leave(end: End) -> None:
    """End the process now: destructors of process groups fail runs that had succeeded.

    Where all ranks ended alike, and are under our own launcher, which reads the code from
    `status.json`, torchrun has no reason to stop anybody.
    """
    code = 0 if end.agreed and os.environ.get(STATUS_ENV) else end.code
    if end.agreed and dist.is_initialized() and dist.get_world_size() > 1:
        with contextlib.suppress(RuntimeError):  # a peer that is gone has its own exit code
            dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _record(code: int, message: str, directory: Path | None, *, speak: bool) -> End:
    if speak:
        print(f"verl-sft: {message}", file=sys.stderr, flush=True)
    _write_end(code, message, directory, told=speak)
    return End(code, agreed=False)


def _write_end(code: int, message: str, directory: Path | None, *, told: bool) -> None:
    """Record how a run ended that did not finish, if the disk lets us."""
    state = "preempted" if code in (Preempted.exit_code, 130) else "failed"
    with contextlib.suppress(OSError):  # a full disk must not hide what happened
        write_status(directory, state=state, code=code, message=message, told=told)


def _recorded(directory: Path | None) -> dict[str, Any]:
    """How this run ended, where a rank has recorded it already."""
    copy = os.environ.get(STATUS_ENV)
    places = [Path(copy)] if copy else [directory / STATUS_FILE] if directory else []
    for place in places:
        with contextlib.suppress(OSError, ValueError):
            found: dict[str, Any] = json.loads(place.read_text("utf-8"))
            if found["exit_code"] is not None:
                return found
    return {}


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"
