"""A save against plain `torch.save`, in turn: time, CPU time, and where the time goes.

`python -m benchmarks.save [MB ...]`; default 128 and 1024 MB of fp32. Files of the round before are
deleted and the disk is quiet when a contender starts. `TMPDIR` chooses the disk.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.report import row
from verl_sft import hashed_file, safe_io
from verl_sft.trainer.checkpoint import TrainProgress
from verl_sft.trainer.saving import Saver, check_finite
from verl_sft.trainer.state import TrainState, shard_tensors
from verl_sft.trainer.tensor_file import file_parts

ROUNDS = 3
ALONE: Any = SimpleNamespace(
    rank=0, size=1, is_main=True, replica=0, shard_rank=0, shard_size=1, device=torch.device("cpu")
)


def make_state(size: int) -> TrainState:
    """Eight parameters with AdamW's two moments, together so many bytes of fp32."""
    model = torch.nn.Module()
    numel = size // 4 // 3 // 8
    for index in range(8):
        model.register_parameter(f"p{index}", torch.nn.Parameter(torch.randn(numel // 1024, 1024)))
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        optimizer.state[parameter] = {
            "step": torch.tensor(1.0),
            "exp_avg": torch.randn_like(parameter),
            "exp_avg_sq": torch.rand_like(parameter),
        }
    return TrainState(model, optimizer)


class Race:
    """The contenders, and what each took in each round."""

    def __init__(self, folder: Path, *, size: int) -> None:
        self.folder, self.state = folder, make_state(size)
        self.tensors = shard_tensors(self.state, world=ALONE)
        self.step = 0
        self.times: dict[str, list[float]] = {}
        self.cpu: dict[str, list[float]] = {}
        given: dict[str, Any] = {"fingerprint": {}, "world": ALONE, "keep": 1}
        self.blocking = Saver(folder / "blocking", **given)
        self.beside = Saver(folder / "beside", beside=True, **given)

    def torch_save(
        self, *, checksum: bool = True, sync: bool = False, digest: bool = False
    ) -> None:
        """The way of torch itself, with what it leaves out if asked for."""
        path = self.folder / "torch.pt"
        torch.serialization.set_crc32_options(checksum)
        torch.save(self.tensors, path)
        torch.serialization.set_crc32_options(True)
        if sync:
            safe_io.fsync_path(path)
        if digest:
            safe_io.file_sha256(path)

    def save(self, saver: Saver) -> None:
        """A whole save: check, write, hash, sync, manifest, publish, links, retention."""
        self.step += 1
        saver.save(self.state, progress=TrainProgress(step=self.step))

    def save_beside(self) -> None:
        """The same beside the steps: what the step waits for is noted by itself."""
        started = time.perf_counter()
        self.save(self.beside)
        self.note("a step waits", time.perf_counter() - started, 0.0)
        self.beside.finish()

    def parts(self) -> None:
        """The parts of a save, one after the other."""
        path = self.folder / "parts"
        blocks = list(file_parts(self.tensors))
        self.timed("check for NaN", self.check)
        self.timed("sha256", lambda: [hashlib.sha256(b).digest() for b in blocks])
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
        write = partial(hashed_file._write_staged, descriptor, blocks, seen=lambda block: None)
        self.timed("write and sync", write)
        os.close(descriptor)
        path.unlink()
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
        self.timed("(write to the page cache)", lambda: [os.write(descriptor, b) for b in blocks])
        self.timed("(and fsync)", lambda: os.fsync(descriptor))
        os.close(descriptor)

    def check(self) -> None:
        """Look for NaN and infinity."""
        for name, tensor in self.tensors.items():
            check_finite(name, tensor, where=self.folder)

    def run(self) -> None:
        """All rounds."""
        contenders: dict[str, Callable[[], None]] = {
            "torch.save": self.torch_save,
            "ours": lambda: self.save(self.blocking),
            "torch.save + fsync": lambda: self.torch_save(sync=True),
            "ours, beside the steps": self.save_beside,
            "torch.save + fsync + sha256": lambda: self.torch_save(sync=True, digest=True),
            "torch.save without CRC": lambda: self.torch_save(checksum=False),
        }
        for number in range(ROUNDS + 1):
            if number == 1:  # the first round warms up
                self.times, self.cpu = {}, {}
            for name, run in contenders.items():
                self.clean()
                self.timed(name, run)
            self.clean()
            self.parts()

    def clean(self) -> None:
        """An empty folder and a quiet disk."""
        shutil.rmtree(self.folder, ignore_errors=True)
        for name in ("blocking", "beside"):
            (self.folder / name).mkdir(parents=True)
        os.sync()

    def timed(self, name: str, run: Callable[[], object]) -> None:
        """Run and note wall-clock and CPU time."""
        started, cpu = time.perf_counter(), time.process_time()
        run()
        self.note(name, time.perf_counter() - started, time.process_time() - cpu)

    def note(self, name: str, seconds: float, cpu: float) -> None:
        """Keep one measurement."""
        self.times.setdefault(name, []).append(seconds)
        self.cpu.setdefault(name, []).append(cpu)

    def report(self, size: int) -> None:
        """A row for each contender and part: least and median time, ratios round by round."""
        base = self.times["torch.save"]
        for name, times in self.times.items():
            ratio = statistics.median(a / b for a, b in zip(times, base, strict=True))
            row(
                f"{size >> 20} MB, {name}",
                f"{min(times):.2f} s",
                f"median {statistics.median(times):.2f} s, CPU {min(self.cpu[name]):.2f} s, "
                f"{ratio:.2f} times torch.save of its round",
            )


def main(words: list[str]) -> None:
    """Race for each size, in MB."""
    for word in words or ["128", "1024"]:
        size = int(word) << 20
        folder = Path(tempfile.mkdtemp(prefix="verl-sft-save-"))
        try:
            race = Race(folder, size=size)
            race.run()
            race.report(size)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    row("load of the machine", load, "1, 5, 15 minutes")


if __name__ == "__main__":
    main(sys.argv[1:])
