"""Records of one format into files of another; nothing is dropped without being counted and named.

The output appears complete or not at all; rows that cannot be read or written go to
`rejected.jsonl` beside it.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from verl_sft.errors import UsageError
from verl_sft.records.build import record_id
from verl_sft.records.io import csv_writer, parquet_writer
from verl_sft.records.parse import Reject
from verl_sft.records.schema import SFTRecord
from verl_sft.records.sources.base import SourceFormat
from verl_sft.records.split import split_groups
from verl_sft.records.values import BadRowError
from verl_sft.safe_io import content_hash, dump_json, make_output_dir, publishing
from verl_sft.types import JSON

Write = Callable[[SFTRecord], None]
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


def named(records: Iterable[SFTRecord]) -> Iterator[SFTRecord]:
    """Give each record the ids that it lacks: its content's hash, and the group it is split by.

    Without a group of its own a record belongs to its episode or task, else to all records that
    begin with the same messages up to the first answer.
    """
    for record in records:
        group = record.group_id or record.task_id or record.episode_id
        if not group:
            opening = []
            for message in record.messages:
                if message.role == "assistant":
                    break
                opening.append(message.to_json())
            group = content_hash(opening)
        yield replace(record, record_id=record.record_id or record_id(record), group_id=group)


def per_turn(records: Iterable[SFTRecord]) -> Iterator[SFTRecord]:
    """One record per learned turn: the chat up to it, only its last message learned."""
    for record in records:
        turns = record.supervise
        if turns is None:
            turns = tuple(i for i, m in enumerate(record.messages) if m.role == "assistant")
        weights = record.weights or (1.0,) * len(turns)
        if len(turns) == 1 and turns[0] == len(record.messages) - 1:
            yield record
            continue
        for turn, weight in zip(turns, weights, strict=True):
            part = replace(
                record,
                messages=record.messages[: turn + 1],
                supervise=(turn,),
                weights=None if weight == 1 else (weight,),
                episode_id=record.episode_id or record.record_id,
                step=turn,
                prompt=None,
                response=None,
            )
            yield replace(part, record_id=record_id(part))


def unique(records: Iterable[SFTRecord], report: ConvertReport) -> Iterator[SFTRecord]:
    """Leave out records whose id came before."""
    seen: set[str] = set()
    for record in records:
        if record.record_id in seen:
            report.duplicates += 1
            continue
        seen.add(record.record_id)
        yield record


def write_split(
    directory: Path, records: Records, *, val_fraction: float, seed: int, report: ConvertReport
) -> list[str]:
    """Write `train` and `val` as parquet and CSV, divided by group; returns notes for the user.

    Args:
        directory: where to.
        records: gives the same records each time it is called: once for the groups, once for rows.
        val_fraction: share of the groups to hold out.
        seed: of the division.
        report: counts rows by side.
    """
    groups = {r.group_id: r.task_type for r in records()}
    split = split_groups(groups, val_fraction=val_fraction, seed=seed)
    make_output_dir(directory)
    with contextlib.ExitStack() as files:
        writers = {
            side: (
                files.enter_context(parquet_writer(directory / f"{side}.parquet", metadata={})),
                files.enter_context(csv_writer(directory / f"{side}.csv")),
            )
            for side in ("train", "val")
        }
        for record in records():
            side = "val" if record.group_id in split.val else "train"
            for write in writers[side]:
                write(record)
            report.written[side] += 1
    return [split.note] if split.note else []


def write_file(
    path: Path,
    records: Iterable[SFTRecord],
    *,
    target: SourceFormat,
    report: ConvertReport,
    reject: Callable[[Reject], None],
) -> None:
    """Write one file in a format; records that it cannot hold are refused with the reason.

    Raises:
        UsageError: the format cannot be written, or not into a file of this suffix.
    """
    if target.write is None:
        raise UsageError(f"the format '{target.name}' can be read, not written")
    if target.name == "own" and path.suffix in (".parquet", ".csv"):
        writer = csv_writer(path) if path.suffix == ".csv" else parquet_writer(path, metadata={})
        with writer as write:
            for record in records:
                write(record)
                report.written[path.name] += 1
        return
    with _row_writer(path) as put:
        for number, record in enumerate(records):
            try:
                rows = list(target.write(record))
            except BadRowError as bad:
                file, _, row = record.source.rpartition(":")
                place = int(row) if row.isdigit() else number
                reject(Reject(file, place, bad.field, bad.code, bad.message, bad.fix))
                continue
            for row_ in rows:
                put(row_)
            report.written[path.name] += 1


@contextlib.contextmanager
def _row_writer(path: Path) -> Iterator[Callable[[JSON], None]]:
    if path.suffix == ".parquet":
        with _parquet_rows(path) as put:
            yield put
        return
    if path.suffix not in (".jsonl", ".json"):
        raise UsageError(
            f"cannot write '{path.suffix or path.name}' files",
            where=str(path),
            fix="Let out= end in .jsonl, .json or .parquet",
        )
    array = path.suffix == ".json"
    with publishing(path) as temporary, temporary.open("w", encoding="ascii") as stream:
        before = "[\n" if array else ""

        def put(row: JSON) -> None:
            nonlocal before
            stream.write(before + dump_json(row) + ("" if array else "\n"))
            before = ",\n" if array else ""

        yield put
        if array:
            stream.write("\n]\n" if before.startswith(",") else "[]\n")


@contextlib.contextmanager
def _parquet_rows(path: Path) -> Iterator[Callable[[JSON], None]]:
    """Rows of any shape: every column is text, whatever is not text in JSON."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with publishing(path) as temporary:
        rows: list[JSON] = []

        def put(row: JSON) -> None:
            rows.append(row)

        yield put
        columns = list(dict.fromkeys(name for row in rows for name in row))
        cells = {
            name: [None if row.get(name) is None else _cell(row[name]) for row in rows]
            for name in columns
        }
        arrays = [pa.array(cells[name], type=pa.string()) for name in columns]
        pq.write_table(pa.Table.from_arrays(arrays, names=columns), temporary, compression="zstd")


def _cell(value: object) -> str:
    return value if isinstance(value, str) else dump_json(value)
