"""Records to files of our own: parquet and CSV, streaming.

The same records give the same bytes (for one version of pyarrow): no times, no paths. Files appear
complete or not at all; parquet pages carry checksums that are verified on reading.
"""

from __future__ import annotations

import contextlib
import csv
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from verl_sft.errors import InputError
from verl_sft.records.columns import CSV_COLUMNS, CSV_SAFE, to_cell
from verl_sft.records.file_set import publishing_set
from verl_sft.records.rows import record_to_row
from verl_sft.records.schema import COLUMNS, SCHEMA_VERSION, SFTRecord
from verl_sft.safe_io import dump_json, publishing
from verl_sft.types import JSON

SIDES = ("train", "val")
METADATA_KEY = b"verl_sft"
_GROUP_BYTES = 32 << 20  # text of one row group: what most readers hold at a time
_GROUP_ROWS = 10_000
_LONG = ("messages", "messages_json", "prompt_data", "response_data", "tools_json", "meta_json")
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "'")

RecordWriter = Callable[[SFTRecord], None]


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
    header = [*CSV_COLUMNS, CSV_SAFE] if spreadsheet_safe else list(CSV_COLUMNS)
    with (
        publishing(path) as temporary,
        temporary.open("w", encoding="utf-8", newline="") as stream,
    ):
        lines = csv.writer(stream, quoting=csv.QUOTE_ALL, lineterminator="\n")
        lines.writerow(header)

        def write(record: SFTRecord) -> None:
            row = _encode(record)
            cells = [to_cell(column, row[column]) for column in CSV_COLUMNS]
            if spreadsheet_safe:
                cells = [f"'{c}" if c.startswith(_FORMULA) else c for c in cells] + ["1"]
            lines.writerow(cells)

        yield write


@contextlib.contextmanager
def split_writers(
    directory: Path, *, metadata: Mapping[str, Any], spreadsheet_safe: bool = False
) -> Iterator[dict[str, tuple[RecordWriter, RecordWriter]]]:
    """Yield for each of `SIDES` the writers of its parquet and its CSV file.

    All four files are published at once when the block ends, see `file_set.publishing_set`;
    arguments as of `parquet_writer` and `csv_writer`.
    """
    with publishing_set(directory) as folder, contextlib.ExitStack() as files:
        yield {
            side: (
                files.enter_context(parquet_writer(folder / f"{side}.parquet", metadata=metadata)),
                files.enter_context(
                    csv_writer(folder / f"{side}.csv", spreadsheet_safe=spreadsheet_safe)
                ),
            )
            for side in SIDES
        }


def write_parquet(
    path: Path, records: Iterable[SFTRecord], *, metadata: Mapping[str, Any] | None = None
) -> None:
    """Publish `records` as parquet; see `parquet_writer`."""
    with parquet_writer(path, metadata=metadata or {}) as write:
        for record in records:
            write(record)


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
