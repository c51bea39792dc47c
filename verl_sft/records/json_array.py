"""The elements of a JSON array of any size, one at a time, by the decoder that reads JSON lines."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import IO, Any

from verl_sft.records.rows import decode_json
from verl_sft.records.values import BadRowError

_BLOCK = 1 << 18  # characters read at a time
# Finds the end of an element whose numbers the strict decoder refuses.
_ANY_NUMBER = json.JSONDecoder(parse_constant=str, parse_float=str, parse_int=str)


def array_items(stream: IO[bytes], *, most_chars: int) -> Iterator[Any]:
    """The elements of the array that a UTF-8 stream holds; a `BadRowError` in place of a bad one.

    Args:
        stream: with or without a byte order mark.
        most_chars: of one element; more than one element is never held.

    Raises:
        ValueError: it is no array, or ends early; elements before the damage have been yielded.
    """
    text = _Text(io.TextIOWrapper(stream, encoding="utf-8-sig", newline=""), most_chars)
    if text.take() != "[":
        raise ValueError("not an array")
    if text.peek() == "]":
        text.take()
    else:
        number = 0
        while True:
            try:
                yield text.value()
            except ValueError as error:
                raise ValueError(f"element {number} of the array: {error}") from error
            if (char := text.take()) == "]":
                break
            if char != ",":
                found = repr(char) if char else "the end of the file"
                raise ValueError(f"behind element {number} of the array stands {found}")
            number += 1
    if char := text.peek():
        raise ValueError(f"behind the array stands {char!r}")


class _Text:
    """The part of a stream that is being looked at."""

    def __init__(self, reader: io.TextIOWrapper, most_chars: int) -> None:
        self._reader, self._most = reader, most_chars
        self._text, self._place, self._ended = "", 0, False

    def peek(self) -> str:
        """The next character that is no space; empty at the end."""
        while True:
            while self._place < len(self._text):
                if self._text[self._place] not in " \t\r\n":
                    return self._text[self._place]
                self._place += 1
            if self._ended:
                return ""
            self._read()

    def take(self) -> str:
        """As `peek`, and go behind it."""
        char = self.peek()
        self._place += 1
        return char

    def value(self) -> Any:
        """The next value; what is cut off by the end of the text is tried again with more."""
        self.peek()
        while True:
            try:
                value, end = self._decoded()
                if len(self._text) - end > 2 or self._ended:  # else a number may go on: 1e+
                    self._place = end
                    return value
            except json.JSONDecodeError as error:
                if self._ended:
                    raise ValueError(error.msg) from error
                if len(self._text) - self._place > self._most:
                    raise ValueError(f"{error.msg}, or more than {self._most:,} long") from error
            self._read()

    def _decoded(self) -> tuple[Any, int]:
        try:
            return decode_json(self._text, self._place)
        except json.JSONDecodeError:
            raise
        except ValueError as error:  # a number that is none: the end is known all the same
            try:
                _, end = _ANY_NUMBER.raw_decode(self._text, self._place)
            except RecursionError:
                raise error from None
            return BadRowError("", "BAD_JSON", f"not JSON: {error}"), end

    def _read(self) -> None:
        left = self._text[self._place :]
        more = self._reader.read(max(_BLOCK, len(left)))
        self._text, self._place, self._ended = left + more, 0, not more
