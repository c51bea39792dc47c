"""Several data sets as one stream: format, share, cap, weight and length limit of each.

A source is a path as text, or an object with `path` and any of the fields of `Source`, as in
`data.train_files=[{path: a.json, format: sharegpt, fraction: 0.35}, b.parquet]`.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any

from verl_sft.errors import UsageError
from verl_sft.records.build import group_of
from verl_sft.records.parse import ReadOptions, Reject
from verl_sft.records.read import check_format, read_records
from verl_sft.records.resolve import OpenDatabase, is_database, resolve_files
from verl_sft.records.schema import NOTE, SFTRecord
from verl_sft.records.sources.alpaca import COLUMNS as ALPACA_COLUMNS
from verl_sft.records.sources.sharegpt import COLUMNS as SHAREGPT_COLUMNS
from verl_sft.records.sources.sharegpt import TAGS
from verl_sft.registry import unknown_name

# What `columns` and `tags` of a data set may name: the keys of LLaMA-Factory's dataset_info.json.
NAMES = {
    "columns": {*SHAREGPT_COLUMNS, *ALPACA_COLUMNS, "images", "videos", "audios"},
    "tags": set(TAGS),
}
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
        side: "train" or "val" where validation rows are held out of the same files; empty: all.
        split_seed: of the places of groups, see `place_of`.
        split_cut: groups at places below it are validation.
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
    side: str = ""
    split_seed: int = 1
    split_cut: int = 0

    def choices(self) -> dict[str, Any]:
        """Everything but the files, as JSON."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "files"}
        return {k: [list(p) for p in v] if isinstance(v, tuple) else v for k, v in values.items()}


def resolve_sources(spec: Any, *, split: str, database: OpenDatabase | None = None) -> list[Source]:
    """The sources that a `data.train_files` or `data.val_files` value names.

    Args:
        spec: a path, an object with `path`, or a list of these.
        split: "train" or "val".
        database: as in `resolve_files`; an object with `filter` hands it on.

    Raises:
        InputError: nothing is there.
        UsageError: a field of an object is unknown or out of range.
    """
    if isinstance(spec, Mapping):
        return [_source(spec, split=split, database=database)]
    if isinstance(spec, list | tuple):
        return [s for part in spec for s in resolve_sources(part, split=split, database=database)]
    return [Source(tuple(resolve_files(spec, split=split, database=database)))]


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
        if source.side and (place_of(group_of(record), source.split_seed) < source.split_cut) != (
            source.side == "val"
        ):
            continue
        yield record


def _is_chosen(record: SFTRecord, source: Source) -> bool:
    unit = record.episode_id or record.group_id or record.source
    return place_of(unit, source.seed) < source.fraction * 2**64


def place_of(unit: str, seed: int) -> int:
    """Where a seed puts a unit between 0 and 2^64; evenly spread, whatever else there is."""
    digest = hashlib.sha256(f"{seed}\x00{unit}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8])


def _source(spec: Mapping[str, Any], *, split: str, database: OpenDatabase | None) -> Source:
    known = {*_FIELDS, "path", "columns", "tags", "filter"}
    for key in spec:
        if key not in known:
            raise unknown_name("field of a data source", str(key), known)
    if not spec.get("path"):
        raise UsageError("a data source without a path", where=f"data.{split}_files={dict(spec)}")
    where = f"data.{split}_files={dict(spec)}"
    own = {key: value for key, value in spec.items() if key not in ("path", "filter")}
    values = {key: _field(key, value, where) for key, value in own.items()}
    if "filter" in spec:
        if not is_database(str(spec["path"])):
            fix = "Take it out, or keep the rows that you mean with verl-sft convert select.where="
            raise UsageError("filter: only documents of a database have one", where=where, fix=fix)
        database = database and partial(database, query=spec["filter"])
    return Source(tuple(resolve_files(spec["path"], split=split, database=database)), **values)


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
        for name in value:
            if name not in NAMES[key]:
                raise unknown_name(f"key of {key}", str(name), NAMES[key])
        return tuple((str(k), str(v)) for k, v in value.items())
    kind, holds = _FIELDS[key]
    if value is None and key in ("mask_history", "max_length"):
        return None
    if type(value) is not kind and not (kind is float and type(value) is int):
        wanted = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
        raise UsageError(f"{key}={value!r:.80}: must be {wanted[kind]}", where=where)
    if not holds(value):
        raise UsageError(f"{key}={value!r:.80}: out of range", where=where)
    if key == "format":
        check_format("format", str(value))
    return value
