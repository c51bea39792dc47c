"""Where a run begins: at its newest whole checkpoint, at a named one, or anew."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from verl_sft import safe_io
from verl_sft.config.train import TrainConfig
from verl_sft.data.stale import key_changes
from verl_sft.errors import UsageError
from verl_sft.trainer import checkpoint

DATA_KEY = "data_key.json"  # in the run's directory: what its tokens depend on


def find_start(
    config: TrainConfig, *, directory: Path, marks: dict[str, Any], store: Any, say: Any
) -> tuple[Path, dict[str, Any]] | None:
    """The verified checkpoint to go on from, or None for a fresh run.

    Raises:
        UsageError: the wanted one is not there, or it belongs to a run with other settings.
        StorageError: all checkpoints are damaged.
    """
    mode = config.trainer.resume_mode
    if mode == "resume_path":
        path = named_checkpoint(config)
        found: tuple[Path, dict[str, Any]] | None = (path, checkpoint.verify(path))
    elif mode == "disable":
        if checkpoint.list_checkpoints(directory):
            raise UsageError(
                "there are checkpoints of an earlier run",
                where=str(directory),
                why="trainer.resume_mode=disable starts anew and would mix the two runs",
                fix="Choose another trainer.default_local_dir, or move them away",
            )
        found = None
    else:
        fallback = config.trainer.on_corrupt == "fallback"
        found = checkpoint.find_resume(directory, say=say, fallback=fallback)
    if found is not None:
        _check_same(found[1]["fingerprint"], marks=marks, where=found[0], store=store)
    return found


def named_checkpoint(config: TrainConfig) -> Path:
    """The folder that `trainer.resume_from_path` names.

    Raises:
        UsageError: there is none.
    """
    given = config.trainer.resume_from_path
    if not given:
        raise UsageError(
            "trainer.resume_mode=resume_path needs trainer.resume_from_path",
            fix="Give the path of a global_step_N folder",
        )
    path = Path(given).expanduser()
    if not (path / checkpoint.MANIFEST).is_file():
        folders = (path, path.parent)  # of the run that was given instead, or of a mistyped step
        near = sorted(str(p) for run in folders for _, p in checkpoint.list_checkpoints(run))
        raise UsageError(
            "no such checkpoint",
            where=f"trainer.resume_from_path={path}",
            fix=f"There are: {', '.join(near)}" if near else "Give a global_step_N folder",
        )
    return path


def remember_data(directory: Path, *, store: Any) -> None:
    """Note from which files, template and settings the tokens were made, for a later message."""
    key = _data_key(getattr(store, "path", None), "key.json")
    if key is not None:
        safe_io.write_json(directory / DATA_KEY, key)


def _check_same(saved: dict[str, Any], *, marks: dict[str, Any], where: Path, store: Any) -> None:
    try:
        checkpoint.check_fingerprint(saved, current=marks, where=where)
    except UsageError as error:
        old = _data_key(where.parent, DATA_KEY)
        new = _data_key(getattr(store, "path", None), "key.json")
        changes = key_changes(old, new) if old is not None and new is not None else []
        if saved.get("data") == marks.get("data") or not changes:
            raise
        raise UsageError(
            error.what,
            where=error.where,
            why=f"The data differ in: {'; '.join(changes)}. {error.why}",
            fix=error.fix,
        ) from error


def _data_key(folder: Path | None, name: str) -> dict[str, Any] | None:
    if folder is None:
        return None
    try:
        found: dict[str, Any] = json.loads((folder / name).read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return found
