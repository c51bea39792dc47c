"""`status.json`: how a run ended, because a launcher turns every exit code into 1.

`python -m verl_sft.trainer.status RUN_DIRECTORY CODE`, after a torchrun that ended with CODE, exits
with the run's own code.
"""

from __future__ import annotations

import json
import os
import sys
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


def true_code(directory: Path, *, launcher_code: int) -> int:
    """The code that the run left, where the launcher only knows that it failed."""
    if launcher_code == 0:
        return 0
    try:
        code = json.loads((directory / STATUS_FILE).read_text("utf-8"))["exit_code"]
    except (OSError, ValueError, KeyError, TypeError):
        return launcher_code
    return code if isinstance(code, int) and code else launcher_code


if __name__ == "__main__":
    if len(sys.argv) != 3 or not sys.argv[2].isdigit():
        sys.exit("usage: python -m verl_sft.trainer.status RUN_DIRECTORY CODE")
    sys.exit(true_code(Path(sys.argv[1]), launcher_code=int(sys.argv[2])))
