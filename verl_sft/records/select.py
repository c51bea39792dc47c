"""Filters on records: pure, counted by reason; an SQL condition runs in a closed SQLite."""

from __future__ import annotations

import hashlib
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from verl_sft.config.select import SelectConfig
from verl_sft.errors import UsageError
from verl_sft.records.rows import message_text
from verl_sft.records.schema import COLUMNS, SFTRecord
from verl_sft.records.text import escape

_SCALARS = ("string", "int32", "int64", "float", "bool")
_OBJECTS = ("messages_json", "tools_json", "meta_json", "reward_model", "extra_info")
# Columns that a condition may name; `turns` and `chars` are counted from the messages.
_NAMES = (
    *(c for c, kind in COLUMNS.items() if kind in _SCALARS and c not in _OBJECTS),
    "turns",
    "chars",
)
_LARGEST = 100_000_000  # bytes of a value: a condition cannot make the memory its own
_ALLOWED = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION}


def select(
    records: Iterable[SFTRecord], *, config: SelectConfig, dropped: Counter[str]
) -> Iterator[SFTRecord]:
    """The records that pass all filters but `balance`; the others are counted by reason.

    Raises:
        UsageError: `where` is not an SQL condition on the columns.
    """
    where = condition(config.where) if config.where else None
    for record in records:
        reason = drop_reason(record, config)
        if not reason and where is not None and not where(record):
            reason = "where"
        if reason:
            dropped[reason] += 1
        else:
            yield record


def drop_reason(record: SFTRecord, config: SelectConfig) -> str:
    """The key of the first filter that a record does not pass; empty: it passes."""
    turns = _turns(record)
    last = message_text(record.messages[-1]) if record.messages else ""
    checks = {
        "require_success": not config.require_success or record.success is True,
        "require_agent_success": not config.require_agent_success or record.agent_success is True,
        "min_reward": config.min_reward is None
        or (record.reward is not None and record.reward >= config.min_reward),
        "min_turns": turns >= config.min_turns,
        "max_turns": config.max_turns is None or turns <= config.max_turns,
        "max_chars": config.max_chars is None or _chars(record) <= config.max_chars,
        "end_marker": config.end_marker is None or config.end_marker in last,
        "valid_actions": not config.valid_actions or record.action_valid is not False,
        "task_types": not config.task_types or record.task_type in config.task_types,
        "agents": not config.agents or record.agent_name in config.agents,
        "statuses": not config.statuses or str(record.meta.get("status")) in config.statuses,
    }
    return next((name for name, passed in checks.items() if not passed), "")


def condition(text: str) -> Callable[[SFTRecord], bool]:
    """An SQL condition as a function of a record; unknown values are null, as in SQL.

    Raises:
        UsageError: it is not one, or wants more than columns and functions.
    """
    database = sqlite3.connect(":memory:", check_same_thread=False)
    values = ", ".join(f"? AS {name}" for name in _NAMES)
    query = f"SELECT ({text}) FROM (SELECT {values})"

    def allow(action: int, *rest: object) -> int:
        return sqlite3.SQLITE_OK if action in _ALLOWED else sqlite3.SQLITE_DENY

    database.set_authorizer(allow)
    database.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _LARGEST)

    def holds(record: SFTRecord) -> bool:
        row = [_sql_value(getattr(record, name)) for name in _NAMES[:-2]]
        try:
            (value,) = database.execute(query, [*row, _turns(record), _chars(record)]).fetchone()
        except sqlite3.Error as error:
            raise UsageError(
                f"select.where={text}: {error}",
                where=record.source,
                fix=f"Write an SQL condition on: {', '.join(_NAMES)}",
            ) from error
        return bool(value)

    holds(SFTRecord(messages=()))
    return holds


def _sql_value(value: Any) -> Any:
    if isinstance(value, str):
        return escape(value)
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return float(value)
    return value


def balanced(
    records: Callable[[], Iterable[SFTRecord]], *, by: str, seed: int, dropped: Counter[str]
) -> Iterator[SFTRecord]:
    """As many records of each value of a column as of the rarest one, chosen by a hash.

    `records` gives the same records each time it is called: once to count, once to choose.
    """
    ranks: dict[str, list[bytes]] = {}
    for record in records():
        ranks.setdefault(getattr(record, by), []).append(_rank(record, seed))
    few = min(map(len, ranks.values()), default=0)
    last = {value: sorted(found)[few - 1] for value, found in ranks.items()}
    for record in records():
        if _rank(record, seed) <= last[getattr(record, by)]:
            yield record
        else:
            dropped["balance"] += 1


def _rank(record: SFTRecord, seed: int) -> bytes:
    unit = f"{seed}\x00{record.record_id}\x00{record.source}"
    return hashlib.sha256(unit.encode("utf-8", "surrogatepass")).digest()


def _turns(record: SFTRecord) -> int:
    return sum(m.role == "assistant" for m in record.messages)


def _chars(record: SFTRecord) -> int:
    return sum(len(message_text(m)) for m in record.messages)
