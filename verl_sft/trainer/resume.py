"""Where a run begins: at its newest whole checkpoint, at a named one, or anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from verl_sft.config.train import TrainConfig
from verl_sft.errors import UsageError
from verl_sft.trainer import checkpoint


def find_start(
    config: TrainConfig, *, directory: Path, marks: dict[str, Any], say: Any
) -> tuple[Path, dict[str, Any]] | None:
    """The verified checkpoint to go on from, or None for a fresh run.

    Raises:
        UsageError: the wanted one is not there, or it belongs to a run with other settings.
        StorageError: all checkpoints are damaged.
    """
    mode = config.trainer.resume_mode
    if mode == "resume_path":
        path = Path(str(config.trainer.resume_from_path)).expanduser()
        if not path.is_dir():
            near = sorted(str(p) for _, p in checkpoint.list_checkpoints(path.parent))
            raise UsageError(
                "no such checkpoint",
                where=f"trainer.resume_from_path={path}",
                fix=f"There are: {', '.join(near)}" if near else "Give a global_step_N folder",
            )
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
        found = checkpoint.find_resume(directory, say=say)
    if found is not None:
        checkpoint.check_fingerprint(found[1]["fingerprint"], current=marks, where=found[0])
    return found
