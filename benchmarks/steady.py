"""Resident memory of the trainer, step by step, on packs of which no two have the same shape.

`python -m benchmarks.steady` runs 320 steps of a toy; `python -m benchmarks.steady unbounded` the
same with the number of remembered shapes as torch has it.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from benchmarks.contenders import ours
from benchmarks.report import row
from benchmarks.shapes import SHAPES, write_model
from verl_sft.distributed.shape_caches import CAPACITIES

STEPS, SETTLED = 320, 60


class Watch:
    """Takes the place of `contenders.Pace`: nobody is waited for."""

    def __init__(self) -> None:
        self.resident: list[float] = []

    def start(self) -> None:
        """Nothing to wait for."""

    def stop(self, *, tokens: int, loss: float) -> None:
        """Note the memory behind the step."""
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.resident.append(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)


def main(words: list[str]) -> None:
    """One run."""
    if "unbounded" in words:
        os.environ.update(dict.fromkeys(CAPACITIES, "1024"))
    watch = Watch()
    with tempfile.TemporaryDirectory() as folder:
        job = {
            "model": str(write_model(Path(folder) / "model", shape="toy")),
            "vocabulary": SHAPES["toy"][5],
            "batch": 4,
            "steps": STEPS,
            "longest": 512,
            "budget": 2048,
            "words": ["engine.dtype=bf16"],
        }
        ours(job, watch)  # type: ignore[arg-type]
    late = watch.resident[SETTLED:]
    middle = sum(late) / len(late)
    row(
        f"resident memory, steps {SETTLED} to {STEPS}",
        f"{min(late) / middle - 1:+.1%} to {max(late) / middle - 1:+.1%}",
        f"around {middle:,.0f} MiB; " + ", ".join(
            f"step {n}: {watch.resident[n - 1]:,.0f}" for n in (1, 20, 60, 120, 200, STEPS)
        ),
    )  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1:])
