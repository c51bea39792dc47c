"""Records of one format into files of another; nothing is dropped without being counted and named.

The output appears complete or not at all; rows that cannot be read or written go to
`rejected.jsonl` beside it.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from verl_sft.errors import InputError, UsageError
from verl_sft.records.build import group_of, record_id, turn_records
from verl_sft.records.files import JSON_COLUMNS
from verl_sft.records.io import csv_writer, parquet_writer, split_writers
from verl_sft.records.parse import Reject
from verl_sft.records.schema import SFTRecord
from verl_sft.records.sources.base import SourceFormat
from verl_sft.records.split import split_groups
from verl_sft.records.values import BadRowError, without_nulls
from verl_sft.safe_io import dump_json, publishing
from verl_sft.types import JSON

Write = Callable[[SFTRecord], None]
Refuse = Callable[[Reject], None]
Records = Callable[[], Iterable[SFTRecord]]


@dataclass(slots=True)
class ConvertReport:
    """What became of the records: written by file name, repeated, dropped and refused ones."""

    written: Counter[str] = field(default_factory=Counter)
    duplicates: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)

    @property
    def total(self) -> int:
        """Records and rows that were looked at."""
        left_out = self.duplicates + self.dropped.total() + self.refused.total()
        return self.written.total() + left_out


class NothingLeftError(InputError):
    """Not one record is there to write; what stood at the place stays."""


def named(records: Iterable[SFTRecord], *, reject: Refuse | None = None) -> Iterator[SFTRecord]:
    """Give each record the ids that it lacks: its content's hash, and the group it is split by.

    Without a group of its own a record belongs to its episode or task, else to all records that
    begin with the same messages up to the first answer.

    Raises:
        InputError: without `reject`, a record holds values that are not JSON, and has no hash.
    """
    for record in records:
        try:
            found = record.record_id or record_id(record)
            group = group_of(record)
        except (ValueError, TypeError) as error:
            bad = _reject(record, BadRowError("messages", "NOT_JSON", str(error)))
            if reject is None:
                raise InputError(bad.message, where=record.source, why=bad.code) from error
            reject(bad)
            continue
        yield replace(record, record_id=found, group_id=group)


def per_turn(records: Iterable[SFTRecord], *, dropped: Counter[str]) -> Iterator[SFTRecord]:
    """The `turn_records` of all records; one without a learned turn is counted."""
    for record in records:
        found = list(turn_records(record))
        if not found:
            dropped["nothing_learned"] += 1
        yield from found


def unique(records: Iterable[SFTRecord], report: ConvertReport) -> Iterator[SFTRecord]:
    """Leave out records whose content, by its hash, came before."""
    seen: set[str] = set()
    for record in records:
        content = record_id(record)
        if content in seen:
            report.duplicates += 1
            continue
        seen.add(content)
        yield record


def by_episode(records: Iterable[SFTRecord]) -> list[SFTRecord]:
    """The records with all rows of an episode, in the order of their steps, where its first was."""
    found = list(records)
    first: dict[str, int] = {}
    places = [
        (first.setdefault(record.episode_id, place) if record.episode_id else place, record.step)
        for place, record in enumerate(found)
    ]
    return [found[i] for i in sorted(range(len(found)), key=places.__getitem__)]


def write_split(
    directory: Path,
    records: Records,
    *,
    val_fraction: float,
    seed: int,
    report: ConvertReport,
    reject: Refuse,
) -> list[str]:
    """Write `train` and `val` as parquet and CSV, divided by group; returns notes for the user.

    Args:
        directory: where to.
        records: gives the same records each time it is called: once for the groups, once for rows.
        val_fraction: share of the groups to hold out.
        seed: of the division.
        report: counts rows by side.
        reject: told of records that a column cannot hold.

    Raises:
        NothingLeftError: there is no record.
    """
    groups = {r.group_id: r.task_type for r in records()}
    split = split_groups(groups, val_fraction=val_fraction, seed=seed)
    with split_writers(directory, metadata={}) as writers:
        for record in records():
            side = "val" if record.group_id in split.val else "train"
            if _put(record, writers[side], reject):
                report.written[side] += 1
        _check_written(report, directory)
    return [split.note] if split.note else []


def write_file(
    path: Path,
    records: Iterable[SFTRecord],
    *,
    target: SourceFormat,
    report: ConvertReport,
    reject: Refuse,
) -> None:
    """Write one file in a format; records that it cannot hold are refused with the reason.

    Raises:
        UsageError: the format cannot be written, or not into a file of this suffix.
        NothingLeftError: there is no record.
    """
    if target.write is None:
        raise UsageError(f"the format '{target.name}' can be read, not written")
    if target.name == "own" and path.suffix in (".parquet", ".csv"):
        writer = csv_writer(path) if path.suffix == ".csv" else parquet_writer(path, metadata={})
        with writer as write:
            for record in records:
                if _put(record, [write], reject):
                    report.written[path.name] += 1
            _check_written(report, path)
        return
    with _row_writer(path, target) as put:
        for record in records:
            try:
                rows = [dump_json(row) for row in target.write(record)]
            except BadRowError as bad:
                reject(_reject(record, bad))
                continue
            except (ValueError, OverflowError) as error:
                reject(_reject(record, BadRowError("", "NOT_STORABLE", str(error))))
                continue
            for row in rows:
                put(row)
            report.written[path.name] += 1
        _check_written(report, path)


def _put(record: SFTRecord, writers: Iterable[Write], reject: Refuse) -> bool:
    try:
        for write in writers:  # all of them encode alike: the first one refuses
            write(record)
    except InputError as error:
        reject(_reject(record, BadRowError("", "NOT_STORABLE", error.what)))
        return False
    return True


def _check_written(report: ConvertReport, where: Path) -> None:
    if report.written.total() == 0:
        raise NothingLeftError(
            "there is no record to write; nothing was changed",
            where=str(where),
            why=f"{report.total} records and rows were looked at",
            fix="Check in=, and what was refused or dropped",
        )


def _reject(record: SFTRecord, bad: BadRowError) -> Reject:
    file, _, row = record.source.rpartition(":")
    place = int(row) if row.isdigit() else 0
    return Reject(file, place, bad.field, bad.code, bad.message, bad.fix)


@contextlib.contextmanager
def _row_writer(path: Path, target: SourceFormat) -> Iterator[Callable[[str], None]]:
    suffixes = (".json",) if target.whole else (".jsonl", ".json", ".parquet")
    if path.suffix not in suffixes:
        raise UsageError(
            f"cannot write '{path.suffix or path.name}' files of the format '{target.name}'",
            where=str(path),
            fix=f"Let out= end in {' or '.join(suffixes)}",
        )
    if path.suffix == ".parquet":
        with _parquet_rows(path, structs=target.structs) as put:
            yield put
        return
    if target.whole is not None:
        texts: list[str] = []
        yield texts.append
        with publishing(path) as temporary:
            temporary.write_text(dump_json(target.whole(map(json.loads, texts))), "ascii")
        return
    array = path.suffix == ".json"
    with publishing(path) as temporary, temporary.open("w", encoding="ascii") as stream:
        before = "[\n" if array else ""

        def put(row: str) -> None:
            nonlocal before
            stream.write(before + row + ("" if array else "\n"))
            before = ",\n" if array else ""

        yield put
        if array:
            stream.write("\n]\n" if before.startswith(",") else "[]\n")


@contextlib.contextmanager
def _parquet_rows(path: Path, *, structs: Sequence[str]) -> Iterator[Callable[[str], None]]:
    """Rows of any shape: what Arrow does not hold as it is becomes a column of JSON text."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with publishing(path) as temporary:
        rows: list[JSON] = []

        def put(row: str) -> None:
            rows.append(json.loads(row))

        yield put
        arrays, as_text = {}, []
        for name in dict.fromkeys(name for row in rows for name in row):
            values = [row.get(name) for row in rows]
            arrays[name] = _arrow(values)
            if arrays[name] is None and name in structs:
                raise InputError(
                    f"the values of '{name}' have different keys, and their tool reads no text",
                    where=str(path),
                    why="Arrow would give every row the keys of all, and nulls would be trained",
                    fix="Let out= end in .jsonl, or write one file for each set of tools",
                )
            if arrays[name] is None:
                texts = [None if v is None else dump_json(v) for v in values]
                arrays[name] = pa.array(texts, type=pa.string())
                as_text.append(name)
        table = pa.table(arrays).replace_schema_metadata({JSON_COLUMNS: dump_json(as_text)})
        pq.write_table(table, temporary, compression="zstd")


def _arrow(values: list[Any]) -> Any:
    """The values as an Arrow array that gives exactly these back, or None."""
    import pyarrow as pa

    try:
        array = pa.array(values)
    except (pa.ArrowException, ValueError, TypeError, OverflowError):
        return None
    # Structs without fields cannot be written; other rows' keys would come back as nulls.
    exact = "struct<>" not in str(array.type) and array.to_pylist() == without_nulls(values)
    return array if exact and without_nulls(values) == values else None
