"""verl's rows: a list of messages, or a prompt and a response, in any of its encodings."""

from __future__ import annotations

from collections.abc import Iterable

from verl_sft.records.parse import ReadOptions, parse_verl
from verl_sft.records.schema import SFTRecord
from verl_sft.records.sources.base import SourceFormat
from verl_sft.types import JSON


def _detect(row: JSON) -> bool:
    return "messages" in row or {"prompt", "response"} <= row.keys()


def _read(row: JSON, options: ReadOptions) -> Iterable[SFTRecord]:
    return (parse_verl(row, options=options),)


VERL = SourceFormat("verl", "verl: a list of messages, or prompt and response", _detect, _read)
