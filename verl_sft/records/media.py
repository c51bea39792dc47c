"""Rows with images, videos or sound, which cannot be trained here: refused, never taken as text."""

from __future__ import annotations

from collections.abc import Mapping

from verl_sft.records.messages import MEDIA_FIX
from verl_sft.records.values import BadRowError
from verl_sft.safe_io import dump_json
from verl_sft.types import JSON

_COLUMNS = ("images", "videos", "audios")
_SINGLE = {"image": "<image>", "video": "<video>", "audio": "<audio>"}  # column -> its place


def need_text_only(row: JSON, *, columns: Mapping[str, str]) -> None:
    """Raise where a column of the row holds images, videos or sound.

    Args:
        row: of a file.
        columns: names that differ, by role, as in `dataset_info.json`.

    Raises:
        BadRowError: names the column. `image` and the like are also names of other things, so
            they count only beside a text with `<image>`.
    """
    for role in _COLUMNS:
        name = columns.get(role, role)
        if row.get(name) not in (None, "", [], "[]"):
            raise BadRowError(name, "NOT_TEXT", f"the row has {role}", MEDIA_FIX)
    for name, mark in _SINGLE.items():
        if row.get(name) and mark in dump_json(row):
            raise BadRowError(name, "NOT_TEXT", f"the row's text has {mark}", MEDIA_FIX)
