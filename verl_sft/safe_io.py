"""The only module that publishes files: a reader sees the old file or the new one, complete.

Publishing is write to a hidden temporary name, fsync, rename, fsync of the directory. `AppendLog`
is the acknowledged journal: one checksummed line per record, on disk before it counts.
`run_lock` keeps two runs out of one directory and dies with its process.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from verl_sft.errors import InputError, RunBusyError, StorageError

_DIGEST_CHARS = 16
_RUST_ERROR = re.compile(r"\(os error (\d+)\)")
_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
# Made once: `dumps` makes one per call.
_AS_IT_IS, _SORTED = (json.JSONEncoder(allow_nan=False, sort_keys=sort) for sort in (False, True))
_DYING_S = 2.0  # that a killed process with much memory may take to let go of its lock


def dump_json(value: Any, *, indent: int | None = None, sort: bool = False) -> str:
    """JSON text: ASCII only (lone surrogates survive), no NaN, keys in the order that they have.

    The order is part of the data: chat templates print tool schemas and arguments as they stand.
    """
    if indent is None:
        return (_SORTED if sort else _AS_IT_IS).encode(value)
    return json.dumps(value, sort_keys=sort, ensure_ascii=True, allow_nan=False, indent=indent)


def content_hash(value: Any) -> str:
    """A 16-hex-digit content hash of any JSON value (detects accident, not malice)."""
    return hashlib.sha256(dump_json(value, sort=True).encode()).hexdigest()[:_DIGEST_CHARS]


def file_sha256(path: Path) -> str:
    """The sha256 of a file's bytes, read in chunks."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        for block in iter(lambda: stream.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def fsync_path(path: Path) -> None:
    """Force a file's bytes, or a directory's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def publishing(path: Path) -> Iterator[Path]:
    """Yield a hidden temporary path next to `path`; on success it becomes `path` atomically.

    Raises:
        StorageError: the disk is full or the place is not writable; `path` is then unchanged.
    """
    temporary = path.parent / f".tmp-{path.name}.{uuid.uuid4().hex[:8]}"
    try:
        yield temporary
        fsync_path(temporary)
        os.replace(temporary, path)
        fsync_path(path.parent)
    except OSError as error:
        raise storage_error(error, path) from error
    finally:
        temporary.unlink(missing_ok=True)


def publish_dir(temporary: Path, path: Path) -> None:
    """Make the finished directory `temporary` appear as `path`, which must not exist or be empty.

    Raises:
        StorageError: the disk is full or the place is not writable; `path` is then unchanged.
    """
    try:
        for entry in sorted(temporary.rglob("*")):
            fsync_path(entry)
        fsync_path(temporary)
        os.replace(temporary, path)
        fsync_path(path.parent)
    except OSError as error:
        raise storage_error(error, path) from error


def publish_link(path: Path, target: str) -> None:
    """Make `path` a symbolic link to `target` (relative to its folder), at once.

    Raises:
        StorageError: the place is not writable, or something that is no link stands there.
    """
    temporary = path.parent / f".tmp-{path.name}.{uuid.uuid4().hex[:8]}"
    try:
        temporary.symlink_to(target)
        os.replace(temporary, path)
        fsync_path(path.parent)
    except OSError as error:
        raise storage_error(error, path) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Publish `text` as UTF-8 under `path`."""
    with publishing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Publish `value` as readable JSON under `path`."""
    write_text(path, dump_json(value, indent=1, sort=True) + "\n")


def make_output_dir(path: Path) -> Path:
    """Create `path` if needed and prove that it can be written to.

    Raises:
        StorageError: it is a file, or nothing can be written there.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".tmp-probe.{uuid.uuid4().hex[:8]}"
        try:
            probe.write_bytes(b"probe")
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise storage_error(error, path) from error
    return path


def storage_error(error: OSError, path: Path, *, need: int | None = None) -> StorageError:
    """The user's view of an `OSError` met while writing `need` bytes under `path`."""
    fixes = {
        errno.ENOSPC: "Free space there or choose another directory, then run again",
        errno.EDQUOT: "Raise the quota or choose another directory, then run again",
        errno.ENOTDIR: "A file stands where a directory is needed; choose another path",
        errno.EEXIST: "A file stands where a directory is needed; choose another path",
    }
    return StorageError(
        f"cannot write: {error.strerror or error}",
        where=str(path),
        why=_space(path, need=need) if error.errno in (errno.ENOSPC, errno.EDQUOT) else "",
        fix=fixes.get(error.errno or 0, "Choose a directory that you may write to"),
    )


def as_storage_error(error: BaseException, path: Path) -> StorageError | None:
    """What a library's error says of the disk under `path`; None if it is about something else."""
    if isinstance(error, StorageError):
        return error
    found = _RUST_ERROR.search(str(error))
    code = error.errno if isinstance(error, OSError) else int(found[1]) if found else None
    if code not in _OF_THE_DISK:
        return None
    return storage_error(OSError(code, os.strerror(code)), path)


def _space(path: Path, *, need: int | None) -> str:
    """What is free where `path` goes, and what would have been needed; empty if nobody knows."""
    place = next((p for p in (path, *path.parents) if p.exists()), path)
    try:
        free = f"{shutil.disk_usage(place).free / 1e6:,.1f} MB are free"
    except OSError:
        return ""
    return free if need is None else f"The file needs {need / 1e6:,.1f} MB, {free}"


class AppendLog:
    """A journal of JSON records: `digest SP json LF` lines, on disk before `append` returns.

    Opening it cuts off a torn last line (a record that was never acknowledged) and keeps the bytes
    beside the journal; damage anywhere else is refused.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._repair()
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        try:
            self._descriptor = os.open(path, flags, 0o644)
            fsync_path(path.parent)
        except OSError as error:
            raise storage_error(error, path) from error

    def append(self, record: Any) -> None:
        """Write one record; when this returns, it survives `kill -9` and power loss."""
        body = dump_json(record).encode()
        line = hashlib.sha256(body).hexdigest()[:_DIGEST_CHARS].encode() + b" " + body + b"\n"
        try:
            view = memoryview(line)
            while view:
                view = view[os.write(self._descriptor, view) :]
            os.fdatasync(self._descriptor)
        except OSError as error:
            raise storage_error(error, self.path) from error

    def close(self) -> None:
        """Close the journal; it can be opened again."""
        os.close(self._descriptor)

    def _repair(self) -> None:
        if not self.path.exists():
            return
        good = max((offset for _, offset in read_log(self.path)), default=0)
        size = self.path.stat().st_size
        if good == size:
            return
        with self.path.open("r+b") as stream:
            stream.seek(good)
            torn = stream.read()
            keep = self.path.with_name(f"{self.path.name}.torn-{int(time.time())}")
            keep.write_bytes(torn)
            fsync_path(keep)
            stream.truncate(good)
            os.fsync(stream.fileno())


def read_log(path: Path, *, start: int = 0) -> Iterator[tuple[Any, int]]:
    """Yield `(record, offset behind it)` for every acknowledged record of an `AppendLog`.

    `start` is the byte offset of the record to begin with.

    A torn tail (the last line without its LF, or with a wrong digest) ends the iteration.

    Raises:
        InputError: a damaged line that is not the last one.
    """
    offset = start
    with path.open("rb") as stream:
        stream.seek(start)
        for line in stream:
            body = line[_DIGEST_CHARS + 1 : -1]
            digest = hashlib.sha256(body).hexdigest()[:_DIGEST_CHARS].encode()
            if not line.endswith(b"\n") or line[:_DIGEST_CHARS] != digest:
                if stream.read(1):
                    raise InputError(
                        "the journal is damaged",
                        where=f"{path}:byte {offset}",
                        why="A record before the last one does not match its checksum",
                        fix="Restore the file from a backup, or move it away to start anew",
                    )
                return
            offset += len(line)
            yield json.loads(body), offset


@contextlib.contextmanager
def run_lock(directory: Path) -> Iterator[None]:
    """Hold `directory` for this process; the lock dies with the process, however it ends.

    A killed process holds it until its last thread is gone, so it is asked for a little longer.

    Raises:
        RunBusyError: another live process holds it.
    """
    path = directory / ".run.lock"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise storage_error(error, path) from error
    end = time.monotonic() + _DYING_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            if time.monotonic() < end:
                time.sleep(0.02)
                continue
            owner = os.read(descriptor, 4096).decode(errors="replace").strip()
            os.close(descriptor)
            raise RunBusyError(
                "another run works in this directory",
                where=str(directory),
                why=f"Held by {owner}" if owner else "",
                fix="Wait for it to end, stop it, or choose another directory",
            ) from error
    try:
        started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        owner = f"pid {os.getpid()} on {socket.gethostname()} since {started}"
        os.ftruncate(descriptor, 0)
        os.write(descriptor, owner.encode())
        yield
    finally:
        os.close(descriptor)
