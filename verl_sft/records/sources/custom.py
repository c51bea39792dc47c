"""A user's own function from one row to records, as a format."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from verl_sft.errors import Preempted, UsageError
from verl_sft.records.parse import ReadOptions
from verl_sft.records.schema import SFTRecord
from verl_sft.records.sources.base import SourceFormat
from verl_sft.records.sources.own import OWN
from verl_sft.records.sources.verl import VERL
from verl_sft.records.values import BadRowError, plain
from verl_sft.types import JSON


def custom_format(name: str, function: Any) -> SourceFormat:
    """The format that reads rows by `function(row) -> record, dict, list of these, or None`.

    Raises:
        UsageError: it is not a function.
    """
    if not callable(function):
        raise UsageError(f"the data format '{name}' is not a function")

    def read(row: JSON, options: ReadOptions) -> Iterable[SFTRecord]:
        return _records(_called(name, function, row), options=options)

    return SourceFormat(name, "a function of the user", lambda row: False, read)


def as_record(value: Any, *, options: ReadOptions) -> SFTRecord:
    """A record as it is, or one from a plain dict: a row of ours or of verl's.

    Raises:
        BadRowError: it is neither.
    """
    if isinstance(value, SFTRecord):
        return value
    if not isinstance(value, Mapping):
        raise BadRowError("", "NOT_AN_OBJECT", f"expected a dict, found {type(value).__name__}")
    row = plain(dict(value))
    (record,) = (OWN if OWN.detect(row) else VERL).read(row, options)
    assert isinstance(record, SFTRecord)
    return record


def _called(name: str, function: Callable[[JSON], Any], row: JSON) -> Any:
    try:
        found = function(row)
        return list(found) if isinstance(found, Iterator) else found  # a generator runs here
    except (BadRowError, Preempted):
        raise
    except (Exception, SystemExit) as error:
        message = f"{name}: {type(error).__name__}: {error}"
        raise BadRowError("", "READER_FAILED", message) from error


def _records(value: Any, *, options: ReadOptions) -> Iterable[SFTRecord]:
    items = value if isinstance(value, list | tuple) else [] if value is None else [value]
    return [as_record(item, options=options) for item in items]
