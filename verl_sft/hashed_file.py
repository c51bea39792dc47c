"""A new file whose bytes are in memory: hashed as it is written, and on the disk before it counts.

Whoever publishes it (`safe_io`) need not read it again.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import mmap
import os
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from verl_sft.safe_io import storage_error

_STAGE, _SECTOR = 1 << 23, 1 << 12  # bytes: of one write, and what its size is a multiple of
_DIRECT = getattr(os, "O_DIRECT", 0)  # where there is none, everything goes through the page cache


def write_hashed(
    path: Path, parts: Iterable[memoryview], *, need: int | None = None
) -> dict[str, Any]:
    """Write a new file from bytes in memory and force it to the disk; nothing is read back.

    A thread hashes the same bytes meanwhile. They must not change until this returns.

    Args:
        path: of the file.
        parts: its bytes in order, made as they are written.
        need: their number, for the message if there is no space.

    Returns:
        The file's `name`, `size` in bytes and `sha256`.

    Raises:
        StorageError: the disk is full or the place is not writable; a part of the file may be left.
    """
    digest = hashlib.sha256()
    queue: SimpleQueue[memoryview | None] = SimpleQueue()

    def hash_all() -> None:
        for block in iter(queue.get, None):
            digest.update(block)

    thread = threading.Thread(target=hash_all, name="sha256")
    thread.start()
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        try:
            size = _write_staged(descriptor, parts, seen=queue.put)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise storage_error(error, path, need=need) from error
    finally:
        queue.put(None)
        thread.join()
    return {"name": path.name, "size": size, "sha256": digest.hexdigest()}


def _write_staged(
    descriptor: int, parts: Iterable[memoryview], *, seen: Callable[[memoryview], None]
) -> int:
    """Write and sync `parts`, telling `seen` of each; returns their size in bytes.

    They go past the page cache where the file system allows it: what others have there stays, and
    nothing is left for the sync to wait for.
    """
    stage = memoryview(mmap.mmap(-1, _STAGE))  # begins at a page, as direct writes must
    filled = size = 0
    _set_direct(descriptor, True)
    for part in parts:
        seen(part)
        size += len(part)
        while part:
            taken = min(len(part), _STAGE - filled)
            stage[filled : filled + taken] = part[:taken]
            part, filled = part[taken:], filled + taken
            if filled == _STAGE:
                _write_all(descriptor, stage)
                filled = 0
    _write_all(descriptor, stage[: -(-filled // _SECTOR) * _SECTOR])  # more than there is, cut off
    os.ftruncate(descriptor, size)
    os.fsync(descriptor)
    return size


def _write_all(descriptor: int, data: memoryview) -> None:
    while data:
        try:
            done = os.write(descriptor, data)
        except OSError as error:
            if error.errno != errno.EINVAL or not _set_direct(descriptor, False):
                raise
            continue
        data = data[done:]
        if data:
            _set_direct(descriptor, False)  # the rest may begin anywhere


def _set_direct(descriptor: int, on: bool) -> bool:
    """Whether writing past the page cache could be switched on, or had to be switched off."""
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    if bool(flags & _DIRECT) == on:
        return False
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags ^ _DIRECT)
    except OSError:
        return False
    return True
