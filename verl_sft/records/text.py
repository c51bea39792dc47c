"""Reversible escape for text that parquet, CSV or a terminal cannot hold.

Lone surrogates, NUL and the escape character itself become U+001A and four hex digits, so
`unescape(escape(text)) == text` for every Python string. JSON columns do not need it.
"""

from __future__ import annotations

import re

ESCAPE = "\x1a"
_BAD = re.compile("[\x00\x1a\ud800-\udfff]")
_ESCAPED = re.compile("\x1a([0-9a-f]{4})")


def escape(text: str) -> str:
    r"""`text` as valid UTF-8 without NUL, e.g. `"a\x00"` as `"a\x1a0000"`."""
    return _BAD.sub(lambda m: f"{ESCAPE}{ord(m[0]):04x}", text)


def unescape(text: str) -> str:
    """The inverse of `escape`."""
    return _ESCAPED.sub(lambda m: chr(int(m[1], 16)), text) if ESCAPE in text else text
