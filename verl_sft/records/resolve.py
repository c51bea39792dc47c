"""What a `data.train_files` value names: files, directories, globs, lists of these."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from verl_sft.config.secrets import DATABASES, hidden
from verl_sft.errors import UsageError
from verl_sft.records.file_set import settle
from verl_sft.records.remote import fetch

# Address of a collection (and a filter, `query=`) -> a file with its documents.
OpenDatabase = Callable[..., Path]


def is_database(spec: str) -> bool:
    """Whether a path is the address of a collection."""
    return spec.startswith(DATABASES)


def resolve_files(spec: Any, *, split: str, database: OpenDatabase | None = None) -> list[Path]:
    """The files that a `data.train_files` value names.

    Args:
        spec: a file, an sft_data directory (its `<split>.parquet`, or shards
            `<split>-*.parquet`), a glob, a URL that fsspec knows, an address
            mongodb://HOST/DATABASE.COLLECTION, or a list of these.
        split: "train" or "val".
        database: opens an address; None: they are refused.

    Raises:
        UsageError: the value is no path, or nothing is there.
        InputError: an address cannot be read.
    """
    if isinstance(spec, list | tuple):
        return [p for part in spec for p in resolve_files(part, split=split, database=database)]
    if not isinstance(spec, str | Path) or not str(spec):
        raise UsageError(
            f"{spec!r:.80} names no file", fix="Give a path, a glob, a URL, or a list of these"
        )
    if is_database(str(spec)):
        if database is None:
            raise UsageError(
                "this command reads files, not databases",
                where=hidden(str(spec)),
                fix="verl-sft inspect, plan and train read collections",
            )
        return [database(str(spec))]
    if "://" in str(spec):
        return fetch(str(spec), split=split)
    path = Path(spec).expanduser()
    settle(path if path.is_dir() else path.parent)
    if path.is_dir():
        single = path / f"{split}.parquet"
        found = [single] if single.is_file() else sorted(path.glob(f"{split}-*.parquet"))
        if not found:
            there = ", ".join(sorted(p.name for p in path.iterdir())[:10]) or "nothing"
            raise UsageError(
                f"the directory holds no {split}.parquet and no {split}-*.parquet",
                where=str(path),
                why=f"There is: {there}",
                fix="Name the files, or a glob such as DIR/*.json",
            )
        return found
    if path.is_file():
        return [path]
    found = [
        file
        for match in sorted(glob.glob(str(path)))
        if os.path.isfile(match) or os.path.isdir(match)
        for file in resolve_files(match, split=split)
    ]
    if not found:
        special = path.exists()  # a pipe cannot be read twice, nor hashed
        raise UsageError(
            "it is neither a file nor a directory" if special else "no such file",
            where=str(path),
            fix="Write its content into a file" if special else "Correct the path",
        )
    return found


def held_out_files(spec: Any) -> list[Path]:
    """`val.parquet`, or its shards, of each sft_data directory that a value names."""
    if isinstance(spec, list | tuple):
        return [path for part in spec for path in held_out_files(part)]
    folders = [Path(match) for match in sorted(glob.glob(str(Path(str(spec)).expanduser())))]
    if (exact := Path(str(spec)).expanduser()).is_dir():
        folders = [exact]
    for folder in folders:
        settle(folder)
    return [
        file
        for folder in folders
        for file in sorted(folder.glob("val.parquet")) or sorted(folder.glob("val-*.parquet"))
    ]
