"""`status.json`: how a run ended, because a launcher turns every exit code into 1."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from verl_sft import safe_io

STATUS_FILE = "status.json"
STATUS_ENV = "VERL_SFT_STATUS"  # an extra copy for the launcher


def write_status(directory: Path | None, *, state: str, code: int | None, **facts: Any) -> None:
    """Publish the state (running, done, failed, preempted) and exit code of this run.

    Args:
        directory: of the run; None while it is not known, or belongs to another run.
        state: where the run is.
        code: exit code, None while it runs.
        facts: message, step and the like.
    """
    value = {"state": state, "exit_code": code, **facts}
    if directory is not None:
        safe_io.write_json(directory / STATUS_FILE, value)
    if os.environ.get(STATUS_ENV):
        where = None if directory is None else str(directory.absolute())
        safe_io.write_json(Path(os.environ[STATUS_ENV]), {**value, "directory": where})
