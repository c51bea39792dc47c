"""Saving in three parts: copy the state, write the files, publish them under their name.

All ranks do each part together. With `beside` the files are written by a thread while the next
steps run, and published at a later step boundary, when every rank has written: until then, and if
anything fails or is killed, the checkpoints before are all there is.
"""

from __future__ import annotations

import shutil
import threading
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from verl_sft import safe_io
from verl_sft.distributed.reduce import from_main, gather_json, together
from verl_sft.distributed.setup import World
from verl_sft.errors import NonFiniteError, StorageError
from verl_sft.trainer.best import best_of, publish_links
from verl_sft.trainer.checkpoint import FORMAT, LATEST, MANIFEST, TrainProgress, list_checkpoints
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
        """Write, sync and hash this rank's file; what goes wrong is kept for `publish`."""
        try:
            with _writing(self.shard):
                write_shard(self.shard, self.tensors)
                safe_io.fsync_path(self.shard)
                self.facts = {
                    "name": self.shard.name,
                    "size": self.shard.stat().st_size,
                    "sha256": safe_io.file_sha256(self.shard),
                }
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
    """

    def __init__(
        self,
        directory: Path,
        *,
        fingerprint: Mapping[str, Any],
        world: World,
        keep: int | None = None,
        beside: bool = False,
    ) -> None:
        self._directory, self._fingerprint, self._world = directory, dict(fingerprint), world
        self._keep, self._beside = keep, beside
        self._pending: _Pending | None = None

    @property
    def busy(self) -> bool:
        """Whether this rank still writes."""
        pending = self._pending
        return pending is not None and pending.thread is not None and pending.thread.is_alive()

    @property
    def pending(self) -> bool:
        """Whether a checkpoint is not yet published; the same on every rank."""
        return self._pending is not None

    def save(self, state: TrainState, *, progress: TrainProgress) -> None:
        """Save this state on all ranks, or begin to.

        Raises:
            NonFiniteError: the state holds NaN or infinity; nothing is written.
            StorageError: on every rank, if any could not write this one or the one before.
        """
        self.finish()
        pending = self._begin(state, progress=progress)
        if self._beside:
            pending.thread = threading.Thread(target=pending.write, name="save", daemon=True)
            pending.thread.start()
        else:
            pending.write()
        self._pending = pending
        if not self._beside:
            self.finish()

    def finish(self) -> None:
        """Wait until every rank has written, and publish; without a pending save nothing happens.

        Raises:
            StorageError: on every rank, if any could not write; what it wrote is removed.
        """
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        if pending.thread is not None:
            pending.thread.join()
        try:
            with together(self._world):
                if pending.error is not None:
                    raise pending.error
            files = gather_json(pending.facts, world=self._world)
            with together(self._world), _writing(pending.final):
                if self._world.is_main:
                    self._publish(pending, files)
        finally:
            if self._world.is_main:
                shutil.rmtree(pending.temporary, ignore_errors=True)

    def _begin(self, state: TrainState, *, progress: TrainProgress) -> _Pending:
        world, final = self._world, self._directory / f"global_step_{progress.step}"
        unique = from_main(uuid.uuid4().hex[:8], world=world)
        temporary = self._directory / f".tmp-{final.name}.{unique}"
        tensors: dict[str, Tensor] = {}
        with together(world), _writing(temporary):
            tensors = shard_tensors(state, world=world, copy=self._beside)
            _check_finite(tensors, where=final)
            temporary.mkdir(exist_ok=True)
        name = f"shard_{world.rank:05d}_of_{world.size:05d}.safetensors"
        manifest = {
            "format": FORMAT,
            "progress": asdict(progress),
            "world_size": world.size,
            "fingerprint": self._fingerprint,
            "tensors": state.describe(),
        }
        return _Pending(final, temporary, temporary / name, tensors, manifest)

    def _publish(self, pending: _Pending, files: list[dict[str, Any]]) -> None:
        manifest = {**pending.manifest, "files": {f.pop("name"): f for f in files}}
        manifest["digest"] = safe_io.content_hash(manifest)
        safe_io.write_json(pending.temporary / MANIFEST, manifest)
        _replace(pending.temporary, pending.final)
        safe_io.write_text(self._directory / LATEST, f"{manifest['progress']['step']}\n")
        publish_links(self._directory, list_checkpoints(self._directory), manifest=MANIFEST)
        _retire(self._directory, keep=self._keep, newest=pending.final)


def _check_finite(tensors: Mapping[str, Tensor], *, where: Path) -> None:
    """A healthy checkpoint must never be followed, and rotated out, by a broken one."""
    for name, tensor in tensors.items():
        absent = name.startswith(NUMBER)  # there NaN stands for a number that is not there
        if tensor.is_floating_point() and not absent and not bool(tensor.isfinite().all()):
            raise NonFiniteError(
                f"{name} holds NaN or infinity and is not saved",
                where=str(where),
                why="The checkpoints before it are untouched",
                fix="Lower optim.lr, set optim.clip_grad, or use engine.model_dtype=fp32",
            )


def _replace(temporary: Path, final: Path) -> None:
    if not final.exists():
        safe_io.publish_dir(temporary, final)
        return
    aside = _hidden(final)  # a damaged or superseded one of the same step
    final.rename(aside)
    safe_io.publish_dir(temporary, final)
    shutil.rmtree(aside, ignore_errors=True)


def _retire(directory: Path, *, keep: int | None, newest: Path) -> None:
    """Delete all but the `keep` newest whole checkpoints and the best; the disk knows them all."""
    if keep is None or keep < 1:
        return
    found = list_checkpoints(directory)
    best = best_of(found, manifest=MANIFEST)
    older = [path for _, path in found if path != newest]
    for path in older[keep - 1 :]:
        if path != best:
            hidden = _hidden(path)
            path.rename(hidden)
            shutil.rmtree(hidden, ignore_errors=True)


def _hidden(path: Path) -> Path:
    return path.with_name(f".tmp-{path.name}.old-{uuid.uuid4().hex[:8]}")


class _writing:
    """Turn what the disk, or safetensors on its behalf, reports into a `StorageError`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, StorageError) or error is None:
            return
        if isinstance(error, OSError):
            raise safe_io.storage_error(error, self.path) from error
        if type(error).__name__ == "SafetensorError":
            raise StorageError(f"cannot write: {error}", where=str(self.path)) from error
