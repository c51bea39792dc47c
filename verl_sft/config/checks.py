"""Checks that config dataclasses make on themselves; each error names the key."""

from __future__ import annotations

from collections.abc import Sequence

from verl_sft.errors import UsageError
from verl_sft.registry import unknown_name


def one_of(key: str, value: str, known: Sequence[str]) -> None:
    """Raise unless `value` is one of `known`."""
    if value not in known:
        error = unknown_name("value", value, known)
        raise UsageError(f"{key}={value}: unknown value", fix=error.fix)


def at_least(key: str, value: float, low: float) -> None:
    """Raise unless `value >= low`."""
    if not value >= low:
        raise UsageError(f"{key}={value}: must be at least {low}")


def fraction(key: str, value: float) -> None:
    """Raise unless `0 <= value <= 1`."""
    if not 0 <= value <= 1:
        raise UsageError(f"{key}={value}: must be between 0 and 1")
