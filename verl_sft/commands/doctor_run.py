"""What became of a run, from the files in its directory."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from verl_sft.commands.doctor_checks import OK, PROBLEM, WARNING, Finding
from verl_sft.errors import RunBusyError, StorageError, UsageError
from verl_sft.safe_io import run_lock

_AGAIN = "Run the same command again to go on from the last checkpoint"
_CODES = {
    1: ("an error of the program itself", "Run with --debug and report what it prints"),
    2: ("a setting was refused", "Mend what the message names"),
    3: ("the data was refused", "Mend what the message names"),
    5: ("the disk refused", f"Make room or choose another directory. {_AGAIN}"),
    6: ("NaN or infinity; no weight was changed by it", "Look at the samples that it names"),
    7: ("it did not fit in memory", "Take one of the ways out that the message names"),
    8: ("a rank died or hung", _AGAIN),
    9: ("another run held the directory", "Wait for it to end"),
    75: ("it was told to stop and saved what it had", _AGAIN),
    130: ("it was stopped by Ctrl-C", _AGAIN),
}


def explain(run: Path) -> Iterator[Finding]:
    """Status, progress, newest checkpoint and export of a run.

    Raises:
        UsageError: no run was ever there.
    """
    if not (run / "status.json").is_file() and not list(run.glob("global_step_*")):
        raise UsageError(
            "no run was started there", where=str(run),
            fix="Give the trainer.default_local_dir of a run",
        )  # fmt: skip
    yield from _status(run)
    yield from _progress(run)
    yield from _checkpoints(run)
    manifest = run / "huggingface" / "manifest.json"
    if manifest.is_file():
        apart = json.loads(manifest.read_text("utf-8")).get("max_logit_difference")
        yield Finding(OK, "export", f"verified, logits differ by {apart:.2g} at most")


def _status(run: Path) -> Iterator[Finding]:
    try:
        status: dict[str, Any] = json.loads((run / "status.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        yield Finding(WARNING, "status", f"status.json cannot be read: {error}")
        return
    state, code = status.get("state"), status.get("exit_code")
    if state == "running":
        alive = _is_held(run)
        yield Finding(
            OK if alive else PROBLEM,
            "status",
            "running" if alive else "it was killed before it could say why",
            "" if alive else f"{_AGAIN}; the kernel's log (dmesg) tells of memory that ran out",
        )
        return
    if code == 0:
        upload = f"; upload {status['upload']}" if status.get("upload") else ""
        yield Finding(OK, "status", f"finished at step {status.get('step')}{upload}")
        return
    meaning, fix = _CODES.get(code or 1, ("unknown", ""))
    calm = code in (75, 130)
    yield Finding(WARNING if calm else PROBLEM, "status", f"{state}, exit {code}: {meaning}", fix)
    if status.get("message"):
        yield Finding(WARNING if calm else PROBLEM, "last message", str(status["message"]))


def _is_held(run: Path) -> bool:
    if not (run / ".run.lock").exists():
        return False
    try:
        with run_lock(run):
            return False
    except RunBusyError:
        return True


def _progress(run: Path) -> Iterator[Finding]:
    path = run / "metrics.jsonl"
    if not path.is_file():
        yield Finding(WARNING, "steps", "none was finished")
        return
    rows = [line for line in path.read_text("utf-8").splitlines() if line.startswith("{")]
    try:
        last = json.loads(rows[-1])
    except (IndexError, ValueError):
        yield Finding(WARNING, "steps", "metrics.jsonl ends in the middle of a line")
        return
    age = (time.time() - path.stat().st_mtime) / 60
    loss = last.get("train/loss")
    yield Finding(OK, "steps", f"{last.get('step')} done, loss {loss}, {age:.0f} minutes ago")


def _checkpoints(run: Path) -> Iterator[Finding]:
    try:
        from verl_sft.trainer.checkpoint import list_checkpoints, verify
    except ImportError as error:
        yield Finding(WARNING, "checkpoint", f"cannot be checked: {error}")
        return
    found = list_checkpoints(run)
    if not found:
        yield Finding(WARNING, "checkpoint", "there is none", "The run would start anew")
    for step, path in found:
        try:
            manifest = verify(path)
        except StorageError as error:
            yield Finding(PROBLEM, f"checkpoint {step}", str(error), "An older one is taken")
            continue
        yield Finding(
            OK, f"checkpoint {step}",
            f"whole, of {manifest['world_size']} ranks; a new start goes on from here",
        )  # fmt: skip
        return
