"""Several files that belong together, published at once: train and val of one conversion.

The files are written into a hidden folder, and renaming that folder to `COMMITTED` is the moment
from which the set counts. Its files are then moved to their names. A process that dies in between
leaves the folder; whoever reads or writes there next moves the rest, so new files are never read
beside old ones.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from verl_sft.errors import InputError, VerlSftError
from verl_sft.safe_io import fsync_path, storage_error

COMMITTED = ".committed"
_STAGED = ".staged."

Version = tuple[int, int] | None  # size and time of the last change; None: the file is not there


@contextlib.contextmanager
def publishing_set(directory: Path) -> Iterator[Path]:
    """Yield a folder to write files into; when the block ends all of them appear in `directory`.

    Files of the same names are replaced, others stay.

    Raises:
        StorageError: the disk is full or the place is not writable; unless the set was committed,
            `directory` is then unchanged.
    """
    staged = directory / f"{_STAGED}{uuid.uuid4().hex[:8]}"
    lock = None
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(directory)
        staged.mkdir()
        lock = os.open(staged, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield staged
        for path in staged.iterdir():
            fsync_path(path)
        fsync_path(staged)
        _commit(staged, directory)
        settle(directory)
    except OSError as error:
        if isinstance(error, VerlSftError):
            raise
        raise storage_error(error, directory) from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def settle(directory: Path) -> None:
    """Move the files of a committed set to their names; any process may do it, also at once.

    Raises:
        InputError: the place is not writable; the set then cannot be read as one.
    """
    committed = directory / COMMITTED
    try:
        names = os.listdir(committed)
    except (FileNotFoundError, NotADirectoryError):
        return
    try:
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # another process was faster
                os.replace(committed / name, directory / name)
        fsync_path(directory)
        with contextlib.suppress(FileNotFoundError):
            committed.rmdir()
        fsync_path(directory)
    except OSError as error:
        if error.errno == errno.ENOTEMPTY:  # a later set was committed meanwhile
            return settle(directory)
        raise InputError(
            f"the files of a killed command cannot be moved to their names: {error.strerror}",
            where=str(committed),
            why="Until then new files would be read beside old ones",
            fix="Read them once as a user who may write there",
        ) from error


def versions_of(files: Iterable[Path]) -> dict[Path, Version]:
    """What `check_versions` needs to see whether somebody wrote to the files."""
    return {file: _version(file) for file in files}


def check_versions(before: Mapping[Path, Version]) -> None:
    """Raise if a file was replaced or written to since then.

    If not, all that was read in between is of one set.

    Raises:
        InputError: names the file.
    """
    for directory in {file.parent for file in before}:
        settle(directory)
    for file, version in before.items():
        if _version(file) != version:
            raise InputError(
                "the file was written to while it was read",
                where=str(file),
                why="What was read may be partly old and partly new",
                fix="Run again when nobody writes there",
            )


def _version(file: Path) -> Version:
    try:
        found = file.stat()
    except FileNotFoundError:
        return None
    return found.st_size, found.st_mtime_ns


def _commit(staged: Path, directory: Path) -> None:
    while True:
        settle(directory)
        try:
            os.replace(staged, directory / COMMITTED)
            return fsync_path(directory)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # else another writer's set
                raise


def _remove_abandoned(directory: Path) -> None:
    """Remove what killed writers left; living ones hold their folder's lock."""
    for staged in directory.glob(f"{_STAGED}*"):
        try:
            lock = os.open(staged, os.O_RDONLY)
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(staged, ignore_errors=True)
        except BlockingIOError:
            pass
        finally:
            os.close(lock)
