"""A file that grows by lines, on a disk that may be full for a while."""

from __future__ import annotations

import os
from pathlib import Path

from verl_sft import safe_io
from verl_sft.errors import StorageError


class LineFile:
    """Lines added to the end of a file; those that a full disk refuses wait in memory.

    A line may be there in part until the rest fits; who reads must be ready for that.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting = bytearray()
        try:
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
            self._descriptor = os.open(path, flags, 0o644)
        except OSError as error:
            raise safe_io.storage_error(error, path) from error

    def add(self, line: str) -> StorageError | None:
        """Write `line` behind what waits; returns what stands in the way, if anything does."""
        self._waiting += line.encode() + b"\n"
        try:
            self._write()
        except OSError as error:
            return safe_io.storage_error(error, self.path, need=len(self._waiting))
        return None

    def sync(self) -> None:
        """Force all lines to the disk.

        Raises:
            StorageError: some still do not fit.
        """
        try:
            self._write()
            os.fsync(self._descriptor)
        except OSError as error:
            raise safe_io.storage_error(error, self.path, need=len(self._waiting)) from error

    def close(self) -> None:
        """Write what waits and close.

        Raises:
            StorageError: some lines still do not fit; they are lost.
        """
        try:
            self._write()
        except OSError as error:
            raise safe_io.storage_error(error, self.path, need=len(self._waiting)) from error
        finally:
            os.close(self._descriptor)

    def _write(self) -> None:
        while self._waiting:
            del self._waiting[: os.write(self._descriptor, self._waiting)]
