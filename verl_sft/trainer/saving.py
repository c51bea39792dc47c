"""Saving in three parts: copy the state, write the files, publish them under their name.

All ranks do each part together. With `beside` the files are written by a thread while the next
steps run, and published at a later step boundary, when every rank has written: until then, and if
anything fails or is killed, the checkpoints before are all there is.
"""

from __future__ import annotations

import contextlib
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from verl_sft import safe_io
from verl_sft.distributed.reduce import from_main, gather_json, together
from verl_sft.distributed.setup import World
from verl_sft.errors import NonFiniteError, StorageError, VerlSftError
from verl_sft.trainer.best import publish_links
from verl_sft.trainer.checkpoint import FORMAT, LATEST, MANIFEST, TrainProgress, list_checkpoints
from verl_sft.trainer.retention import Retention, replace
from verl_sft.trainer.state import NUMBER, TrainState, shard_tensors, write_shard


@dataclass
class _Pending:
    """A checkpoint that is not yet visible, and this rank's part of it."""

    final: Path
    temporary: Path
    shard: Path
    tensors: dict[str, Tensor]
    manifest: dict[str, Any]
    facts: dict[str, Any] = field(default_factory=dict)
    error: BaseException | None = None
    thread: threading.Thread | None = None

    def write(self) -> None:
        """Check and write this rank's file; what goes wrong is kept for `finish`."""
        try:
            with _writing(self.shard):
                check = partial(check_finite, where=self.final)
                self.facts = write_shard(self.shard, self.tensors, check=check)
        except BaseException as error:
            self.error = error
        finally:
            self.tensors = {}


class Saver:
    """Writes the checkpoints of a run; at most one is on its way.

    Args:
        directory: of the run.
        fingerprint: what must not change between a run and its resumption.
        world: the ranks.
        keep: number of checkpoints to keep; None: all.
        beside: write while the next steps run; costs a copy of the state in host memory.
        warn: a save that fails is told, and the run goes on, unless it is the last one.
        say: prints a line; called on every rank.
    """

    def __init__(
        self,
        directory: Path,
        *,
        fingerprint: Mapping[str, Any],
        world: World,
        keep: int | None = None,
        beside: bool = False,
        warn: bool = False,
        say: Callable[[str], None] = print,
    ) -> None:
        self._directory, self._fingerprint, self._world = directory, dict(fingerprint), world
        self._beside, self._warn, self._say = beside, warn, say
        self._retention = Retention(directory, keep=keep)
        self._pending: _Pending | None = None
        self._copies: dict[str, Tensor] | None = {} if beside else None
        self._step = -1  # of the checkpoint that is there or on its way
        self.failed = 0  # saves that were given up

    @property
    def busy(self) -> bool:
        """Whether this rank still writes."""
        pending = self._pending
        return pending is not None and pending.thread is not None and pending.thread.is_alive()

    @property
    def pending(self) -> bool:
        """Whether a checkpoint is not yet published; the same on every rank."""
        return self._pending is not None

    def start_from(self, step: int, *, path: Path | None = None) -> None:
        """The run goes on from this step, saved in the verified checkpoint `path`."""
        self._step = step
        if path is not None:
            self._retention.trust(path)

    def save(
        self,
        state: TrainState,
        *,
        progress: TrainProgress,
        last: bool = False,
        before: Callable[[], None] | None = None,
    ) -> None:
        """Save this state on all ranks, or begin to; nothing, if that was done at this step.

        Args:
            state: of the run.
            progress: where it is.
            last: nothing comes behind it: wait for it, and raise if it fails.
            before: has to succeed first, on this rank.

        Raises:
            NonFiniteError: the state holds NaN or infinity; it is not published.
            StorageError: on every rank, if any could not write this one or the one before, unless
                that is only warned of.
        """
        self.finish()
        if self._step == progress.step:
            return
        with self._forgiving(last=last):
            pending = self._begin(state, progress=progress, before=before)
            self._pending, self._step = pending, progress.step
            if self._beside:
                pending.thread = threading.Thread(target=pending.write, name="save", daemon=True)
                pending.thread.start()
            else:
                pending.write()
        if last or not self._beside:
            self.finish(last=last)

    def finish(self, *, last: bool = False) -> None:
        """Wait until every rank has written, and publish; without a pending save nothing happens.

        Raises:
            StorageError: on every rank, if any could not write, unless that is only warned of; what
                it wrote is removed.
        """
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        if pending.thread is not None:
            pending.thread.join()
        try:
            with self._forgiving(last=last):
                self._finish(pending)
        finally:
            if self._world.is_main:
                shutil.rmtree(pending.temporary, ignore_errors=True)

    def _begin(
        self, state: TrainState, *, progress: TrainProgress, before: Callable[[], None] | None
    ) -> _Pending:
        world, final = self._world, self._directory / f"global_step_{progress.step}"
        unique = from_main(uuid.uuid4().hex[:8], world=world)
        temporary = self._directory / f".tmp-{final.name}.{unique}"
        tensors: dict[str, Tensor] = {}
        try:
            with together(world), _writing(temporary):
                if before is not None:
                    before()
                tensors = shard_tensors(state, world=world, into=self._copies)
                temporary.mkdir(exist_ok=True)
        except StorageError:
            if world.is_main:
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        name = f"shard_{world.rank:05d}_of_{world.size:05d}.safetensors"
        manifest = {
            "format": FORMAT,
            "progress": asdict(progress),
            "world_size": world.size,
            "fingerprint": self._fingerprint,
            "tensors": state.describe(),
        }
        return _Pending(final, temporary, temporary / name, tensors, manifest)

    def _finish(self, pending: _Pending) -> None:
        with together(self._world):
            if pending.error is not None:
                raise pending.error
        files = gather_json(pending.facts, world=self._world)
        with together(self._world), _writing(pending.final):
            if self._world.is_main:
                self._publish(pending, files)

    def _publish(self, pending: _Pending, files: list[dict[str, Any]]) -> None:
        for facts in files:
            _check_size(pending.temporary / facts["name"], size=facts["size"])
        manifest = {**pending.manifest, "files": {f.pop("name"): f for f in files}}
        manifest["digest"] = safe_io.content_hash(manifest)
        safe_io.write_json(pending.temporary / MANIFEST, manifest)
        replace(pending.temporary, pending.final)
        safe_io.write_text(self._directory / LATEST, f"{manifest['progress']['step']}\n")
        publish_links(self._directory, list_checkpoints(self._directory), manifest=MANIFEST)
        self._retention.retire(pending.final)

    @contextlib.contextmanager
    def _forgiving(self, *, last: bool) -> Iterator[None]:
        """Count and tell a failed save, if the run may go on without it; all ranks raise alike."""
        try:
            yield
        except VerlSftError as error:
            self._step = -1
            if not isinstance(error, StorageError):
                raise
            newest = self._retention.newest()
            good = f"The last good checkpoint is {newest}" if newest else "There is none before it"
            error.why = ". ".join(part for part in (error.why, good) if part)
            if last or not self._warn:
                raise
            self.failed += 1
            self._say(f"SAVE FAILED ({self.failed} so far), the run goes on: {error}")


def check_finite(name: str, tensor: Tensor, *, where: Path) -> None:
    """A healthy checkpoint must never be followed, and rotated out, by a broken one."""
    absent = name.startswith(NUMBER)  # there NaN stands for a number that is not there
    if absent or not tensor.is_floating_point() or tensor.numel() == 0:
        return
    wide = tensor.float() if tensor.element_size() == 1 else tensor  # no arithmetic in 8 bits
    if not all(bool(end.isfinite()) for end in wide.aminmax()):  # NaN wins both; no copy
        raise NonFiniteError(
            f"{name} holds NaN or infinity and is not saved",
            where=str(where),
            why="The checkpoints before it are untouched",
            fix="Lower optim.lr, set optim.clip_grad, or use engine.model_dtype=fp32",
        )


def _check_size(file: Path, *, size: int) -> None:
    """Raise if what a rank has written is not all here: that rank writes to another disk."""
    found = file.stat().st_size if file.is_file() else 0
    if found != size:
        raise StorageError(
            f"{size} bytes were written by a rank, {found} are here",
            where=str(file),
            fix="Put trainer.default_local_dir on a file system that all nodes share",
        )


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn what the disk reports into a `StorageError`."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise safe_io.storage_error(error, path) from error
