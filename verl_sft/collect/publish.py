"""Finished episodes to the files of a data set, in two passes over the journal.

The first pass filters, counts and writes the raw episodes; the second builds rows and publishes all
four row files at once. One episode is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from verl_sft.config.collect import CollectConfig
from verl_sft.errors import InputError
from verl_sft.prompts.base import PromptTemplate
from verl_sft.records.build import episode_rows
from verl_sft.records.filters import drop_reason, mask_steps
from verl_sft.records.io import SIDES, split_writers
from verl_sft.records.schema import SFTRecord
from verl_sft.records.split import Split, split_groups
from verl_sft.records.stats import StatsCounter, manifest
from verl_sft.registry import PROMPTS, resolve
from verl_sft.safe_io import dump_json, publishing, write_json
from verl_sft.types import JSON, Episode

FILES = (
    *(f"{side}.{kind}" for side in SIDES for kind in ("parquet", "csv")),
    "raw_trajectories.json",
    "stats.json",
)

Episodes = Callable[[], Iterable[Episode]]


def publish(
    directory: Path,
    *,
    episodes: Episodes,
    config: CollectConfig,
    identity: JSON,
    notes: Sequence[str],
) -> JSON:
    """Write `FILES` and, last, `manifest.json`.

    Args:
        directory: where to.
        episodes: gives all episodes in plan order, each time it is called.
        config: filters, split and output settings.
        identity: what of the config the files carry.
        notes: sentences for `stats.json`.

    Returns:
        The content of `stats.json`.

    Raises:
        InputError: no row is left; raw episodes and statistics are written all the same.
        StorageError: a file cannot be written.
    """
    template: PromptTemplate = resolve("prompt template", config.prompt.template, PROMPTS)
    counter = StatsCounter()
    rows = _RowSource(config, template, counter)
    kept = _first_pass(directory, episodes, config, counter)
    split = split_groups(kept, val_fraction=config.output.val_fraction, seed=config.rollout.seed)
    if kept:
        metadata = {"config": identity}
        safe = config.output.csv_safe_for_spreadsheets
        with split_writers(directory, metadata=metadata, spreadsheet_safe=safe) as writers:
            for side, record in rows.read(episodes(), split):
                for write in writers[side]:
                    write(record)
    stats = _stats(counter, split, notes)
    write_json(directory / "stats.json", stats)
    if not kept:
        raise _nothing_kept(directory, counter)
    counts = {"rows": stats["rows"], "episodes": counter.episodes, "kept_episodes": counter.kept}
    write_json(
        directory / "manifest.json",
        manifest(directory, files=FILES, config=identity, counts=counts),
    )
    return stats


@dataclass(slots=True)
class _RowSource:
    """Turns kept episodes into rows, leaves out repeated ones, and counts both."""

    config: CollectConfig
    template: PromptTemplate
    counter: StatsCounter

    def read(self, episodes: Iterable[Episode], split: Split) -> Iterator[tuple[str, SFTRecord]]:
        """Rows and their side, in plan order; of equal rows the first stays."""
        seen: set[str] = set()
        for episode in episodes:
            if drop_reason(episode, self.config.filter):
                continue
            side = "val" if episode.task_id in split.val else "train"
            masked = mask_steps(episode, self.config.filter)
            for record in episode_rows(masked, self.template, rows=self.config.output.rows):
                if self.config.filter.dedup and record.record_id in seen:
                    self.counter.duplicate_rows += 1
                    continue
                seen.add(record.record_id)
                self.counter.add_row(record, side=side)
                yield side, record


def _first_pass(
    directory: Path, episodes: Episodes, config: CollectConfig, counter: StatsCounter
) -> dict[str, str]:
    """Write the raw episodes and count them; the kept tasks with their types."""
    kept: dict[str, str] = {}
    path = directory / "raw_trajectories.json"
    with publishing(path) as temporary, temporary.open("w", encoding="ascii") as stream:
        separator = "[\n"
        for episode in episodes():
            stream.write(separator + dump_json(episode.to_json()))
            separator = ",\n"
            reason = drop_reason(episode, config.filter)
            masked = episode if reason else mask_steps(episode, config.filter)
            counter.add_episode(masked, dropped=reason)
            if not reason:
                kept[episode.task_id] = episode.task_type
        stream.write("\n]\n")
    return kept


def _stats(counter: StatsCounter, split: Split, notes: Sequence[str]) -> JSON:
    all_notes = [*notes, *([split.note] if split.note else [])]
    if counter.failed:
        all_notes.append(f"{counter.failed} episodes failed; `errors` names them.")
    return counter.result(
        groups={"train": len(split.train), "val": len(split.val), "overlap": split.overlap},
        notes=all_notes,
    )


def _nothing_kept(directory: Path, counter: StatsCounter) -> InputError:
    reasons = ", ".join(f"{name} {count}" for name, count in counter.dropped.most_common())
    first = f"; the first error: {counter.errors[0]['error']}" if counter.errors else ""
    return InputError(
        f"none of {counter.episodes} episodes is left to train on",
        where=str(directory),
        why=f"Dropped: {reasons}{first}",
        fix="Loosen filter.* (filter.require_success=false keeps lost episodes) or mend the "
        "errors; the raw episodes are in raw_trajectories.json",
    )
