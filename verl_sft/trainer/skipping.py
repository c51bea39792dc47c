"""Steps whose loss or gradient is not finite: which samples, and whether the run may go on.

All ranks saw the same sums, so all decide the same, before any weight or moment has changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from verl_sft.config.train import TrainerConfig
from verl_sft.data.plan import StepPlan
from verl_sft.distributed.reduce import gather_json
from verl_sft.distributed.setup import World
from verl_sft.errors import NonFiniteError
from verl_sft.trainer.checkpoint import TrainProgress

_NAMED_IDS = 20  # samples named in a message


def is_finite(*values: float) -> bool:
    """Whether none is NaN or infinite."""
    return all(math.isfinite(value) for value in values)


def bad_samples(
    step_plan: StepPlan, *, losses: Sequence[float], name: Callable[[int], str], world: World
) -> list[str]:
    """Samples of the micro-batches with a bad loss, on all ranks; all of the step if only a
    gradient is bad.

    Args:
        step_plan: the step; every rank must call.
        losses: of this rank's micro-batches.
        name: of a sample by its index.
        world: the ranks.
    """  # noqa: D205
    micros = step_plan.ranks[world.dp_rank]
    bad = [m for m, value in zip(micros, losses, strict=True) if not is_finite(value)]
    mine = [name(i) for micro in bad for row in micro for i in row]
    named = [found for part in gather_json(mine, world=world) for found in part]
    return list(dict.fromkeys(named or [name(i) for i in step_plan.sample_indices()]))


def check_skip(
    names: Sequence[str], *, progress: TrainProgress, config: TrainerConfig, where: Path
) -> None:
    """Raise unless one more step may be left out.

    Raises:
        NonFiniteError: `trainer.nan_policy` is stop, or too many steps were skipped already.
    """
    if config.nan_policy == "skip" and progress.skipped < config.max_skipped_steps:
        return
    shown = ", ".join(names[:_NAMED_IDS]) + (" ..." if len(names) > _NAMED_IDS else "")
    before = f", after {progress.skipped} skipped steps" if config.nan_policy == "skip" else ""
    error = NonFiniteError(
        f"loss or gradient is not finite at step {progress.step + 1}{before}",
        where=str(where),
        why=f"It comes from these samples: {shown}. The update was not made",
        fix="Look at them, lower optim.lr, use engine.dtype=fp32, or allow trainer.nan_policy=skip "
        "with trainer.max_skipped_steps",
    )
    error.agreed = True
    raise error


def flagged(metrics: dict[str, Any], *, names: Sequence[str], total: int) -> dict[str, Any]:
    """The metrics of a skipped step: what is not a number is left out, the samples are there.

    Args:
        metrics: of the step.
        names: of its bad samples.
        total: steps skipped so far.
    """
    kept = {k: v for k, v in metrics.items() if not isinstance(v, float) or is_finite(v)}
    return {**kept, "train/skipped": 1, "train/skipped_total": total, "skipped_samples": [*names]}
