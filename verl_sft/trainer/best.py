"""Which checkpoint is the best one, when to stop for want of better, and the links to both ends.

The score of a step (higher is better) is in its checkpoint, so the disk decides which is the best,
and a resumed run counts on where it stopped.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from verl_sft import safe_io
from verl_sft.config.train import TrainerConfig
from verl_sft.data.kinds import KINDS
from verl_sft.errors import StorageError, UsageError
from verl_sft.registry import unknown_name

if TYPE_CHECKING:
    from verl_sft.trainer.checkpoint import TrainProgress

BEST, LAST = "best", "last"
ENV_METRICS = ("success_rate", "episodes", "mean_steps", "invalid_action_rate", "mean_reward")
_KIND = "val/loss_kind/"


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


def check_metric(config: TrainerConfig) -> None:
    """Raise if no run with these options measures `trainer.best_metric`.

    Raises:
        UsageError: naming the key.
    """
    metric = config.best_metric
    where = f"trainer.best_metric={metric}"
    kind = metric.removeprefix(_KIND)
    if metric.startswith("env/"):
        if config.env_eval_freq in (None, -1, 0):
            raise UsageError(
                "it is measured in the environment only",
                where=where,
                fix="Set trainer.env_eval_freq, or judge by val/loss",
            )
        known = [f"env/{name}" for name in ENV_METRICS]
        if metric not in known and not metric.startswith("env/success_rate/"):
            raise UsageError("no game tells that", where=where, fix=_near(metric, known))
    elif metric.startswith("val/loss_"):
        if not config.loss_breakdown:
            raise UsageError("trainer.loss_breakdown=false measures no parts", where=where)
        if metric.startswith(_KIND) and kind not in KINDS[1:]:
            known = [f"{_KIND}{name}" for name in KINDS[1:]]
            raise UsageError("no such kind of token", where=where, fix=_near(metric, known))
        if not metric.startswith((_KIND, "val/loss_turn/", "val/loss_source/")):
            raise UsageError("no such loss", where=where, fix="See the names in metrics.jsonl")
    elif not re.fullmatch(r"val/([^/]+/)?loss", metric):
        known = ["val/loss", *(f"env/{name}" for name in ENV_METRICS)]
        raise UsageError("nothing is measured by that name", where=where, fix=_near(metric, known))


def check_best(config: TrainerConfig, *, val_sets: Sequence[str]) -> None:
    """Raise if the best model is to be judged by validation rows that are not there.

    Args:
        config: of the run.
        val_sets: names of the validation sets that were found ("": the only one).

    Raises:
        UsageError: naming the keys.
    """
    wanted = {
        "trainer.early_stop_patience": config.early_stop_patience is not None,
        "trainer.export_best": config.export_best,
        "trainer.save_best": config.save_best,
        "trainer.best_metric": config.best_metric != TrainerConfig.best_metric,
    }
    metric = config.best_metric
    key = next((key for key, given in wanted.items() if given), None)
    if key is None or metric.startswith("env/"):
        return
    if not val_sets:
        raise UsageError(
            f"{key} needs validation rows, and there are none",
            why=f"It judges by {metric}",
            fix="Set data.val_files or data.val_size, or judge by a metric of the environment "
            "(trainer.best_metric, trainer.env_eval_freq)",
        )
    known = ["val/loss", *(f"val/{name}/loss" for name in val_sets if name)]
    if metric not in known and not metric.startswith("val/loss_"):
        raise UsageError(
            "there is no validation set of that name",
            where=f"trainer.best_metric={metric}",
            fix=_near(metric, known),
        )


def _near(metric: str, known: Sequence[str]) -> str:
    return unknown_name("metric", metric, known).fix


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
    """Point `last` at the newest checkpoint and `best` at the best one, atomically.

    A link whose checkpoint somebody has deleted goes as well, where nothing takes its place.
    """
    newest = max(checkpoints)[1] if checkpoints else None
    for name, target in ((LAST, newest), (BEST, best_of(checkpoints, manifest=manifest))):
        link = directory / name
        if target is not None:
            safe_io.publish_link(link, target.name)
        elif link.is_symlink() and not link.exists():
            link.unlink()


def _score(manifest: Path) -> float | None:
    try:
        progress: dict[str, Any] = json.loads(manifest.read_text("utf-8"))["progress"]
        score = progress.get("score")
    except (OSError, ValueError, KeyError, AttributeError):
        return None  # a damaged one is not the best; whoever reads it says so
    return float(score) if isinstance(score, int | float) else None
