"""Our own rows: every column of `COLUMNS`, with `messages_json` as the truth."""

from __future__ import annotations

from collections.abc import Iterable

from verl_sft.records.columns import OWN_COLUMNS
from verl_sft.records.messages import check_learned, check_message, check_order
from verl_sft.records.parse import ReadOptions
from verl_sft.records.rows import ColumnError, record_to_row, row_to_record
from verl_sft.records.schema import SFTRecord
from verl_sft.records.sources.base import SourceFormat
from verl_sft.records.values import BadRowError
from verl_sft.types import JSON


def _detect(row: JSON) -> bool:
    return row.keys() >= OWN_COLUMNS


def _read(row: JSON, options: ReadOptions) -> Iterable[SFTRecord]:
    try:
        record = row_to_record(row)
    except ColumnError as error:
        raise BadRowError(
            error.column, "BAD_VALUE", f"not what the column holds: {error}"
        ) from error
    if not record.messages:
        raise BadRowError("messages_json", "EMPTY", "the list of messages is empty")
    for index, message in enumerate(record.messages):
        check_message(message, "messages_json", index)
    check_order(record.messages, "messages_json")
    check_learned(record.messages, record.supervise, record.weights)
    if not options.multiturn and record.prompt is None:
        raise BadRowError(
            options.prompt_key,
            "NO_PROMPT",
            "the row holds a whole episode, not a prompt and a response",
            "Set data.multiturn.enable=true, or collect with output.rows=step",
        )
    return (record,)


def _write(record: SFTRecord) -> Iterable[JSON]:
    return (record_to_row(record),)


OWN = SourceFormat("own", "our own records", _detect, _read, _write, ".parquet")
