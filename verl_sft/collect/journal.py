"""The collector's memory: which episodes are finished and on disk, whatever happens next.

An episode counts as acknowledged once its line is synced. The journal lives in the output
directory until everything else there is published, and belongs to exactly one configuration.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from verl_sft.errors import InputError, UsageError
from verl_sft.safe_io import AppendLog, make_output_dir, read_log, write_json
from verl_sft.types import JSON, Episode

FOLDER = ".journal"


class Journal:
    """Acknowledged episodes by id; at most one per id, read back from disk one at a time."""

    def __init__(self, directory: Path, *, config: Mapping[str, Any]) -> None:
        """Open or create the journal of an output directory.

        Raises:
            UsageError: it was begun with another configuration.
            InputError: it is damaged before its end.
        """
        self.folder = make_output_dir(directory / FOLDER)
        begun = self.folder / "config.json"
        if not begun.exists():
            write_json(begun, dict(config))
        check_same_config(begun, config)
        self.path = self.folder / "episodes.log"
        self._log = AppendLog(self.path)
        self._offsets: dict[str, int] = {}
        start = 0
        for record, end in read_log(self.path):
            self._offsets.setdefault(record["episode_id"], start)
            start = end

    def __contains__(self, episode_id: str) -> bool:
        return episode_id in self._offsets

    def __len__(self) -> int:
        return len(self._offsets)

    def append(self, episode: JSON) -> None:
        """Acknowledge one episode (as JSON): when this returns, it is on disk."""
        episode_id = episode["episode_id"]
        assert episode_id not in self._offsets, f"episode {episode_id} was played twice"
        offset = self.path.stat().st_size
        self._log.append(episode)
        self._offsets[episode_id] = offset

    def read(self, episode_id: str) -> Episode:
        """One acknowledged episode."""
        record, _ = next(read_log(self.path, start=self._offsets[episode_id]))
        return Episode.from_json(record)

    def __iter__(self) -> Iterator[str]:
        return iter(self._offsets)

    def close(self) -> None:
        """Close the file; the journal can be opened again."""
        self._log.close()

    def remove(self) -> None:
        """Delete a journal whose episodes are all published."""
        shutil.rmtree(self.folder)


def check_same_config(path: Path, config: Mapping[str, Any], *, inside: str = "") -> None:
    """Compare `config` with the one in the JSON file `path` (under the key `inside`, if given).

    Raises:
        UsageError: they differ; the message lists the keys.
        InputError: the file is damaged.
    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        before = tree[inside] if inside else tree
    except (ValueError, KeyError) as error:
        raise InputError(f"the file is damaged: {error}", where=str(path)) from error
    old, new = _flat(before), _flat(config)
    changed = [
        f"{key}: {old.get(key)!r} -> {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]
    if changed:
        raise UsageError(
            "the directory was begun with another configuration",
            where=str(path),
            why="; ".join(changed),
            fix="Use the same settings to resume, or another output.name",
        )


def _flat(tree: Mapping[str, Any], prefix: str = "") -> JSON:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`."""
    flat: JSON = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
