"""Clocks, FLOP counts and the rows that are written."""

from __future__ import annotations

import datetime
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.shapes import SHAPES


@dataclass(frozen=True)
class Place:
    """Where figures are taken; `dry` runs every section with toy sizes on the CPU."""

    device: torch.device
    out: Path
    command: str
    dry: bool = False

    @property
    def machine(self) -> str:
        """The name of the device."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return platform.processor() or platform.machine()

    def write(self, section: str, what: str, figure: float, unit: str, note: str = "") -> None:
        """Append one figure to the JSON lines and show it."""
        import transformers

        row = {
            "section": section,
            "what": what,
            "figure": figure,
            "unit": unit,
            "note": note,
            "dry": self.dry,
            "machine": self.machine,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "command": self.command,
            "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        }
        with self.out.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")
        print(f"{section}: {what}: {figure:,.4g} {unit}  {note}", flush=True)

    def failed(self, section: str, what: str, error: BaseException) -> None:
        """A figure that cannot be had here is a row too."""
        text = str(error).strip().splitlines() or [type(error).__name__]
        self.write(
            section, what, float("nan"), "failed", f"{type(error).__name__}: {text[0][:160]}"
        )


def wait(device: torch.device) -> None:
    """Until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(
    run: Callable[[], object], *, device: torch.device, repeat: int = 10, warm: int = 3
) -> float:
    """Median seconds of one call, the device waited for on both sides."""
    for _ in range(warm):
        run()
    took = []
    for _ in range(repeat):
        wait(device)
        started = time.perf_counter()
        run()
        wait(device)
        took.append(time.perf_counter() - started)
    return statistics.median(took)


def peak_memory(device: torch.device) -> float:
    """GiB that tensors took at most since the last reset; 0 on the CPU."""
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0


def parameters(shape: str) -> tuple[int, int]:
    """Parameters of the decoder layers, and of the output head."""
    hidden, intermediate, layers, heads, shared, vocabulary, _ = SHAPES[shape]
    attention = 2 * hidden * hidden + 2 * hidden * (hidden // heads) * shared
    return layers * (attention + 3 * hidden * intermediate), hidden * vocabulary


def flops_6n(shape: str, *, tokens: int) -> float:
    """Six per parameter and token, head included: the common yardstick."""
    return 6.0 * sum(parameters(shape)) * tokens


def flops_executed(
    shape: str,
    *,
    lengths: Sequence[int],
    head_rows: int,
    lora: bool = False,
    recompute: bool = False,
) -> float:
    """What a step really multiplies: causal attention inside documents, head on `head_rows`.

    Frozen matrices have no weight gradient (4 instead of 6); recomputation is a second forward.
    """
    hidden, _, layers, *_ = SHAPES[shape]
    body, head = parameters(shape)
    passes = (4.0 if lora else 6.0) + (2.0 if recompute else 0.0)
    attention = sum(2.0 * n * n * hidden * layers for n in lengths)  # QK and AV, half of the square
    return (
        passes * body * sum(lengths)
        + attention * (3.0 + (1.0 if recompute else 0.0))
        + (4.0 if lora else 6.0) * head * head_rows
    )


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All figures of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
