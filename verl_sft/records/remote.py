"""Files behind a URL (`hf://`, `s3://`, `gs://`, `hdfs://`, ...) as local ones, fetched once.

A copy is kept under its URL and the version that the store reports, so every process and every
restart reads the same bytes; `VERL_SFT_CACHE` says where (default `~/.cache/verl_sft`).
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

from verl_sft.config.secrets import hidden, reveal
from verl_sft.errors import InputError
from verl_sft.records.files import SUFFIXES
from verl_sft.safe_io import content_hash, make_output_dir, publishing

_OF_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)


def fetch(url: str, *, split: str) -> list[Path]:
    """Local copies of the files that a URL names.

    Args:
        url: of a file, a glob, or a directory: its files of `split` by name, else all of them;
            as it is, or as `hide` gave it.
        split: "train" or "val".

    Raises:
        InputError: nothing is there, it cannot be read, or a package for its kind is missing.
    """
    import fsspec

    url, shown = reveal(url), hidden(url)
    try:
        system, root = fsspec.core.url_to_fs(url)
        names = _names(system, root, split)
        if not names:
            raise FileNotFoundError(f"no file of the kinds {', '.join(SUFFIXES)}")
        return [_copy(system, name, url=url) for name in names]
    except InputError:
        raise
    except (OSError, ImportError, ValueError, RuntimeError) as error:
        raise InputError(
            f"cannot read it: {hidden(str(error)).splitlines()[0]}",
            where=shown,
            fix="Check the address and your access, or copy the files here",
        ) from error


def _names(system: Any, root: str, split: str) -> list[str]:
    if any(c in root for c in "*?["):
        found = [str(n) for n in system.glob(root)]
    elif system.isfile(root):
        return [root]
    else:
        found = [str(n) for n in system.find(root)]
    usable = [n for n in sorted(found) if _suffix(n) in SUFFIXES]
    of_split = [n for n in usable if n.rpartition("/")[2].startswith(split)]
    return of_split or usable


def _suffix(name: str) -> str:
    return Path(name.removesuffix(".gz")).suffix.lower()


def _copy(system: Any, name: str, *, url: str) -> Path:
    version = content_hash([url, name, str(system.ukey(name))])
    root = os.environ.get("VERL_SFT_CACHE") or "~/.cache/verl_sft"
    folder = make_output_dir(Path(root).expanduser() / "fetched" / version)
    path = folder / Path(name).name
    if not path.exists():
        with publishing(path) as temporary:
            try:
                system.get_file(name, str(temporary))
            except OSError as error:
                if error.errno in _OF_DISK:
                    raise
                raise RuntimeError(f"{name}: {error}") from error  # not the disk's fault
    return path
