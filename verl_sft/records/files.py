"""Any file as rows: parquet, CSV, JSON lines, JSON arrays of any size; `.gz` of the text formats.

A row is a dict, or the error that stands in its place: one bad line never hides the others.
"""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

from verl_sft.errors import InputError
from verl_sft.records.columns import CSV_COLUMNS, CSV_SAFE, OWN_COLUMNS, from_cell
from verl_sft.records.json_array import array_items
from verl_sft.records.rows import load_json
from verl_sft.records.values import BadRowError, without_nulls
from verl_sft.types import JSON

Row = JSON | BadRowError
SUFFIXES = (".parquet", ".csv", ".jsonl", ".ndjson", ".json")
JSON_COLUMNS = b"verl_sft_json"  # in a parquet file's metadata: names of columns of JSON text
_READ_ROWS = 256
_READ_BYTES = 64 << 10  # of one column at a time
_LINES_LOOKED_AT = 20  # to see whether a .json file has one object per line
_MOST_LINE_BYTES = 64 << 20  # of one row: more is a broken file or an attack


@dataclass(frozen=True, slots=True)
class RowFile:
    """An opened file: its column names where the format has them, and its rows."""

    columns: frozenset[str] | None
    rows: Iterator[Row]


def open_rows(path: Path) -> RowFile:
    """Open a file by its suffix; rows are read as they are asked for.

    Raises:
        InputError: the suffix is unknown, or the file cannot be read.
    """
    suffixes = [s.lower() for s in path.suffixes]
    zipped = suffixes[-1:] == [".gz"]
    suffix = (suffixes[-2:-1] if zipped else suffixes[-1:]) or [""]
    if suffix[0] == ".parquet" and not zipped:
        return _open_parquet(path)
    if suffix[0] == ".csv" and not zipped:
        return _open_csv(path)
    if suffix[0] in (".jsonl", ".ndjson", ".json"):
        return RowFile(None, _json_rows(path, zipped=zipped, lines=suffix[0] != ".json"))
    raise InputError(
        f"cannot read '{path.suffix or path.name}' files",
        where=str(path),
        fix=f"Use one of {', '.join(SUFFIXES)} (the JSON kinds may end in .gz)",
    )


def _open_parquet(path: Path) -> RowFile:
    parquet = open_parquet(path)
    names = frozenset(parquet.schema_arrow.names)
    # `messages` of our own files only repeats `messages_json`.
    if names >= OWN_COLUMNS:
        return RowFile(names, _parquet_rows(path, parquet, sorted(names & set(CSV_COLUMNS))))
    rows: Iterator[Row] = map(without_nulls, _parquet_rows(path, parquet, None))
    marked = (parquet.schema_arrow.metadata or {}).get(JSON_COLUMNS)
    return RowFile(names, _with_json(rows, load_json(marked.decode())) if marked else rows)


def _with_json(rows: Iterator[Row], columns: Sequence[str]) -> Iterator[Row]:
    """Rows of a converted file, whose columns of any shape are JSON text."""
    for row in rows:
        assert isinstance(row, dict)
        try:
            yield row | {c: load_json(row[c]) for c in columns if c in row}
        except ValueError as error:
            yield BadRowError("", "BAD_JSON", f"not JSON: {error}")


def _open_csv(path: Path) -> RowFile:
    csv.field_size_limit(_MOST_LINE_BYTES)  # the default refuses cells above 131,072 characters
    lines = _csv_lines(path)
    header = next(lines, [])
    return RowFile(frozenset(header), _csv_rows(path, header, lines))


def _csv_lines(path: Path) -> Iterator[list[str]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            yield from csv.reader(_short_lines(stream), strict=True)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise unreadable(path, error) from error


def _short_lines(stream: IO[str]) -> Iterator[str]:
    for line in iter(lambda: stream.readline(_MOST_LINE_BYTES), ""):
        if len(line) == _MOST_LINE_BYTES and not line.endswith("\n"):
            raise csv.Error(f"a line of more than {_MOST_LINE_BYTES:,} characters")
        yield line


def _csv_rows(path: Path, header: list[str], lines: Iterator[list[str]]) -> Iterator[Row]:
    own, safe = set(header) >= OWN_COLUMNS, CSV_SAFE in header
    for number, cells in enumerate(lines):
        if len(cells) != len(header):
            message = f"a row of {len(cells)} cells under a header of {len(header)}"
            raise InputError(message, where=f"{path}:{number}")
        given = (c[1:] if safe and c.startswith("'") else c for c in cells)
        row: JSON = dict(zip(header, given, strict=True))
        yield {c: from_cell(c, v) for c, v in row.items()} if own else row


def _json_rows(path: Path, *, zipped: bool, lines: bool) -> Iterator[Row]:
    opened: Callable[..., Any] = gzip.open if zipped else open
    try:
        with opened(path, "rb") as stream:
            if not lines and _first_byte(stream) == b"[":
                yield from _array_rows(path, stream)
            elif lines or not _is_one_object(stream):
                yield from _line_rows(stream)
            else:
                yield from _object_row(stream)
    except (OSError, EOFError) as error:
        raise unreadable(path, error) from error


def _first_byte(stream: IO[bytes]) -> bytes:
    while (byte := stream.read(1)).isspace() or byte == b"\xef":
        if byte == b"\xef":
            stream.read(2)  # the rest of a byte order mark
    stream.seek(0)
    return byte


def _is_one_object(stream: IO[bytes]) -> bool:
    """Whether a `.json` file is one object, not objects line by line.

    Its first lines say: where the very first or most of them are objects, each line is one.
    """
    lines = (line for line in iter(lambda: stream.readline(_MOST_LINE_BYTES), b"") if line.strip())
    are_objects = [_is_object(line) for line in islice(lines, _LINES_LOOKED_AT)]
    stream.seek(0)
    if len(are_objects) < 2:
        return True
    return not are_objects[0] and 2 * sum(are_objects) <= len(are_objects)


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _line_rows(stream: IO[bytes]) -> Iterator[Row]:
    for number, line in enumerate(iter(lambda: stream.readline(_MOST_LINE_BYTES), b"")):
        if len(line) == _MOST_LINE_BYTES and not line.endswith(b"\n"):
            while (rest := stream.readline(_MOST_LINE_BYTES)) and not rest.endswith(b"\n"):
                pass
            yield BadRowError("", "TOO_LARGE", f"a line of more than {_MOST_LINE_BYTES:,} bytes")
            continue
        if text := line.removeprefix(b"\xef\xbb\xbf" if number == 0 else b"").strip():
            yield _decoded(text)


def _object_row(stream: IO[bytes]) -> Iterator[Row]:
    if text := stream.read().removeprefix(b"\xef\xbb\xbf").strip():
        yield _decoded(text)


def _decoded(text: bytes) -> Row:
    try:
        value = load_json(text.decode("utf-8"))
    except UnicodeDecodeError as error:
        return BadRowError("", "BAD_UTF8", f"not UTF-8: {error}")
    except ValueError as error:
        return BadRowError("", "BAD_JSON", f"not JSON: {error}")
    return value if isinstance(value, dict) else _not_an_object(value)


def _array_rows(path: Path, stream: IO[bytes]) -> Iterator[Row]:
    try:
        for value in array_items(stream, most_chars=_MOST_LINE_BYTES):
            yield value if isinstance(value, dict) else _not_an_object(value)
    except ValueError as error:
        raise unreadable(path, error) from error


def _not_an_object(value: Any) -> BadRowError:
    if isinstance(value, BadRowError):
        return value
    return BadRowError("", "NOT_AN_OBJECT", f"expected an object, found {type(value).__name__}")


def open_parquet(path: Path) -> Any:
    """A `pyarrow.parquet.ParquetFile` that verifies page checksums.

    Raises:
        InputError: it is not parquet, or damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # By default everything read is kept until the file is closed, and a row group read whole.
        return pq.ParquetFile(
            path,
            page_checksum_verification=True,
            pre_buffer=False,
            buffer_size=_READ_BYTES,
        )
    except (OSError, pa.ArrowException) as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: Exception) -> InputError:
    """The user's view of what a reader reported."""
    return InputError(
        f"cannot read the file: {error}",
        where=str(path),
        fix="It is damaged or not what its name says; write it again",
    )


def _parquet_rows(path: Path, parquet: Any, columns: list[str] | None) -> Iterator[Row]:
    import pyarrow as pa

    try:
        with parquet:
            missing = parquet.metadata.num_rows
            # Threads cost more than they save on so few rows.
            for batch in parquet.iter_batches(
                batch_size=_READ_ROWS, columns=columns, use_threads=False
            ):
                missing -= batch.num_rows
                yield from _batch_rows(batch)
        if missing:  # page headers carry no checksum; a damaged one ends the column early
            raise unreadable(path, ValueError(f"{missing} rows are missing"))
    except (OSError, pa.ArrowException) as error:
        raise unreadable(path, error) from error
    except MemoryError as error:
        raise unreadable(path, MemoryError("a row does not fit into memory")) from error


def _batch_rows(batch: Any) -> Iterator[JSON]:
    """The rows of a batch: at once, or one by one where together they do not fit into memory."""
    try:
        rows = batch.to_pylist()
    except MemoryError:  # a dictionary of one huge text takes no room in the file
        rows = (row for i in range(batch.num_rows) for row in batch.slice(i, 1).to_pylist())
    yield from rows
