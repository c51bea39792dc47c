"""Checkpoints that are complete or not there: `global_step_N/` of safetensors and JSON alone.

    global_step_12/
      manifest.json                 step, epoch, fingerprints, and sha256 + size of each file
      shard_00000_of_00002.safetensors   rank 0's rows of each tensor, optimizer, RNG
      shard_00001_of_00002.safetensors   ranks of a second copy of the parameters: RNG alone

Sharding cuts the first dimension, so any number of ranks can read the rows it needs. The directory
decides; `latest_checkpointed_iteration.txt` is for people and scripts.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verl_sft import safe_io
from verl_sft.distributed.reduce import together
from verl_sft.distributed.setup import World
from verl_sft.errors import StorageError, UsageError
from verl_sft.trainer.state import TrainState, read_shards

MANIFEST = "manifest.json"
LATEST = "latest_checkpointed_iteration.txt"
FORMAT = 2
ASIDE = ".aside-"  # in the hidden name of a checkpoint while another takes its place
_STEP_DIR = re.compile(r"global_step_(\d+)")


@dataclass(frozen=True)
class TrainProgress:
    """With the pure plan, all of the resume state beside tensors."""

    step: int = 0  # optimizer steps done
    epoch: int = 0  # epoch of the next step
    epoch_step: int = 0  # index of the next step in its epoch
    tokens: int = 0  # tokens read so far
    score: float | None = None  # of this step by trainer.best_metric, higher is better
    best_score: float | None = None  # of all steps so far
    bad_validations: int = 0  # in a row without a better one
    skipped: int = 0  # steps without an update, as their loss or gradient was not finite


def list_checkpoints(directory: Path) -> list[tuple[int, Path]]:
    """`(step, path)` of everything that looks like a checkpoint, newest first."""
    found = []
    for path in directory.glob("global_step_*"):
        match = _STEP_DIR.fullmatch(path.name)
        if match and path.is_dir() and (path / MANIFEST).is_file():
            found.append((int(match[1]), path))
    return sorted(found, reverse=True)


def verify(path: Path, *, hashes: bool = True) -> dict[str, Any]:
    """Check every byte of a checkpoint against its manifest, before any tensor is read.

    Args:
        path: of the checkpoint.
        hashes: false: only the manifest, and names and sizes of the files, at no cost.

    Returns:
        The manifest.

    Raises:
        StorageError: a file is missing, foreign or damaged; it is named.
    """
    try:
        manifest: dict[str, Any] = json.loads((path / MANIFEST).read_text("utf-8"))
        body = {k: v for k, v in manifest.items() if k != "digest"}
        if manifest["digest"] != safe_io.content_hash(body):
            raise ValueError("its digest does not match")
        if manifest["format"] != FORMAT:
            raise ValueError(f"it is of format {manifest['format']}, known here is {FORMAT}")
        files: dict[str, dict[str, Any]] = manifest["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(path / MANIFEST, f"the manifest cannot be used: {error}") from error
    present = {p.name for p in path.iterdir() if p.name != MANIFEST and p.name != "huggingface"}
    for name in sorted(present ^ set(files)):
        raise _damaged(path / name, "foreign file" if name in present else "file is missing")
    for name, facts in files.items():
        file = path / name
        whole = file.stat().st_size == facts["size"]
        if not whole or (hashes and safe_io.file_sha256(file) != facts["sha256"]):
            raise _damaged(file, "its bytes do not match the manifest")
    return manifest


def find_resume(
    directory: Path, *, say: Any = print, fallback: bool = True
) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that verifies, or None where there is none at all.

    Args:
        directory: of the run.
        say: told loudly of each damaged one.
        fallback: whether a damaged one is passed over for the one before it.

    Raises:
        StorageError: the newest is damaged and must not be passed over, or all are: starting anew
            would hide that.
    """
    found = list_checkpoints(directory)
    problem: StorageError | None = None
    for _, path in found:
        try:
            return path, verify(path)
        except StorageError as error:
            if not fallback:
                error.fix += ", or take the one before it with trainer.on_corrupt=fallback"
                raise
            say(f"DAMAGED CHECKPOINT, not used: {error}")
            problem = problem or error
    if problem is not None:
        raise problem
    return None


def check_fingerprint(saved: Mapping[str, Any], *, current: Mapping[str, Any], where: Path) -> None:
    """Refuse to go on from a checkpoint of another run, naming each field that differs.

    Raises:
        UsageError: some field differs.
    """
    names = sorted(set(saved) | set(current))
    changed = [
        f"{name}: {saved.get(name)!r} then, {current.get(name)!r} now"
        for name in names
        if saved.get(name) != current.get(name)
    ]
    if changed:
        raise UsageError(
            "the run was started with other settings or data: " + "; ".join(changed),
            where=str(where),
            why="Going on would not give the result of either run",
            fix="Restore them, use another trainer.default_local_dir, or "
            "trainer.resume_mode=disable after moving the old checkpoints away",
        )


def load(
    path: Path, *, manifest: Mapping[str, Any], state: TrainState, world: World
) -> TrainProgress:
    """Fill `state` from a verified checkpoint, written by any number of ranks."""
    with together(world):
        names = [path / name for name in sorted(manifest["files"])]
        read_shards(names, tensors=manifest["tensors"], state=state, world=world)
    return TrainProgress(**manifest["progress"])


def clean_leftovers(directory: Path) -> None:
    """Remove what a killed run was about to publish, and put back what it was about to replace.

    Call it only while holding the run lock.
    """
    for path in directory.glob(".tmp-*"):
        name = path.name.removeprefix(".tmp-").split(ASIDE)[0]
        if ASIDE in path.name and not (directory / name).exists():
            path.rename(directory / name)
        elif path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _damaged(path: Path, what: str) -> StorageError:
    return StorageError(
        what, where=str(path), fix="Restore it from a backup, or delete the whole checkpoint"
    )
