"""Every error that a user can cause, one tree; the class decides the exit code.

    VerlSftError
    +-- UsageError (ValueError)            2   wrong config, option, path or combination
    |   +-- MissingExtraError (ImportError)2   an optional package is not installed
    +-- InputError (ValueError)            3   rows, games or files that cannot be used
    +-- PartialError                       4   the run ended, some episodes failed
    +-- StorageError (OSError)             5   not writable, full, or damaged by others
    +-- NonFiniteError (ArithmeticError)   6   NaN or inf in loss or gradients
    +-- OutOfMemoryError (MemoryError)     7   did not fit
    +-- PeerLostError                      8   another rank died or hangs
    +-- RunBusyError                       9   another run holds the directory
    +-- Preempted                         75   stopped by a signal, can be resumed

0 means done and verified, 130 stopped by Ctrl-C, 143 by SIGTERM with nothing to save. A message
says what happened, where, why it matters and what to do; `str(error)` prints the four parts that
are there.
"""

from __future__ import annotations


class VerlSftError(Exception):
    """Base of all errors that are a user's to mend; never raised for our own bugs."""

    exit_code = 1
    agreed = False  # whether every rank of a run raises it alike

    def __init__(self, what: str, *, where: str = "", why: str = "", fix: str = "") -> None:
        super().__init__(what)
        self.what, self.where, self.why, self.fix = what, where, why, fix

    def __str__(self) -> str:
        head = f"{self.where}: {self.what}" if self.where else self.what
        parts = [head, self.why, self.fix]
        return " ".join(p if p.endswith((".", "!", "?")) else f"{p}." for p in parts if p)

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions cross process borders in worker pools; the default would lose the keywords.
        return (_rebuild, (type(self), self.what, self.where, self.why, self.fix))


class UsageError(VerlSftError, ValueError):
    """The command as given cannot run."""

    exit_code = 2


class MissingExtraError(UsageError, ImportError):
    """An optional package is needed and not there."""

    def __init__(self, package: str, extra: str, *, why: str = "") -> None:
        super().__init__(
            f"the package '{package}' is not installed",
            why=why,
            fix=f"Install it with: pip install 'verl-sft[{extra}]'",
        )
        self.package, self.extra = package, extra

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild_extra, (self.package, self.extra, self.why))


class InputError(VerlSftError, ValueError):
    """Data that cannot be used."""

    exit_code = 3


class PartialError(VerlSftError):
    """The run ended and its results are saved, but a part of the work failed."""

    exit_code = 4


class StorageError(VerlSftError, OSError):
    """A place to write or read cannot be used."""

    exit_code = 5


class NonFiniteError(VerlSftError, ArithmeticError):
    """NaN or infinity where weights would have been updated from it."""

    exit_code = 6


class OutOfMemoryError(VerlSftError, MemoryError):
    """A step did not fit in memory."""

    exit_code = 7


class PeerLostError(VerlSftError):
    """Another rank of this run died or no longer answers."""

    exit_code = 8


class RunBusyError(VerlSftError):
    """Another run works in the same directory."""

    exit_code = 9


class Preempted(VerlSftError):
    """The run was told to stop, saved what it had, and can be resumed."""

    exit_code = 75


def _rebuild(cls: type[VerlSftError], what: str, where: str, why: str, fix: str) -> VerlSftError:
    return cls(what, where=where, why=why, fix=fix)


def _rebuild_extra(package: str, extra: str, why: str) -> MissingExtraError:
    return MissingExtraError(package, extra, why=why)
