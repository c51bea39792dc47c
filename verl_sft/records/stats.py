"""What a collection holds: `stats.json` for people, `manifest.json` for machines."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from verl_sft.records.schema import SCHEMA_VERSION, SFTRecord
from verl_sft.safe_io import file_sha256
from verl_sft.types import JSON, Episode


@dataclass(slots=True)
class StatsCounter:
    """Counts episodes and rows as they stream by; `result` is the content of `stats.json`."""

    episodes: int = 0
    successes: int = 0
    kept: int = 0
    reward: float = 0.0
    invalid_actions: int = 0
    context_steps: int = 0
    by_type: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    steps: Counter[int] = field(default_factory=Counter)
    stop_reasons: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    duplicate_rows: int = 0
    errors: list[JSON] = field(default_factory=list)
    rows: dict[str, Counter[str]] = field(
        default_factory=lambda: {"train": Counter(), "val": Counter()}
    )

    def add_episode(self, episode: Episode, *, dropped: str) -> None:
        """Count an episode; `dropped` is the reason why it gives no rows, or empty."""
        self.episodes += 1
        self.successes += episode.success
        self.reward += episode.reward
        self.steps[len(episode.steps)] += 1
        self.stop_reasons[str(episode.stop_reason)] += 1
        self.invalid_actions += sum(not s.action_valid for s in episode.steps)
        kind = self.by_type[episode.task_type]
        kind.update(episodes=1, successes=int(episode.success), kept=int(not dropped))
        if dropped:
            self.dropped[dropped] += 1
        else:
            self.kept += 1
            self.context_steps += sum(s.weight <= 0 for s in episode.steps)
        if episode.error:
            self.errors.append(
                {
                    "task_id": episode.task_id,
                    "episode_id": episode.episode_id,
                    "stop_reason": str(episode.stop_reason),
                    "error": episode.error,
                }
            )

    def add_row(self, record: SFTRecord, *, side: str) -> None:
        """Count a row of `train` or `val`."""
        texts = [len(m.content) for m in record.messages if isinstance(m.content, str)]
        self.rows[side].update(
            rows=1,
            message_chars=sum(texts),
            prompt_chars=len(record.prompt or ""),
            response_chars=len(record.response or ""),
        )

    @property
    def failed(self) -> int:
        """Episodes that ended with an error."""
        return len(self.errors)

    def result(self, **more: Any) -> JSON:
        """The statistics as JSON; `more` is added at the top level."""
        total_steps = sum(n * count for n, count in self.steps.items())
        return {
            "episodes": self.episodes,
            "successes": self.successes,
            "success_rate": _ratio(self.successes, self.episodes),
            "mean_reward": _ratio(self.reward, self.episodes),
            "kept_episodes": self.kept,
            "dropped_episodes": dict(self.dropped),
            "by_task_type": {
                kind: {**counts, "success_rate": _ratio(counts["successes"], counts["episodes"])}
                for kind, counts in self.by_type.items()
            },
            "stop_reasons": dict(self.stop_reasons),
            "steps": {
                "total": total_steps,
                "mean": _ratio(total_steps, self.episodes),
                "min": min(self.steps, default=0),
                "max": max(self.steps, default=0),
                "histogram": {str(n): count for n, count in self.steps.items()},
            },
            "invalid_actions": self.invalid_actions,
            "context_steps": self.context_steps,
            "duplicate_rows": self.duplicate_rows,
            "rows": {side: _side(counts) for side, counts in self.rows.items()},
            "errors": self.errors,
            **more,
        }


def manifest(
    directory: Path, *, files: tuple[str, ...], config: Mapping[str, Any], counts: Mapping[str, Any]
) -> JSON:
    """The content of `manifest.json`: what made the files, and the sha256 of each.

    The hashes detect accident, not malice.
    """
    return {
        "schema_version": SCHEMA_VERSION,
        "config": dict(config),
        "counts": dict(counts),
        "files": {
            name: {
                "bytes": (directory / name).stat().st_size,
                "sha256": file_sha256(directory / name),
            }
            for name in files
        },
    }


def _side(counts: Counter[str]) -> JSON:
    names = ("rows", "message_chars", "prompt_chars", "response_chars")
    return {name: counts[name] for name in names}


def _ratio(part: float, whole: int) -> float:
    return round(part / whole, 6) if whole else 0.0
