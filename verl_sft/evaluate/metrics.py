"""Success rates with intervals, from episodes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from verl_sft.types import JSON, Episode, StopReason

_Z95 = 1.959963984540054  # 97.5 % quantile of the standard normal


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a rate (Wilson 1927); (0, 1) without trials.

    >>> tuple(round(x, 3) for x in wilson_interval(8, 10))
    (0.49, 0.943)
    """
    if trials == 0:
        return 0.0, 1.0
    rate, square = successes / trials, _Z95**2
    centre = (rate + square / (2 * trials)) / (1 + square / trials)
    spread = math.sqrt(rate * (1 - rate) / trials + square / (4 * trials**2))
    half = _Z95 * spread / (1 + square / trials)
    return max(0.0, centre - half), min(1.0, centre + half)


def summarise(episodes: Iterable[Episode]) -> JSON:
    """Figures of all episodes, and of each task type.

    Episodes whose environment failed are counted apart: they say nothing about the policy.
    """
    played = list(episodes)
    types = sorted({e.task_type for e in played})
    return {
        "overall": _figures(played),
        "by_task_type": {t: _figures([e for e in played if e.task_type == t]) for t in types},
        "errors": [
            {"task_id": e.task_id, "stop_reason": str(e.stop_reason), "error": e.error}
            for e in played
            if e.error
        ],
    }


def _figures(episodes: Sequence[Episode]) -> JSON:
    counted = [e for e in episodes if e.stop_reason is not StopReason.ENV_ERROR]
    steps = [s for e in counted for s in e.steps]
    wins = sum(e.success for e in counted)
    low, high = wilson_interval(wins, len(counted))
    return {
        "episodes": len(counted),
        "environment_errors": len(episodes) - len(counted),
        "successes": wins,
        "success_rate": wins / len(counted) if counted else 0.0,
        "success_low": low,
        "success_high": high,
        "mean_steps": len(steps) / len(counted) if counted else 0.0,
        "invalid_action_rate": sum(not s.action_valid for s in steps) / len(steps) if steps else 0,
        "mean_reward": sum(e.reward for e in counted) / len(counted) if counted else 0.0,
        "completion_tokens": sum(s.completion_tokens for s in steps),
    }


def table(summary: JSON) -> str:
    """The summary as plain text, one line per task type."""
    lines = [f"{'task type':<34}{'episodes':>9}{'success':>9}{'95 % interval':>16}{'steps':>7}"
             f"{'invalid':>9}"]  # fmt: skip
    rows = [*summary["by_task_type"].items(), ("all", summary["overall"])]
    for name, row in rows:
        interval = f"{row['success_low']:.1%} - {row['success_high']:.1%}"
        lines.append(
            f"{name:<34}{row['episodes']:>9}{row['success_rate']:>9.1%}{interval:>16}"
            f"{row['mean_steps']:>7.1f}{row['invalid_action_rate']:>9.1%}"
        )
    return "\n".join(lines)
