"""MongoDB values as JSON: ids and dates as text, numbers as numbers, binary as base64."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any


def plain_value(value: Any) -> Any:
    """Any value of a document as JSON; NaN and infinity become text, which readers refuse."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, int):
        return int(value)  # Int64 is an int that prints differently
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): plain_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_value(item) for item in value]
    if isinstance(value, datetime):
        aware = value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)
        return aware.isoformat().replace("+00:00", "Z")
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return _special(value)


def _special(value: Any) -> Any:
    if hasattr(value, "to_decimal"):
        return _decimal(value.to_decimal())
    if hasattr(value, "as_doc"):  # a link, or a JSON schema's `$ref`, which pymongo takes for one
        return {k: plain_value(v) for k, v in value.as_doc().items() if (k, v) != ("$id", None)}
    if hasattr(value, "as_datetime"):
        return plain_value(value.as_datetime())
    return str(value)


def _decimal(value: Decimal) -> Any:
    """A number where a float holds it exactly enough to print the same, else text."""
    if not value.is_finite():
        return str(value)
    number = float(value)
    return number if Decimal(repr(number)) == value else str(value)
