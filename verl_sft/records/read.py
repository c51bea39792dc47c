"""Files of any known format to records, streaming; what cannot be used is reported row by row."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from verl_sft.config.checks import naming
from verl_sft.errors import InputError
from verl_sft.records.files import Row, open_rows
from verl_sft.records.media import need_text_only
from verl_sft.records.parse import ReadOptions, Reject
from verl_sft.records.schema import SFTRecord, located
from verl_sft.records.sources.base import SourceFormat
from verl_sft.records.sources.custom import custom_format
from verl_sft.records.values import BadRowError
from verl_sft.registry import SOURCES, resolve
from verl_sft.types import JSON

RejectSink = Callable[[Reject], None]
_LOOKED_AT = 20  # rows of no known format before a file is given up


def read_records(
    files: Path | str | Iterable[Path | str],
    *,
    options: ReadOptions | None = None,
    reject: RejectSink | None = None,
) -> Iterator[SFTRecord]:
    """Stream records from files, a few hundred rows at a time.

    Args:
        files: one file or several, read in order.
        options: which format and which columns; None recognises the format and reads whole
            conversations.
        reject: told of every row that cannot be used, which is then left out.

    Raises:
        InputError: a file cannot be read, is of no known format or lacks a needed column; or,
            without `reject`, a row cannot be used.
    """
    for name in [files] if isinstance(files, Path | str) else files:
        yield from _read_file(Path(name), options or ReadOptions(multiturn=True), reject)


def _read_file(path: Path, options: ReadOptions, reject: RejectSink | None) -> Iterator[SFTRecord]:
    for index, row, chosen in _with_format(path, options):
        for found in _read_row(row, chosen, options):
            if isinstance(found, SFTRecord):
                if options.mask_history:
                    found = _last_only(found)
                yield located(found, source=f"{path.name}:{index}")
            elif reject is not None:
                reject(Reject(str(path), index, found.field, found.code, found.message, found.fix))
            else:
                where = f"{path}:{index}:{found.field}"
                raise InputError(found.message, where=where, why=found.code, fix=found.fix)


def _with_format(
    path: Path, options: ReadOptions
) -> Iterator[tuple[int, Row, SourceFormat | None]]:
    """Each row with its place and the format of the file, which only bad rows can do without."""
    opened = open_rows(path)
    chosen: SourceFormat | None = None
    odd: list[tuple[int, JSON]] = []  # rows that look like no format, before the first that does
    unknown: InputError | None = None
    for index, row in enumerate(opened.rows):
        if chosen is None and isinstance(row, dict):
            try:
                chosen = pick_format(row, columns=opened.columns, options=options, where=path)
            except InputError as error:
                unknown = unknown or error
                odd.append((index, row))
                if len(odd) == _LOOKED_AT:
                    raise unknown from None
                continue
            for place, early in odd:
                yield place, early, chosen
        yield index, row, chosen
    if chosen is None and unknown is not None:
        raise unknown
    if chosen is None and opened.columns is not None:  # no row, but the columns can be checked
        empty = dict.fromkeys(opened.columns)
        pick_format(empty, columns=opened.columns, options=options, where=path)


def _last_only(record: SFTRecord) -> SFTRecord:
    """Of the learned answers only the last one stays so."""
    learned = record.supervise
    if learned is None:
        learned = tuple(i for i, m in enumerate(record.messages) if m.role == "assistant")
    weights = record.weights if record.weights is None else record.weights[-1:]
    return replace(record, supervise=learned[-1:], weights=weights)


def _read_row(
    row: Row, chosen: SourceFormat | None, options: ReadOptions
) -> Iterator[SFTRecord | BadRowError]:
    if isinstance(row, BadRowError):
        yield row
        return
    assert chosen is not None
    try:
        if chosen.name in SOURCES:  # a reader of the user's own knows what it does
            need_text_only(row, columns=dict(options.columns))
        yield from chosen.read(row, options)
    except BadRowError as bad:
        yield bad


def pick_format(
    row: JSON, *, columns: frozenset[str] | None, options: ReadOptions, where: Path
) -> SourceFormat:
    """The format of a file, as named by the options or recognised by its first row.

    Raises:
        InputError: no format fits, or the options name a column that is not there.
    """
    if options.format != "auto":
        return find_format(options.format)
    own, verl = find_format("own"), find_format("verl")
    if own.detect(row) and options.reads_own_columns:
        return own
    if options.names_columns:
        need_columns(where, columns or frozenset(row), options)
        return verl
    for name in SOURCES:
        if name not in ("own", "verl") and (found := find_format(name)).detect(row):
            return found
    if columns is None and not verl.detect(row):
        raise InputError(
            "the rows are of no known format",
            where=str(where),
            why=f"The keys of the first one are: {', '.join(map(str, row))}",
            fix=f"Set data.format to one of {', '.join(SOURCES)}, or to file.py:function",
        )
    need_columns(where, columns or frozenset(row), options)
    return verl


def find_format(name: str) -> SourceFormat:
    """A format by its name, or a user's own function `file.py:function` that reads one row.

    Such a function takes a row (dict) and returns a record or a row of ours, a list of these, or
    None to leave the row out.

    Raises:
        UsageError: the name is unknown or cannot be imported.
    """
    found = resolve("data format", name, SOURCES)
    return found if isinstance(found, SourceFormat) else custom_format(name, found)


def check_format(key: str, name: str) -> None:
    """Raise for the name of a format that does not exist.

    Args:
        key: that it was given by.
        name: of a format, `auto`, or empty.

    Raises:
        UsageError: as `find_format`, with the key.
    """
    if name not in ("", "auto"):
        with naming(f"{key}={name}"):
            find_format(name)


def need_columns(path: Path, columns: frozenset[str], options: ReadOptions) -> None:
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
