"""A disk that fills up at any moment of a run, from the token cache to the export.

The disk is a tmpfs of a mount namespace of its own, so that the kernel itself says no, to whatever
code is writing. A file takes up all but so many bytes of it.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train_ranks import toy_model, weights_of
from verl_sft.trainer import fsdp_sft_trainer
from verl_sft.trainer.checkpoint import list_checkpoints, verify
from verl_sft.trainer.tracking import read_metrics

_NEW_MOUNTS, _NEW_USER, _PRIVATE, _RECURSIVE = 0x20000, 0x10000000, 1 << 18, 1 << 14
_DISK, _PAGE = 1 << 26, 4096  # bytes


def mount_disk(at: Path) -> bool:
    """Mount a small disk that only this process and its children see; False if not permitted."""
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    if libc.unshare(_NEW_MOUNTS) != 0:
        if libc.unshare(_NEW_MOUNTS | _NEW_USER) != 0:
            return False
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    size = f"size={_DISK}".encode()
    return (
        libc.mount(b"none", b"/", None, _PRIVATE | _RECURSIVE, None) == 0
        and libc.mount(b"tmpfs", str(at).encode(), b"tmpfs", 0, size) == 0
    )


def in_child(work: Any, *, log: Path) -> int:
    """Exit code of `work` in a forked process whose output goes to `log`."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 99
        try:
            with log.open("w") as stream:
                os.dup2(stream.fileno(), 1)
                os.dup2(stream.fileno(), 2)
            sys.stdout, sys.stderr = (
                os.fdopen(1, "w", closefd=False),
                os.fdopen(2, "w", closefd=False),
            )
            code = work()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def train(words: list[str], *, log: Path) -> int:
    """One rank of a real run; its exit code."""

    def work() -> int:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
        os.environ.pop("VERL_SFT_STATUS", None)
        torch.set_num_threads(1)
        return fsdp_sft_trainer.main(words).code

    return in_child(work, log=log)


def good(run: Path) -> dict[str, float]:
    """Checkpoints that are there and when they were written; each has to verify."""
    for _, path in list_checkpoints(run):
        verify(path)
    return {
        path.name: (path / "manifest.json").stat().st_mtime for _, path in list_checkpoints(run)
    }


def losses(run: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["train/loss"]) for row in read_metrics(run / "metrics.jsonl")]


def fill_at_every_part(words: list[str], *, disk: Path, logs: Path, parts: int, warn: bool) -> int:
    """Runs on a disk that holds only a part of what they write, then again with space."""
    run, ballast = disk / "run", disk / "ballast"
    assert train(words, log=logs / "whole") == 0, (logs / "whole").read_text()
    whole, weights = losses(run), weights_of(run)
    names, need = set(good(run)), shutil.disk_usage(disk).used
    if warn:
        words = [*words, "trainer.on_save_error=warn"]
    early = [_PAGE * pages for pages in (0, 3, 16)]  # status, token cache, settings
    even = [need * part // parts & -_PAGE for part in range(1, parts)]  # checkpoints
    for part, free in enumerate([*early, *even, need - 50 * _PAGE, need - _PAGE]):  # export
        shutil.rmtree(run)
        with ballast.open("wb") as stream:
            os.posix_fallocate(stream.fileno(), 0, shutil.disk_usage(disk).free - free)
        code, told = train(words, log=logs / f"full{part}"), (logs / f"full{part}").read_text()
        assert code == 5, (part, free, told)
        assert "Traceback" not in told and told.count("verl-sft: ") == 1, told
        assert "No space left" in told.split("verl-sft: ")[1] and "MB are free" in told, told
        before = good(run) if run.exists() else {}
        assert not (run / "huggingface").exists()
        for name in ("status.json", "plan.json", "audit.json"):
            if (run / name).exists():
                json.loads((run / name).read_text())
        ballast.unlink()
        assert train(words, log=logs / f"again{part}") == 0, (logs / f"again{part}").read_text()
        after = good(run)
        assert before.items() <= after.items() and (run / "huggingface/manifest.json").is_file()
        assert after.keys() == names or warn
        assert losses(run) == whole
        found = weights_of(run)
        assert all(torch.equal(found[name], weights[name]) for name in weights)
    return 0


@pytest.mark.parametrize(
    ("parts", "warn"),
    [
        (2, False),
        pytest.param(40, False, marks=pytest.mark.release),
        pytest.param(40, True, marks=pytest.mark.release),
    ],
)
def test_a_disk_that_fills_up(tmp_path: Path, parts: int, warn: bool) -> None:
    """Exit code 5 and one line; nothing published is lost; with space the run ends as it would."""
    model = toy_model(tmp_path)
    rows = [{"messages": [{"role": "user", "content": f"go to shelf {i}"},
                          {"role": "assistant", "content": f"take apple {i * 7}"}]}
            for i in range(16)]  # fmt: skip
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    disk, logs = tmp_path / "disk", tmp_path / "logs"
    disk.mkdir()
    logs.mkdir()
    words = [
        f"model.partial_pretrain={model}", f"data.train_files={tmp_path / 'train.jsonl'}",
        "data.multiturn.enable=true",
        "data.train_batch_size=4", "data.micro_batch_size_per_gpu=2", "data.max_length=128",
        "engine.dtype=fp32", "trainer.total_epochs=1", "trainer.device=cpu",
        "trainer.logger=[file]", "trainer.save_freq=1", f"trainer.default_local_dir={disk / 'run'}",
    ]  # fmt: skip

    def work() -> int:
        if not mount_disk(disk):
            return 77
        return fill_at_every_part(words, disk=disk, logs=logs, parts=parts, warn=warn)

    code = in_child(work, log=tmp_path / "log")
    if code == 77:
        pytest.skip("a disk of its own cannot be mounted here")
    assert code == 0, (tmp_path / "log").read_text()[-6000:]
