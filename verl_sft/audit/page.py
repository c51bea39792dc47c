"""One self-contained HTML page: no network, and nothing in a row can become markup or script."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

from verl_sft.safe_io import dump_json
from verl_sft.types import JSON

_HERE = Path(__file__).parent
_SLOT = re.compile("@([A-Z_]+)@")


def page(audit: JSON, *, samples: list[JSON], left_out: int) -> str:
    """The page's HTML.

    Data lie in it as JSON without `<`, `>` and `&`; the content security policy lets only the
    page's own script and style run, by their hashes, and nothing be fetched.
    """
    data = dump_json({"audit": audit, "samples": samples, "left_out": left_out})
    for char in "<>&\u2028\u2029":
        data = data.replace(char, f"\\u{ord(char):04x}")
    style, script = ((_HERE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    slots = {
        "STYLE": style,
        "STYLE_HASH": _source_hash(style),
        "SCRIPT": script,
        "SCRIPT_HASH": _source_hash(script),
        "DATA": data,
    }
    # One pass: what a row spells is never taken for a slot.
    return _SLOT.sub(lambda m: slots[m[1]], (_HERE / "page.html").read_text(encoding="utf-8"))


def _source_hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
