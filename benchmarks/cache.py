"""The token cache at size: cold and warm starts and peak memory, up to a million rows.

Goals: a warm start on 100,000 rows in 5 s, and memory that does not grow with the rows.
`python -m benchmarks.cache ROWS ...` runs other sizes.
"""

from __future__ import annotations

import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.masks import make_template
from benchmarks.report import row
from verl_sft.config.train import DataConfig, MultiturnConfig
from verl_sft.data.load import load_samples
from verl_sft.data.plan import plan_epoch
from verl_sft.records.io import write_parquet
from verl_sft.records.schema import SFTRecord
from verl_sft.types import Message

SIZES = (10_000, 100_000, 1_000_000)
_NOUNS = ("apple", "cabinet", "desk lamp", "drawer", "fridge", "mug", "shelf", "sink basin")


def main(words: list[str]) -> None:
    """Each start in a process of its own, so that its peak memory is its own."""
    for size in map(int, words or map(str, SIZES)):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "train.parquet"
            write_parquet(path, rows(size))
            for attempt in ("cold", "warm"):
                command = [sys.executable, "-m", "benchmarks.cache", "--start", str(path)]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                took, own, worker, tokens = map(float, done.stdout.split())
                note = (
                    f"{tokens / 1e6:.1f}M tokens; peak {own:.0f} MiB, of one worker {worker:.0f}"
                    f" MiB; file of {path.stat().st_size >> 20} MiB"
                )
                row(f"{attempt} start, {size:,} rows", f"{took:.1f} s", note)


def start(path: Path) -> None:
    """Open or build the cache and plan an epoch; print seconds, peaks in MiB and tokens."""
    started = time.perf_counter()
    store = load_samples(
        [path],
        tokenizer=make_template("qwen2_5").spec,
        config=DataConfig(multiturn=MultiturnConfig(enable=True)),
        cache_dir=path.parent / "cache",
        num_workers=2,
    )
    lengths = store.lengths
    plan_epoch(lengths, seed=0, epoch=0, token_budget=16384, train_batch_size=256, dp_size=2)
    took = time.perf_counter() - started
    peaks = [
        resource.getrusage(who).ru_maxrss / 1024
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    ]
    print(took, *peaks, lengths.sum())


def rows(count: int) -> Iterator[SFTRecord]:
    """Short two-turn conversations, all different."""
    rng = random.Random(0)
    for number in range(count):
        seen = ", ".join(f"{noun} {rng.randrange(20)}" for noun in rng.choices(_NOUNS, k=8))
        yield SFTRecord(
            messages=(
                Message("user", f"Room {number}. You see {seen}."),
                Message("assistant", f"<action>go to {rng.choice(_NOUNS)} 1</action>"),
                Message("user", "Nothing happens."),
                Message("assistant", "<action>look</action>"),
            ),
            record_id=str(number),
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--start"]:
        start(Path(sys.argv[2]))
    else:
        main(sys.argv[1:])
