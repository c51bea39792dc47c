"""A finished folder copied to where others find it: any fsspec address, or the Hugging Face hub.

`manifest.json` goes last, so a copy without it is one that was cut short.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from verl_sft.config.secrets import hidden, reveal
from verl_sft.errors import StorageError, UsageError, VerlSftError

HUB = "hf://"
DONE = "done"  # how the outcome of an upload begins that arrived
_LAST = "manifest.json"
# Stores without folders; making one would make a bucket of a mistyped name.
_DRIVERS = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "az": "adlfs"}


def check_target(uri: str, *, key: str = "upload") -> None:
    """Refuse an address that nothing here can write to, before any work is done.

    Args:
        uri: where to.
        key: that it was given by.

    Raises:
        UsageError: an unknown scheme, a driver that is not installed, a hub without a network, or
            a local folder that cannot be made.
    """
    where = f"{key}={hidden(uri)}"
    scheme, _, place = uri.rpartition("://") if "://" in uri else ("file", "", uri)
    if not place.strip("/"):
        raise UsageError("no place is named", where=where, fix="Write s3://bucket/folder")
    if uri.startswith(HUB):
        user, _, name = place.partition("/")
        if not name or user in ("datasets", "spaces"):
            raise UsageError("no model repository is named", where=where, fix="Use hf://user/repo")
        if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
            raise UsageError(
                "HF_HUB_OFFLINE is set", where=where, fix="Unset it, or copy to another place"
            )
        return
    import fsspec

    if scheme in ("file", "local"):
        folder = Path(place).expanduser().absolute()
        first = next(p for p in (folder, *folder.parents) if p.exists())
        if not (first.is_dir() and os.access(first, os.W_OK)):
            raise UsageError("nothing can be written there", where=where, fix="Choose another")
    try:
        fsspec.get_filesystem_class(scheme)
    except ValueError as error:
        raise UsageError(
            f"the scheme {scheme}:// is unknown", where=where, fix="Use file://, s3://, hf://, ..."
        ) from error
    except ImportError as error:
        package = _DRIVERS.get(scheme, "its fsspec driver")
        raise UsageError(
            f"{scheme}:// needs {package}", where=where, fix=f"pip install {package}"
        ) from error


def upload(folder: Path, uri: str) -> int:
    """Copy every file of `folder` to `uri`; returns how many.

    Raises:
        UsageError: as `check_target`.
        StorageError: the other side refused, or holds another size than was sent.
    """
    check_target(uri)
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    files.sort(key=lambda p: p.name == _LAST and p.parent == folder)
    try:
        (_to_hub if uri.startswith(HUB) else _to_filesystem)(folder, reveal(uri), files)
    except VerlSftError:  # ours, a signal's among them
        raise
    except Exception as error:  # each driver has errors of its own
        name, lines = type(error).__name__, str(error).strip().splitlines()
        told = ": ".join([name, *map(hidden, lines[:1])])
        raise StorageError(f"the upload failed: {told}", where=hidden(uri)) from error
    return len(files)


def try_upload(
    folder: Path,
    uri: str,
    *,
    say: Callable[[str], None],
    attempts: int = 3,
    wait_s: float = 5.0,
) -> str:
    """Upload with retries, never raising what a finished run could fail by; returns the outcome.

    Args:
        folder: of the export.
        uri: where to.
        say: hears of each attempt.
        attempts: in all.
        wait_s: before the second attempt; doubled for each further one.
    """
    for attempt in range(1, attempts + 1):
        try:
            count = upload(folder, uri)
        except (UsageError, StorageError) as error:
            say(f"UPLOAD FAILED ({attempt} of {attempts} attempts): {error}")
            outcome = f"failed: {error}"
            if isinstance(error, UsageError):
                break
            if attempt < attempts:
                time.sleep(wait_s * 2 ** (attempt - 1))
        else:
            say(f"uploaded {count} files to {hidden(uri)}")
            return f"{DONE}: {hidden(uri)}"
    say(f"the export is complete in {folder}; the same command tries the upload again")
    return outcome


def _to_filesystem(folder: Path, uri: str, files: list[Path]) -> None:
    import fsspec

    system, root = fsspec.core.url_to_fs(uri)
    root = str(root).rstrip("/")
    if system.exists(f"{root}/{_LAST}"):
        system.rm_file(f"{root}/{_LAST}")  # an older copy is no longer whole
    for file in files:
        target = f"{root}/{file.relative_to(folder).as_posix()}"
        if uri.partition("://")[0] not in _DRIVERS:
            system.makedirs(target.rpartition("/")[0], exist_ok=True)
        system.put_file(str(file), target)
        there, here = system.size(target), file.stat().st_size
        if there != here:
            raise StorageError(
                f"{there} bytes arrived of {here}", where=f"{hidden(uri)}: {file.name}"
            )


def _to_hub(folder: Path, uri: str, files: list[Path]) -> None:
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

    if not sys.stderr.isatty():
        disable_progress_bars()
    user, name, *inside = uri.removeprefix(HUB).split("/")
    repo, api = f"{user}/{name}", HfApi()
    api.create_repo(repo, private=True, exist_ok=True)
    where: dict[str, Any] = {"path_in_repo": "/".join(inside)} if inside else {}
    api.upload_folder(repo_id=repo, folder_path=str(folder), **where)  # one commit, all or nothing
