"""Our own rows: every column of `COLUMNS`, with `messages_json` as the truth."""

from __future__ import annotations

from collections.abc import Iterable

from verl_sft.records.columns import OWN_COLUMNS
from verl_sft.records.parse import ReadOptions, parse_own
from verl_sft.records.rows import record_to_row
from verl_sft.records.schema import SFTRecord
from verl_sft.records.sources.base import SourceFormat
from verl_sft.types import JSON


def _detect(row: JSON) -> bool:
    return row.keys() >= OWN_COLUMNS


def _read(row: JSON, options: ReadOptions) -> Iterable[SFTRecord]:
    return (parse_own(row, options=options),)


def _write(record: SFTRecord) -> Iterable[JSON]:
    return (record_to_row(record),)


OWN = SourceFormat("own", "our own records", _detect, _read, _write, ".parquet")
