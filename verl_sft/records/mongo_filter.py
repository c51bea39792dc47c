"""Filters of MongoDB documents that can only compare: no code, no writes, no other collections.

What a filter may hold is listed; everything else is refused by name, wherever it is nested.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from verl_sft.config.secrets import hidden
from verl_sft.errors import MissingExtraError, UsageError
from verl_sft.records.rows import load_json
from verl_sft.types import JSON

JOINING = ("$and", "$or", "$nor")
COMPARING = ("$eq", "$ne", "$gt", "$gte", "$lt", "$lte", "$in", "$nin", "$exists", "$type", "$size",
             "$all", "$elemMatch", "$not")  # fmt: skip
_LITERALS = ("$oid", "$date")  # as in MongoDB's extended JSON
_DEEPEST = 20
_WHERE = "data.mongo.filter"


def checked_filter(value: Any) -> JSON:
    """A filter, given as an object or as its JSON text, ready for `find`.

    Raises:
        UsageError: it is no object, or holds anything but comparisons.
        MissingExtraError: it names ids and pymongo is not installed.
    """
    if value is None or value == "":
        return {}
    if isinstance(value, str):
        try:
            value = load_json(value)
        except ValueError as error:
            raise _refused(_WHERE, f"the filter is not JSON: {error}") from error
    if not isinstance(value, Mapping):
        found = type(value).__name__
        raise _refused(_WHERE, f"a filter is an object, not a {found} (a pipeline is none)")
    return _query(value, _WHERE, 0)


def _query(query: Mapping[Any, Any], where: str, depth: int) -> JSON:
    _check_depth(where, depth)
    found: JSON = {}
    for key, value in query.items():
        place = f"{where}.{key}"
        _check_key(key, place)
        if not key.startswith("$"):
            found[key] = _condition(value, place, depth + 1)
        elif key in JOINING:
            if not isinstance(value, list) or not value:
                raise _refused(place, f"'{key}' takes a list of filters")
            found[key] = [
                _query(_object(part, f"{place}[{i}]"), f"{place}[{i}]", depth + 1)
                for i, part in enumerate(value)
            ]
        else:
            raise _operator(key, place)
    return found


def _condition(value: Any, where: str, depth: int) -> Any:
    """What one field must be: a value, or an object of comparisons."""
    if not isinstance(value, Mapping) or not any(str(k).startswith("$") for k in value):
        return _literal(value, where, depth)
    if set(value) <= set(_LITERALS):
        return _literal(value, where, depth)
    _check_depth(where, depth)
    found: JSON = {}
    for key, operand in value.items():
        place = f"{where}.{key}"
        if key not in COMPARING:
            raise _operator(key, place)
        found[key] = _operand(key, operand, place, depth + 1)
    return found


def _operand(operator: str, value: Any, where: str, depth: int) -> Any:
    wrong = _refused(where, f"'{operator}' does not take {value!r:.40}")
    if operator == "$not":
        if not isinstance(value, Mapping):
            raise wrong
        return _condition(value, where, depth)
    if operator == "$elemMatch":
        inner = _object(value, where)
        compares = any(str(key) in COMPARING for key in inner)
        return (_condition if compares else _query)(inner, where, depth)
    if operator in ("$in", "$nin", "$all"):
        if not isinstance(value, list):
            raise wrong
        return [_literal(item, f"{where}[{i}]", depth) for i, item in enumerate(value)]
    kinds = {"$exists": bool, "$size": int, "$type": str}
    if operator in kinds and not isinstance(value, kinds[operator]):
        raise wrong
    return _literal(value, where, depth)


def _literal(value: Any, where: str, depth: int) -> Any:
    _check_depth(where, depth)
    if isinstance(value, Mapping):
        if set(value) & set(_LITERALS) and len(value) == 1:
            return _extended(value, where)
        for key in value:
            _check_key(key, f"{where}.{key}")
            if key.startswith("$"):
                raise _operator(key, f"{where}.{key}")
        return {key: _literal(item, f"{where}.{key}", depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_literal(item, f"{where}[{i}]", depth + 1) for i, item in enumerate(value)]
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise _refused(where, f"a value of type {type(value).__name__} cannot stand in a filter")


def _extended(value: Mapping[str, Any], where: str) -> Any:
    """An id or a date, as extended JSON writes them."""
    try:
        from bson import json_util
    except ImportError as error:
        raise MissingExtraError("pymongo", "mongo", why="data.mongo needs it") from error
    try:
        options = json_util.JSONOptions(tz_aware=False)
        return json_util.object_hook(dict(value), options)
    except Exception as error:
        text = f"{dict(value)!r:.60} is neither an id nor a date: {error}"
        raise _refused(where, text) from error


def _object(value: Any, where: str) -> Mapping[Any, Any]:
    if not isinstance(value, Mapping):
        raise _refused(where, f"expected an object, found {type(value).__name__}")
    return value


def _check_key(key: Any, where: str) -> None:
    if not isinstance(key, str) or "\0" in key:
        raise _refused(where, f"{key!r:.40} is not the name of a field")
    if any(part.startswith("$") for part in key.split(".")[1:]):
        raise _refused(where, f"{key!r:.40} is not the name of a field")


def _check_depth(where: str, depth: int) -> None:
    if depth > _DEEPEST:
        raise _refused(where[:60], "the filter is nested too deeply")


def _operator(name: Any, where: str) -> UsageError:
    return _refused(where, f"the operator '{name}' is not allowed in a filter")


def _refused(where: str, what: str) -> UsageError:
    allowed = ", ".join((*COMPARING, *JOINING))
    return UsageError(hidden(what), where=where, fix=f"Use plain values and: {allowed}")
