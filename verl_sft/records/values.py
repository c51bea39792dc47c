"""Values of a row, as they are or as JSON text; what cannot be read is refused.

Every row is plain before a format sees it: files give no other values, and `custom.as_record`
makes those of the user's own code so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from verl_sft.records.rows import load_json
from verl_sft.types import JSON

# Codes of rows that options or their own tool leave out: counted, but not held against the data.
LEFT_OUT = frozenset(
    {
        *("SMALL_ADVANTAGE", "ABANDONED", "NO_COMPLETED_CALL"),
        *("NOT_SUCCESSFUL", "INVALID_ACTION", "ENV_ERROR", "POLICY_ERROR", "ABORTED"),
    }
)
_MOST_CHARS = 64 << 20  # of one JSON text, as of a line
_LARGEST = 3.4028234e38  # that float32 holds
_LEAVES = frozenset({str, int, float, bool, type(None)})


class BadRowError(ValueError):
    """One row cannot be used; `read_records` turns it into a `Reject`."""

    def __init__(self, field: str, code: str, message: str, fix: str = "") -> None:
        super().__init__(message)
        self.field, self.code, self.message, self.fix = field, code, message, fix


def weight_of(value: Any, field: str) -> float:
    """A loss weight given as a number or a flag.

    Raises:
        BadRowError: it is neither, or negative.
    """
    fix = "Use true, false or a number of at least 0"
    if not isinstance(value, bool | int | float) or not 0 <= value <= _LARGEST:
        raise BadRowError(field, "BAD_WEIGHT", f"{value!r:.40} is not a weight", fix)
    return float(value)


def as_float(value: int | float, field: str) -> float:
    """A number as a float that a float32 column holds; NaN stays.

    Raises:
        BadRowError: it is too large.
    """
    if abs(value) > _LARGEST:
        raise BadRowError(field, "BAD_VALUE", "the number is too large for its column")
    return float(value)


def sequence(value: Any, field: str) -> list[Any]:
    """A list, given as one or as JSON text.

    Raises:
        BadRowError: it is not.
    """
    if isinstance(value, str):
        value = json_of(value, field)
    if not isinstance(value, list):
        raise BadRowError(field, "NOT_A_LIST", f"expected a list, found {type(value).__name__}")
    return value


def struct(value: Any, field: str) -> JSON:
    """An object, given as one or as JSON text.

    Raises:
        BadRowError: it is not.
    """
    if isinstance(value, str):
        value = json_of(value, field)
    if not isinstance(value, dict):
        raise BadRowError(field, "BAD_TYPE", f"expected an object, found {type(value).__name__}")
    return value


def json_of(text: str, field: str) -> Any:
    """The value of a JSON text.

    Raises:
        BadRowError: it is not.
    """
    if len(text) > _MOST_CHARS:
        message = f"a text of {len(text):,} characters; the most are {_MOST_CHARS:,}"
        raise BadRowError(field, "TOO_LARGE", message)
    try:
        return load_json(text)
    except ValueError as error:
        raise BadRowError(field, "BAD_JSON", f"not JSON: {error}") from error


def plain(value: Any) -> Any:
    """Numpy values as Python ones, tuples as lists."""
    if type(value) in _LEAVES:  # nearly all values
        return value
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value


def without_nulls(value: Any) -> Any:
    """As `plain`, and without the nulls of structs: Arrow invents them for other rows' keys."""
    if type(value) in _LEAVES:
        return value
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {k: without_nulls(v) for k, v in value.items() if v is not None}
    if isinstance(value, list | tuple):
        return [without_nulls(v) for v in value]
    return value
