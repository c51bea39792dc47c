"""Which checkpoints of a run stay, and how one takes the place of another.

Only whole ones count as kept: a checkpoint of an earlier start is read once to know, those of this
start were hashed as they were written.
"""

from __future__ import annotations

import shutil
import uuid
from pathlib import Path

from verl_sft import safe_io
from verl_sft.errors import StorageError
from verl_sft.trainer.best import best_of
from verl_sft.trainer.checkpoint import ASIDE, MANIFEST, list_checkpoints, verify


class Retention:
    """Deletes what is older than the newest whole checkpoints; the best one stays as well.

    Args:
        directory: of the run.
        keep: number of whole checkpoints to keep; None: all.
    """

    def __init__(self, directory: Path, *, keep: int | None) -> None:
        self._directory, self._keep = directory, keep
        self._whole: set[Path] = set()

    def trust(self, path: Path) -> None:
        """Remember that this checkpoint was verified, or hashed as it was written."""
        self._whole.add(path.absolute())

    def retire(self, newest: Path) -> None:
        """Delete what is no longer kept, now that `newest` is published; the disk decides."""
        self.trust(newest)
        if self._keep is None:
            return
        found, kept = list_checkpoints(self._directory), 1
        best = best_of(found, manifest=MANIFEST)
        for _, path in found:
            if path == newest:
                continue
            if kept < self._keep:
                kept += self._is_whole(path)
            elif path != best:
                hidden = path.with_name(f".tmp-{path.name}.old-{uuid.uuid4().hex[:8]}")
                path.rename(hidden)
                shutil.rmtree(hidden, ignore_errors=True)

    def newest(self) -> Path | None:
        """The newest checkpoint that is whole as far as its manifest and sizes tell."""
        for _, path in list_checkpoints(self._directory):
            if _verifies(path, hashes=False):
                return path
        return None

    def _is_whole(self, path: Path) -> bool:
        known = path.absolute() in self._whole
        whole = _verifies(path, hashes=not known)
        (self._whole.add if whole else self._whole.discard)(path.absolute())
        return whole


def replace(temporary: Path, final: Path) -> None:
    """Publish a checkpoint, in place of a damaged or superseded one of the same step if need be.

    Raises:
        StorageError: it cannot be published; the other is then where it was.
    """
    if not final.exists():
        safe_io.publish_dir(temporary, final)
        return
    aside = final.with_name(f".tmp-{final.name}{ASIDE}{uuid.uuid4().hex[:8]}")
    final.rename(aside)
    try:
        safe_io.publish_dir(temporary, final)
    except BaseException:
        if not final.exists():
            aside.rename(final)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _verifies(path: Path, *, hashes: bool) -> bool:
    try:
        verify(path, hashes=hashes)
    except (StorageError, OSError):
        return False
    return True
