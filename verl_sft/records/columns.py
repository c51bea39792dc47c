"""Cells of our CSV files, and which columns make a file ours."""

from __future__ import annotations

import json
from typing import Any

from verl_sft.records.schema import COLUMNS
from verl_sft.records.text import ESCAPE

OWN_COLUMNS = frozenset({"record_id", "messages_json", "supervise"})
CSV_SAFE = "spreadsheet_safe"  # marks files whose formula-like cells got a `'`
# `messages` only repeats `messages_json`, which CSV keeps.
CSV_COLUMNS = tuple(c for c in COLUMNS if c != "messages")


def to_cell(column: str, value: Any) -> str:
    """A column's value as text: null is empty, an empty text a single U+001A."""
    if value is None:
        return ""
    kind = COLUMNS[column]
    if kind.startswith("struct"):
        return value["content"] or ESCAPE
    if kind == "string":
        return value or ESCAPE
    return json.dumps(value)


def from_cell(column: str, cell: str) -> Any:
    """The inverse of `to_cell`; a damaged cell stays text and is refused with its row."""
    kind = COLUMNS.get(column)
    if kind is None or cell == "":
        return None
    if kind == "string" or kind.startswith("struct"):
        return "" if cell == ESCAPE else cell
    try:
        return json.loads(cell)
    except ValueError:
        return cell
