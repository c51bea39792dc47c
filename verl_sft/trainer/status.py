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
    places = [directory / STATUS_FILE] if directory is not None else []
    if os.environ.get(STATUS_ENV):
        places.append(Path(os.environ[STATUS_ENV]))
    for place in places:
        safe_io.write_json(place, value)
