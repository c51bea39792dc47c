"""How large the values of a chat template may be, checked before they are built or walked through.

No built-in operation can be interrupted, so each gets operands that it is done with in well under a
second: short numbers, bounded texts, and lists and mappings that are bounded when spelled out,
however often their parts are shared.
"""

from __future__ import annotations

import re
from collections.abc import Callable, ItemsView, KeysView, Mapping, Sequence, ValuesView
from itertools import islice
from typing import Any

import jinja2

MAX_LENGTH = 16_000_000  # characters of one text, or of all texts in one structure
MAX_PARTS = 1_000_000  # of a list or mapping, spelled out
_MAX_DEPTH = 200  # beyond it C code would run out of stack
_MAX_NUMBER = 1_000_000  # a number that says how much
_MAX_BITS = 4096
_MAX_INDENT = 16
_PADDING = frozenset(("ljust", "rjust", "center", "zfill", "do_center", "do_batch", "do_slice",
                      "sync_do_slice", "do_truncate"))  # fmt: skip
# Methods that compare every place, or every character, with their whole argument.
_PRODUCTS = frozenset(("rfind", "rindex", "rsplit", "rpartition", "strip", "lstrip", "rstrip",
                       "do_trim"))  # fmt: skip
_FORBIDDEN = frozenset(("encode", "translate", "maketrans"))
# All text methods whose work or result is more than a pass over the text.
COSTLY = (
    _PADDING | _PRODUCTS | _FORBIDDEN | {"format", "format_map", "join", "replace", "expandtabs"}
)
_DIGITS = re.compile(r"\d+")
_SIMPLE = (str, int, float, type(None))

Charge = Callable[[int], None]


class OutOfLimitsError(jinja2.TemplateError):
    """The template did more than any honest one does."""


def check_length(value: Sequence[Any], *, most: int = MAX_LENGTH) -> None:
    """Refuse a text or list that an operation would take too long to walk through."""
    if len(value) > most:
        raise OutOfLimitsError(f"the chat template handles a text or list of {len(value)} parts")


def check_size(value: Any) -> tuple[int, int]:
    """Parts and characters of a value that is spelled out, compared, hashed or walked through.

    Raises:
        OutOfLimitsError: it is too large, too deep, or holds itself.
    """
    parts = chars = depth = 0
    level = [value]
    while level:
        below: list[Any] = []
        for part in level:
            kind = type(part)
            if kind is str:
                chars += len(part)
            elif part is None or kind is bool:
                continue
            elif isinstance(part, _SIMPLE):
                chars += len(part) if isinstance(part, str) else 0
                check_number(part)
            elif kind is range:
                parts += len(part)
            else:
                children = part if kind is list or kind is tuple else _children(part)
                parts += len(children)
                if parts <= MAX_PARTS:
                    below += children
        if parts > MAX_PARTS or chars > MAX_LENGTH:
            raise OutOfLimitsError("the chat template spells out a huge structure")
        depth += 1
        if depth > _MAX_DEPTH:
            raise OutOfLimitsError("the chat template nests lists too deeply")
        level = below
    return parts, chars


def _children(part: Any) -> Sequence[Any]:
    if isinstance(part, Mapping):
        return [*part, *part.values()]
    if isinstance(part, list | tuple):
        return part
    if isinstance(part, jinja2.utils.Namespace):
        return list(part._Namespace__attrs.values())
    if isinstance(part, ItemsView | KeysView | ValuesView):
        return list(part)
    return ()


def bounded(items: Any) -> Any:
    """A one-way iterator as a list of bounded length; anything else as it is."""
    if isinstance(items, _SIMPLE) or not hasattr(items, "__next__"):
        return items
    found = list(islice(items, MAX_PARTS + 1))
    if len(found) > MAX_PARTS:
        raise OutOfLimitsError("the chat template spells out a huge structure")
    return found


def check_operands(operator: str, left: Any, right: Any, *, charge: Charge) -> None:
    """The operands of an arithmetic operator, before it is applied."""
    if isinstance(left, int) and isinstance(right, int):
        check_number(left)
        check_number(right)
        if operator == "**" and left.bit_length() * max(right, 0) > _MAX_BITS:
            raise OutOfLimitsError("the chat template computes a huge number")
    elif operator == "%" and isinstance(left, str):
        _check_format(left, (right,), charge=charge)
    elif operator == "*":
        for this, other in ((left, right), (right, left)):
            counted = isinstance(this, int) and isinstance(other, str | list | tuple)
            if counted and this * len(other) > MAX_LENGTH:
                raise OutOfLimitsError("the chat template repeats a text or list too often")


def check_call(name: str, values: Sequence[Any], *, charge: Charge) -> None:
    """A text method or a filter by its name, with its operands (the first is what it works on)."""
    if name in _FORBIDDEN:
        raise OutOfLimitsError(f"the chat template calls {name}, which no chat template needs")
    if name in _PADDING:
        _check_widths(values)
    text, rest = values[0], values[1:]
    if isinstance(text, str):
        check_length(text)
    if name in ("format", "format_map", "do_format"):
        _check_format(str(text), rest, charge=charge)
    elif name in ("join", "do_join", "sync_do_join"):
        items, separator = (rest[0], text) if name == "join" and rest else (text, rest[:1])
        parts, chars = check_size(items)
        count = max(parts, chars if isinstance(items, str) else 0)
        charge(chars + 16 * parts + count * check_size(separator)[1])
    elif name in ("do_sum", "sync_do_sum") and any(not isinstance(v, _SIMPLE) for v in rest):
        raise OutOfLimitsError("the chat template adds up lists")
    elif name == "_to_json":
        _check_json(text, rest, charge=charge)
    elif isinstance(text, str):
        texts = [v for v in rest if isinstance(v, str)]
        if name in _PRODUCTS:
            charge(len(text) * max(map(len, texts), default=0))
        elif name in ("replace", "do_replace") and len(texts) >= 2:
            charge((len(text) + 1) * max(len(texts[1]), 1))
        elif name in ("do_indent", "expandtabs"):
            _check_indent(text, rest, charge=charge)


def _check_indent(text: str, values: Sequence[Any], *, charge: Charge) -> None:
    _check_widths(values)
    widths = [len(v) if isinstance(v, str) else abs(v) for v in values if isinstance(v, str | int)]
    charge((text.count("\n") + text.count("\t") + 1) * max([8, *widths]))


def _check_json(value: Any, options: Sequence[Any], *, charge: Charge) -> None:
    parts, _ = check_size(value)
    for option in options:
        given = option if isinstance(option, list | tuple) else (option,)
        for part in given:
            size = len(part) if isinstance(part, str) else part if isinstance(part, int) else 0
            if size > _MAX_INDENT:
                raise OutOfLimitsError("the chat template indents JSON without measure")
            if size > 1:
                charge(parts * size * _MAX_DEPTH)


def _check_widths(values: Sequence[Any]) -> None:
    for value in values:
        if isinstance(value, int) and abs(value) > _MAX_NUMBER:
            raise OutOfLimitsError("the chat template asks for a huge width")


def check_number(value: Any) -> None:
    """Refuse a huge whole number."""
    if isinstance(value, int) and value.bit_length() > _MAX_BITS:
        raise OutOfLimitsError("the chat template computes a huge number")


def _check_format(text: str, values: Sequence[Any], *, charge: Charge) -> None:
    """`%s` and `{}`: widths stand in the text or, for `*` and `{:{}}`, among the values."""
    fields = text.count("%") + text.count("{")
    widths = _DIGITS.findall(text)
    if any(len(width) > 6 for width in widths):
        raise OutOfLimitsError("the chat template formats a huge field")
    charge(sum(map(int, widths)))
    _, chars = check_size(values)
    charge(fields * chars)
    if "*" in text or ":{" in text:
        flat = [n for v in values for n in (v if isinstance(v, tuple) else (v,))]
        flat += [n for v in values if isinstance(v, Mapping) for n in v.values()]
        _check_widths(flat)
        numbers = [abs(n) for n in flat if isinstance(n, int)]
        charge(fields * max(numbers, default=0))
