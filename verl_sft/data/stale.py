"""Token caches of the same files under other settings: what differs, and which to remove."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verl_sft.types import JSON

_SHOWN_CHARS = 60  # of one value in a message


@dataclass(frozen=True, slots=True)
class StaleCache:
    """A cache of the same files, and everything that its tokens depend on."""

    path: Path
    key: JSON


def stale_cache(directory: Path, *, paths: list[str], key: JSON) -> StaleCache | None:
    """The cache used last that was made from these files with the row limit of `key`."""
    for path in _by_last_use(directory):
        try:
            other = json.loads((path / "key.json").read_text(encoding="utf-8"))
            same = (other.pop("paths"), other["max_samples"]) == (paths, key["max_samples"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
        if same:
            return StaleCache(path, other)
    return None


def key_changes(old: JSON, new: JSON) -> list[str]:
    """One `name: old -> new` for each thing that differs; long texts only by name."""
    # One of them was read from JSON, which makes lists of tuples.
    before, after = (dict(_flat(json.loads(json.dumps(key, default=str)))) for key in (old, new))
    names = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    return [_change(name, before.get(name), after.get(name)) for name in names]


def remove_old(directory: Path, *, keep: int) -> None:
    """Remove all but the `keep` caches that were used last; a reader keeps what it has mapped."""
    for path in _by_last_use(directory)[keep:]:
        shutil.rmtree(path, ignore_errors=True)
        (directory / f".{path.name}.lock").unlink(missing_ok=True)


def _by_last_use(directory: Path) -> list[Path]:
    found = []
    for mark in directory.glob("[!.]*/key.json"):
        try:
            found.append((mark.parent.stat().st_mtime_ns, mark.parent))
        except OSError:  # another process removed it
            continue
    return [path for _, path in sorted(found, reverse=True)]


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _flat(inner, f"{prefix}.{name}" if prefix else str(name))
    elif prefix == "files":
        yield from ((f"contents of {name}", digest[:12]) for name, digest in value)
    else:
        yield prefix, value


def _change(name: str, old: Any, new: Any) -> str:
    texts = [json.dumps(value, default=str) for value in (old, new)]
    if max(map(len, texts)) > _SHOWN_CHARS:
        return f"{name} changed"
    return f"{name}: {texts[0]} -> {texts[1]}"
