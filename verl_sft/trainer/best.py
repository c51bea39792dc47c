"""Which checkpoint is the best one, when to stop for want of better, and the links to both ends.

The score of a step (higher is better) is in its checkpoint, so the disk decides which is the best,
and a resumed run counts on where it stopped.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from verl_sft import safe_io
from verl_sft.config.train import TrainerConfig
from verl_sft.errors import StorageError, UsageError

if TYPE_CHECKING:
    from verl_sft.trainer.checkpoint import TrainProgress

BEST, LAST = "best", "last"


def judged(
    progress: TrainProgress, *, metrics: Mapping[str, float], config: TrainerConfig
) -> TrainProgress:
    """Progress with the score of its step: better than all before by the least difference, or not.

    A step without the metric has no score and changes nothing; NaN or infinity is no better.
    """
    value = metrics.get(config.best_metric)
    if value is None:
        return replace(progress, score=None)
    if not math.isfinite(value):
        return replace(progress, score=None, bad_validations=progress.bad_validations + 1)
    score = value if higher_is_better(config.best_metric) else -value
    best = progress.best_score
    if best is None or score > best + config.early_stop_min_delta:
        return replace(progress, score=score, best_score=score, bad_validations=0)
    return replace(progress, score=score, bad_validations=progress.bad_validations + 1)


def must_save(progress: TrainProgress, *, config: TrainerConfig) -> bool:
    """Whether this step is the best so far in a run that has to keep its best model."""
    wanted = config.save_best or config.export_best or config.early_stop_patience is not None
    return wanted and progress.score is not None and progress.score == progress.best_score


def stops_early(progress: TrainProgress, *, config: TrainerConfig) -> bool:
    """Whether so many validations in a row were no better that the run is over."""
    patience = config.early_stop_patience
    return patience is not None and progress.bad_validations >= patience


def higher_is_better(metric: str) -> bool:
    """Losses fall, success and reward rise; of other metrics only rates of invalid actions fall."""
    return not ("loss" in metric or "invalid" in metric or metric.endswith("steps"))


def check_best(config: TrainerConfig, *, val_sets: Sequence[str], validates: bool) -> None:
    """Raise if the metric to judge by will never be there.

    Args:
        config: of the run.
        val_sets: names of the validation sets.
        validates: whether there are validation rows at all.

    Raises:
        UsageError: naming the key.
    """
    wanted = config.save_best or config.export_best or config.early_stop_patience is not None
    metric = config.best_metric
    if not wanted and metric == TrainerConfig.best_metric:
        return
    if metric.startswith("env/"):
        if config.env_eval_freq in (None, -1):
            raise UsageError(
                f"trainer.best_metric={metric} is measured in the environment only",
                fix="Set trainer.env_eval_freq, or judge by val/loss",
            )
        return
    known = ["val/loss", *(f"val/{name}/loss" for name in val_sets if name)] if validates else []
    if metric not in known and not (validates and metric.startswith("val/loss_")):
        raise UsageError(
            f"there will be no {metric} to find the best model by",
            why="There are no validation rows" if not validates else f"There are {known}",
            fix="Set data.val_files, or trainer.best_metric to one of these",
        )


def best_of(checkpoints: Sequence[tuple[int, Path]], *, manifest: str) -> Path | None:
    """The checkpoint with the highest score, the earliest of equals; None where none has one."""
    found: tuple[float, int, Path] | None = None
    for step, path in checkpoints:
        score = _score(path / manifest)
        if score is not None and (found is None or (score, -step) > found[:2]):
            found = (score, -step, path)
    return None if found is None else found[2]


def check_links(directory: Path) -> None:
    """Raise before the run if a folder stands where a link goes.

    Raises:
        StorageError: a copy of a run whose links were followed.
    """
    for name in (LAST, BEST):
        path = directory / name
        if path.is_dir() and not path.is_symlink():
            raise StorageError(
                "a folder stands where the link to a checkpoint goes",
                where=str(path),
                why="Copying a run with its links followed makes folders of them",
                fix="Remove it: the checkpoints themselves are the folders global_step_N",
            )


def publish_links(
    directory: Path, checkpoints: Sequence[tuple[int, Path]], *, manifest: str
) -> None:
    """Point `last` at the newest checkpoint and `best` at the best one, atomically."""
    if checkpoints:
        safe_io.publish_link(directory / LAST, max(checkpoints)[1].name)
    best = best_of(checkpoints, manifest=manifest)
    if best is not None:
        safe_io.publish_link(directory / BEST, best.name)


def _score(manifest: Path) -> float | None:
    try:
        progress: dict[str, Any] = json.loads(manifest.read_text("utf-8"))["progress"]
        score = progress.get("score")
    except (OSError, ValueError, KeyError, AttributeError):
        return None  # a damaged one is not the best; whoever reads it says so
    return float(score) if isinstance(score, int | float) else None
