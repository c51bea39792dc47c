"""What a `data.train_files` value names: files, directories, globs, lists of these."""

from __future__ import annotations

import glob
import os
from pathlib import Path
from typing import Any

from verl_sft.errors import InputError
from verl_sft.records.remote import fetch


def resolve_files(spec: Any, *, split: str) -> list[Path]:
    """The files that a `data.train_files` value names.

    Args:
        spec: a file, an sft_data directory (its `<split>.parquet`, or shards
            `<split>-*.parquet`), a glob, a URL that fsspec knows, or a list of these.
        split: "train" or "val".

    Raises:
        InputError: nothing is there.
    """
    if not isinstance(spec, str | Path):
        return [path for part in spec for path in resolve_files(part, split=split)]
    if "://" in str(spec):
        return fetch(str(spec), split=split)
    path = Path(spec).expanduser()
    key = f"data.{split}_files"
    if path.is_dir():
        single = path / f"{split}.parquet"
        found = [single] if single.is_file() else sorted(path.glob(f"{split}-*.parquet"))
        if not found:
            there = ", ".join(sorted(p.name for p in path.iterdir())[:10]) or "nothing"
            raise InputError(
                f"the directory holds no {split}.parquet and no {split}-*.parquet",
                where=str(path),
                why=f"There is: {there}",
                fix=f"Point {key} at an sft_data directory or at parquet files",
            )
        return found
    if path.is_file():
        return [path]
    found = [
        file
        for match in sorted(glob.glob(str(path)))
        if os.path.exists(match)
        for file in resolve_files(match, split=split)
    ]
    if not found:
        raise InputError("no such file", where=str(path), fix=f"Correct {key}")
    return found
