"""Checks that config dataclasses make on themselves; each error names the key."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from verl_sft.errors import UsageError, VerlSftError
from verl_sft.registry import unknown_name


@contextmanager
def naming(key: str) -> Iterator[None]:
    """Put the key in front of what an error of the block says about the place."""
    try:
        yield
    except VerlSftError as error:
        error.where = f"{key}: {error.where}" if error.where else key
        raise


def one_of(key: str, value: str, known: Sequence[str]) -> None:
    """Raise unless `value` is one of `known`."""
    if value not in known:
        error = unknown_name("value", value, known)
        raise UsageError(f"{key}={value}: unknown value", fix=error.fix)


def at_least(key: str, value: float, low: float) -> None:
    """Raise unless `value >= low` and finite."""
    if not low <= value < math.inf:
        raise UsageError(f"{key}={value}: must be at least {low}")


def above(key: str, value: float, low: float) -> None:
    """Raise unless `value > low` and finite."""
    if not low < value < math.inf:
        raise UsageError(f"{key}={value}: must be more than {low}")


def between(key: str, value: float, low: float, high: float) -> None:
    """Raise unless `low <= value <= high`."""
    if not low <= value <= high:
        raise UsageError(f"{key}={value}: must be between {low} and {high}")


def rows_or_all(key: str, value: int) -> None:
    """Raise unless `value` is a number of rows, at least 1, or -1 for all."""
    if value == 0 or value < -1:
        raise UsageError(f"{key}={value}: leaves no row", fix="-1 takes all rows")


def whole(key: str, value: Any) -> int:
    """The whole number that a value of another tool's file or flag spells, at least 1.

    Raises:
        UsageError: it is none.
    """
    found = real(key, value)
    if found != int(found) or found < 1:
        raise UsageError(f"{key}={value}: must be a whole number, at least 1")
    return int(found)


def real(key: str, value: Any) -> float:
    """The number that a value of another tool's file or flag spells.

    Raises:
        UsageError: it is none, or not finite.
    """
    try:
        found = float(value)
    except (TypeError, ValueError):
        found = math.nan
    if isinstance(value, bool) or not math.isfinite(found):
        raise UsageError(f"{key}={value}: must be a number")
    return found


def fraction(key: str, value: float) -> None:
    """Raise unless `0 <= value <= 1`."""
    between(key, value, 0, 1)


def file_size(key: str, value: str) -> None:
    """Raise unless `value` is a size such as 5GB or 500MB."""
    found = re.fullmatch(r"(\d+(\.\d+)?)\s*[KMGT]B", str(value).strip(), re.IGNORECASE)
    if not found or not float(found[1]):
        raise UsageError(f"{key}={value}: no size of a file", fix="Use one such as 5GB or 500MB")


def template_text(given: str) -> str:
    """A chat template given as jinja text, or as the name of a file that holds it.

    Raises:
        UsageError: it looks like a file name, and there is no such file.
    """
    if "{" in given:
        return given
    path = Path(given).expanduser()
    if not path.is_file():
        raise UsageError(
            "no such file",
            where=f"model.custom_chat_template={given}",
            fix="Give a file with a jinja template, or the template itself",
        )
    return path.read_text("utf-8")


def model_folder(key: str, value: str, *, with_tokenizer: bool = True) -> str:
    """`value` as a folder that holds a model, or unchanged if it can only be a hub name.

    Raises:
        UsageError: a path with nothing behind it, or a folder without a part of the model.
    """
    parts = (*_MODEL_PARTS, _TOKENIZER) if with_tokenizer else _MODEL_PARTS
    fix = "Give a folder with config.json, *.safetensors and a tokenizer, or a hub name"
    return _folder_with(parts, key=key, value=value, fix=fix)


def tokenizer_folder(key: str, value: str) -> str:
    """`value` as a folder that holds a tokenizer, or unchanged if it can only be a hub name.

    Raises:
        UsageError: a path with nothing behind it, or a folder without a tokenizer.
    """
    fix = "Give a folder with a tokenizer.json, or a hub name"
    return _folder_with((_TOKENIZER,), key=key, value=value, fix=fix)


def _folder_with(parts: Sequence[Sequence[str]], *, key: str, value: str, fix: str) -> str:
    folder = Path(value).expanduser()
    if not folder.is_dir():
        if folder.exists() or value.startswith((".", "/", "~")) or value.count("/") > 1:
            raise UsageError("no such folder", where=f"{key}={value}", fix=fix)
        return value
    for patterns in parts:
        if not any(any(folder.glob(pattern)) for pattern in patterns):
            raise UsageError(f"no {patterns[0]} there", where=f"{key}={value}", fix=fix)
    return str(folder)


_MODEL_PARTS = (("config.json",), ("*.safetensors",))
_TOKENIZER = ("tokenizer.json", "tokenizer*", "vocab*", "spiece.model", "*.tiktoken")
