"""Records in files: parquet and CSV out, parquet (ours or verl-style) and CSV in, streaming.

The same records give the same bytes (for one version of pyarrow): no times, no paths. Files appear
complete or not at all; parquet pages carry checksums that are verified on reading.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import glob
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from verl_sft.errors import InputError
from verl_sft.records.parse import BadRowError, ReadOptions, Reject, parse_own, parse_verl
from verl_sft.records.rows import record_to_row
from verl_sft.records.schema import COLUMNS, SCHEMA_VERSION, SFTRecord
from verl_sft.records.text import ESCAPE
from verl_sft.safe_io import dump_json, publishing
from verl_sft.types import JSON

METADATA_KEY = b"verl_sft"
_GROUP_BYTES = 32 << 20  # text of one row group: what a reader must hold at a time
_GROUP_ROWS = 10_000
_READ_ROWS = 256
# `messages` only repeats `messages_json`, which CSV keeps.
CSV_COLUMNS = tuple(c for c in COLUMNS if c != "messages")
_LONG = ("messages", "messages_json", "prompt_data", "response_data", "tools_json", "meta_json")
_CSV_SAFE = "spreadsheet_safe"
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "'")
_OWN = frozenset({"record_id", "messages_json", "supervise"})

RecordWriter = Callable[[SFTRecord], None]
RejectSink = Callable[[Reject], None]


@functools.cache
def arrow_schema() -> Any:
    """`COLUMNS` as a pyarrow schema."""
    import pyarrow as pa

    content = ("content", pa.string())
    types = {
        "string": pa.string(),
        "int32": pa.int32(),
        "int64": pa.int64(),
        "float": pa.float32(),
        "bool": pa.bool_(),
        "list<int32>": pa.list_(pa.int32()),
        "list<float>": pa.list_(pa.float32()),
        "struct<content: string>": pa.struct([content]),
        "list<struct<role: string, content: string>>": pa.list_(
            pa.struct([("role", pa.string()), content])
        ),
    }
    return pa.schema([(column, types[kind]) for column, kind in COLUMNS.items()])


@contextlib.contextmanager
def parquet_writer(path: Path, *, metadata: Mapping[str, Any]) -> Iterator[RecordWriter]:
    """Yield a function that appends a record; the file is published when the block ends.

    Args:
        path: where the file appears.
        metadata: JSON kept in the file's key-value metadata, beside the schema version.

    Raises:
        InputError: a record holds a value that its column cannot.
        StorageError: the file cannot be written; an older one stays as it was.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    note = dump_json({**metadata, "schema_version": SCHEMA_VERSION})
    schema = arrow_schema().with_metadata({METADATA_KEY: note.encode()})
    pending: list[JSON] = []
    size = 0

    with (
        publishing(path) as temporary,
        pq.ParquetWriter(
            temporary,
            schema,
            compression="zstd",
            write_page_checksum=True,
            # Of long texts they would repeat whole conversations in the footer.
            write_statistics=[c for c in COLUMNS if c not in _LONG],
        ) as parquet,
    ):

        def flush() -> None:
            nonlocal size
            arrays = [pa.array([row[f.name] for row in pending], type=f.type) for f in schema]
            parquet.write_table(pa.Table.from_arrays(arrays, schema=schema))
            pending.clear()
            size = 0

        def write(record: SFTRecord) -> None:
            nonlocal size
            row = _encode(record)
            pending.append(row)
            size += 2 * len(row["messages_json"]) + len(row["meta_json"])
            if size >= _GROUP_BYTES or len(pending) >= _GROUP_ROWS:
                flush()

        yield write
        if pending:
            flush()


@contextlib.contextmanager
def csv_writer(path: Path, *, spreadsheet_safe: bool = False) -> Iterator[RecordWriter]:
    """Yield a function that appends a record to a CSV file, published when the block ends.

    Every cell is quoted; lists and objects are JSON; null is an empty cell, and an empty text in a
    column that can be null is a single U+001A. `spreadsheet_safe` puts `'` before cells that a
    spreadsheet would take for a formula, and says so in a last column.
    """
    header = [*CSV_COLUMNS, _CSV_SAFE] if spreadsheet_safe else list(CSV_COLUMNS)
    with (
        publishing(path) as temporary,
        temporary.open("w", encoding="utf-8", newline="") as stream,
    ):
        lines = csv.writer(stream, quoting=csv.QUOTE_ALL, lineterminator="\n")
        lines.writerow(header)

        def write(record: SFTRecord) -> None:
            row = _encode(record)
            cells = [_to_cell(column, row[column]) for column in CSV_COLUMNS]
            if spreadsheet_safe:
                cells = [f"'{c}" if c.startswith(_FORMULA) else c for c in cells] + ["1"]
            lines.writerow(cells)

        yield write


def write_parquet(
    path: Path, records: Iterable[SFTRecord], *, metadata: Mapping[str, Any] | None = None
) -> None:
    """Publish `records` as parquet; see `parquet_writer`."""
    with parquet_writer(path, metadata=metadata or {}) as write:
        for record in records:
            write(record)


def write_csv(path: Path, records: Iterable[SFTRecord], *, spreadsheet_safe: bool = False) -> None:
    """Publish `records` as CSV; see `csv_writer`."""
    with csv_writer(path, spreadsheet_safe=spreadsheet_safe) as write:
        for record in records:
            write(record)


def read_records(
    files: Path | str | Iterable[Path | str],
    *,
    options: ReadOptions | None = None,
    reject: RejectSink | None = None,
) -> Iterator[SFTRecord]:
    """Stream records from parquet or CSV files, a few hundred rows at a time.

    Args:
        files: one file or several, read in order.
        options: which columns hold what; None takes our own columns as they are, and reads
            other files as multi-turn `messages`.
        reject: told of every row that cannot be used, which is then left out.

    Raises:
        InputError: a file cannot be read or lacks a needed column; or, without `reject`, a row
            cannot be used.
    """
    for name in [files] if isinstance(files, Path | str) else files:
        path = Path(name)
        asked = options or ReadOptions(multiturn=True)
        rows, own = _open(path, asked)
        for index, row in enumerate(rows):
            source = f"{path.name}:{index}"
            try:
                if own:
                    yield parse_own(row, options=options, source=source)
                else:
                    yield parse_verl(row, options=asked, source=source)
            except BadRowError as bad:
                report = Reject(str(path), index, bad.field, bad.code, bad.message, bad.fix)
                if reject is None:
                    where = f"{path}:{index}:{bad.field}"
                    raise InputError(bad.message, where=where, why=bad.code, fix=bad.fix) from bad
                reject(report)


def read_metadata(path: Path) -> JSON:
    """What `parquet_writer` kept in the file; empty for files of other tools."""
    text = (_parquet(path).schema_arrow.metadata or {}).get(METADATA_KEY)
    return {} if text is None else json.loads(text)


def resolve_files(spec: Any, *, split: str) -> list[Path]:
    """The files that a `data.train_files` value names.

    Args:
        spec: a file, an sft_data directory (its `<split>.parquet`, or shards
            `<split>-*.parquet`), a glob, or a list of these.
        split: "train" or "val".

    Raises:
        InputError: nothing is there.
    """
    if not isinstance(spec, str | Path):
        return [path for part in spec for path in resolve_files(part, split=split)]
    path = Path(spec).expanduser()
    key = f"data.{split}_files"
    if path.is_dir():
        single = path / f"{split}.parquet"
        found = [single] if single.is_file() else sorted(path.glob(f"{split}-*.parquet"))
        if not found:
            there = ", ".join(sorted(p.name for p in path.iterdir())[:10]) or "nothing"
            raise InputError(
                f"the directory holds no {split}.parquet and no {split}-*.parquet",
                where=str(path),
                why=f"There is: {there}",
                fix=f"Point {key} at an sft_data directory or at parquet files",
            )
        return found
    if path.is_file():
        return [path]
    found = [
        file
        for match in sorted(glob.glob(str(path)))
        if os.path.exists(match)
        for file in resolve_files(match, split=split)
    ]
    if not found:
        raise InputError("no such file", where=str(path), fix=f"Correct {key}")
    return found


def _encode(record: SFTRecord) -> JSON:
    try:
        row = record_to_row(record)
    except (ValueError, TypeError, OverflowError) as error:
        raise InputError(
            f"the record cannot be stored: {error}", where=record.source or record.record_id
        ) from error
    for column, bits in (("seed", 63), ("step", 31), ("turn_idx", 31)):
        if not -(2**bits) <= row[column] < 2**bits:
            where = f"{record.source or record.record_id}:{column}"
            raise InputError(f"{row[column]} does not fit the column", where=where)
    return row


def _parquet(path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path, page_checksum_verification=True)
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> InputError:
    return InputError(
        f"cannot read the file: {error}",
        where=str(path),
        fix="It is damaged or not what its name says; write it again",
    )


def _open(path: Path, options: ReadOptions) -> tuple[Iterator[JSON], bool]:
    """The rows of a file as dicts, and whether they follow our own schema."""
    if path.suffix == ".csv":
        return _csv_rows(path), True
    if path.suffix != ".parquet":
        raise InputError(
            f"cannot read '{path.suffix or path.name}' files",
            where=str(path),
            fix="Use .parquet or .csv",
        )
    parquet = _parquet(path)
    names = frozenset(parquet.schema_arrow.names)
    if names >= _OWN and options.reads_own_columns:
        return _parquet_rows(path, parquet, sorted(names & set(CSV_COLUMNS))), True
    _need_columns(path, names, options)
    return _parquet_rows(path, parquet, None), False


def _parquet_rows(path: Path, parquet: Any, columns: list[str] | None) -> Iterator[JSON]:
    import pyarrow as pa

    try:
        with parquet:
            missing = parquet.metadata.num_rows
            for batch in parquet.iter_batches(batch_size=_READ_ROWS, columns=columns):
                missing -= batch.num_rows
                yield from batch.to_pylist()
        if missing:  # page headers carry no checksum; a damaged one ends the column early
            raise _unreadable(path, ValueError(f"{missing} rows are missing"))
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(path, error) from error


def _csv_rows(path: Path) -> Iterator[JSON]:
    csv.field_size_limit(sys.maxsize)  # the default refuses cells above 131,072 characters
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            lines = csv.reader(stream, strict=True)
            header = next(lines, [])
            if missing := _OWN - set(header):
                raise InputError(
                    f"the columns {', '.join(sorted(missing))} are missing",
                    where=str(path),
                    fix="Only CSV files that verl_sft wrote can be read; use parquet",
                )
            safe = _CSV_SAFE in header
            for cells in lines:
                if len(cells) != len(header):
                    message = f"a row of {len(cells)} cells under a header of {len(header)}"
                    raise InputError(message, where=f"{path}:line {lines.line_num}")
                given = (c[1:] if safe and c.startswith("'") else c for c in cells)
                yield {c: _from_cell(c, v) for c, v in zip(header, given, strict=True)}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise _unreadable(path, error) from error


def _to_cell(column: str, value: Any) -> str:
    if value is None:
        return ""
    kind = COLUMNS[column]
    if kind.startswith("struct"):
        return value["content"] or ESCAPE
    if kind == "string":
        return value or ESCAPE
    return json.dumps(value)


def _from_cell(column: str, cell: str) -> Any:
    kind = COLUMNS.get(column)
    if kind is None or cell == "":
        return None
    if kind == "string" or kind.startswith("struct"):
        return "" if cell == ESCAPE else cell
    try:
        return json.loads(cell)
    except ValueError:
        return cell  # refused with the row's number when the row is decoded


def _need_columns(path: Path, columns: frozenset[str], options: ReadOptions) -> None:
    """Raise where a column that the options name is not in the file."""
    keys = {"data.prompt_key": options.prompt_key, "data.response_key": options.response_key}
    if options.multiturn:
        keys = {"data.multiturn.messages_key": options.messages_key}
    for key, column in keys.items():
        if column in columns:
            continue
        hint = ""
        if not options.multiturn and "messages" in columns:
            hint = ", or data.multiturn.enable=true to train on 'messages'"
        raise InputError(
            f"there is no column '{column}'",
            where=str(path),
            why=f"The columns there are: {', '.join(sorted(columns))}",
            fix=f"Set {key} to one of them{hint}",
        )
