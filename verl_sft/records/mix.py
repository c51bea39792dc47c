"""Several data sets as one stream: format, share, cap, weight and length limit of each.

A source is a path as text, or an object with `path` and any of the fields of `Source`, as in
`data.train_files=[{path: a.json, format: sharegpt, fraction: 0.35}, b.parquet]`.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from math import isfinite
from pathlib import Path
from typing import Any

from verl_sft.errors import UsageError
from verl_sft.records.parse import ReadOptions, Reject
from verl_sft.records.read import read_records
from verl_sft.records.resolve import resolve_files
from verl_sft.records.schema import NOTE, SFTRecord
from verl_sft.registry import unknown_name

Pairs = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Source:
    """One data set of a mix.

    Attributes:
        files: read in order.
        name: becomes the `data_source` of its records where it is given.
        format: of its rows; empty: as `data.format`.
        columns: names of columns that differ, as in `dataset_info.json`.
        tags: names of keys and roles that differ, as there.
        mask_history: learn the last answer only; None: as `data.mask_history`.
        weight: factor on the `sample_weight` of its records.
        fraction: share of its groups (episodes, else rows) that is taken, chosen by a hash.
        repeat: how often each record is taken.
        max_rows: records taken at most, before they are repeated; -1: all.
        max_length: tokens of one sample; longer ones are dropped and counted.
        seed: another seed takes another fraction.
    """

    files: tuple[Path, ...]
    name: str = ""
    format: str = ""
    columns: Pairs = ()
    tags: Pairs = ()
    mask_history: bool | None = None
    weight: float = 1.0
    fraction: float = 1.0
    repeat: int = 1
    max_rows: int = -1
    max_length: int | None = None
    seed: int = 1

    def choices(self) -> dict[str, Any]:
        """Everything but the files, as JSON."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "files"}
        return {k: [list(p) for p in v] if isinstance(v, tuple) else v for k, v in values.items()}


def resolve_sources(spec: Any, *, split: str) -> list[Source]:
    """The sources that a `data.train_files` or `data.val_files` value names.

    Args:
        spec: a path, an object with `path`, or a list of these.
        split: "train" or "val".

    Raises:
        InputError: nothing is there.
        UsageError: a field of an object is unknown or out of range.
    """
    if isinstance(spec, Mapping):
        return [_source(spec, split=split)]
    if isinstance(spec, list | tuple):
        return [source for part in spec for source in resolve_sources(part, split=split)]
    return [Source(tuple(resolve_files(spec, split=split)))]


def read_mix(
    sources: Sequence[Source],
    *,
    options: ReadOptions,
    reject: Callable[[Reject], None] | None = None,
    counts: Counter[str] | None = None,
) -> Iterator[SFTRecord]:
    """All records of a mix, source by source; which ones are taken depends on nothing else.

    Args:
        sources: in order.
        options: for what a source leaves open.
        reject: as `read_records`.
        counts: gets `LABEL:read` and `LABEL:taken` of each source, and `LABEL:{NOTE}:TEXT`.
    """
    for source in sources:
        label = source.name or source.files[0].name
        for record in _taken(source, options, reject, counts, label):
            if counts is not None and (note := record.meta.get(NOTE)):
                counts[f"{label}:{NOTE}:{note}"] += 1
            changes: dict[str, Any] = {}
            if source.name:
                changes["data_source"] = source.name
            if source.weight != 1:
                changes["sample_weight"] = record.sample_weight * source.weight
            if source.max_length is not None:
                changes["meta"] = {**record.meta, "max_length": source.max_length}
            if counts is not None:
                counts[f"{label}:taken"] += source.repeat
            chosen = replace(record, **changes) if changes else record
            for _ in range(source.repeat):
                yield chosen


def mix_lines(counts: Mapping[str, int]) -> list[str]:
    """The realised mix, one line per source and note; nothing for a single one taken whole."""
    labels = [key.removesuffix(":read") for key in counts if key.endswith(":read")]
    taken = {label: counts.get(f"{label}:taken", 0) for label in labels}
    notes = [
        f"note: {key.replace(f':{NOTE}:', f': {count} records: ')}"
        for key, count in counts.items()
        if f":{NOTE}:" in key
    ]
    if len(labels) < 2 and all(taken[label] == counts[f"{label}:read"] for label in labels):
        return notes
    total = max(sum(taken.values()), 1)
    return notes + [
        f"mix: {label}: {taken[label]} of {counts[f'{label}:read']} records, "
        f"{taken[label] / total:.1%} of all"
        for label in labels
    ]


def _taken(
    source: Source,
    options: ReadOptions,
    reject: Callable[[Reject], None] | None,
    counts: Counter[str] | None,
    label: str,
) -> Iterable[SFTRecord]:
    asked = replace(
        options,
        format=source.format or options.format,
        columns=source.columns or options.columns,
        tags=source.tags or options.tags,
        mask_history=(options.mask_history if source.mask_history is None else source.mask_history),
    )
    left = source.max_rows
    for record in read_records(source.files, options=asked, reject=reject):
        if counts is not None:
            counts[f"{label}:read"] += 1
        if left == 0 or (source.fraction < 1 and not _is_chosen(record, source)):
            continue
        left -= 1
        yield record


def _is_chosen(record: SFTRecord, source: Source) -> bool:
    unit = record.episode_id or record.group_id or record.source
    digest = hashlib.sha256(f"{source.seed}\x00{unit}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8]) < source.fraction * 2**64


def _source(spec: Mapping[str, Any], *, split: str) -> Source:
    known = {f.name for f in fields(Source)} - {"files"} | {"path"}
    for key in spec:
        if key not in known:
            raise unknown_name("field of a data source", str(key), known)
    if not spec.get("path"):
        raise UsageError("a data source without a path", where=f"data.{split}_files={dict(spec)}")
    where = f"data.{split}_files={dict(spec)}"
    values = {key: _field(key, value, where) for key, value in spec.items() if key != "path"}
    return Source(tuple(resolve_files(spec["path"], split=split)), **values)


# Field -> its type, and what else must hold.
_FIELDS: dict[str, tuple[type, Callable[[Any], bool]]] = {
    "name": (str, lambda v: True),
    "format": (str, lambda v: True),
    "mask_history": (bool, lambda v: True),
    "weight": (float, lambda v: isfinite(v) and v >= 0),
    "fraction": (float, lambda v: 0 <= v <= 1),
    "repeat": (int, lambda v: v >= 1),
    "max_rows": (int, lambda v: v >= -1),
    "max_length": (int, lambda v: v >= 2),
    "seed": (int, lambda v: True),
}


def _field(key: str, value: Any, where: str) -> Any:
    """The value of one field, checked."""
    if key in ("columns", "tags"):
        if not isinstance(value, Mapping):
            raise UsageError(f"{key}={value!r:.80}: not an object of names", where=where)
        return tuple((str(k), str(v)) for k, v in value.items())
    kind, holds = _FIELDS[key]
    if value is None and key in ("mask_history", "max_length"):
        return None
    if type(value) is not kind and not (kind is float and type(value) is int):
        wanted = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
        raise UsageError(f"{key}={value!r:.80}: must be {wanted[kind]}", where=where)
    if not holds(value):
        raise UsageError(f"{key}={value!r:.80}: out of range", where=where)
    return value
