"""How a benchmark reports: one JSON row per figure on standard output."""

from __future__ import annotations

import json
import time
from collections.abc import Callable


def row(what: str, figure: str, note: str = "") -> None:
    """Print one figure."""
    print(json.dumps([what, figure, note]), flush=True)


def seconds(run: Callable[[], object], *, repeat: int = 1) -> float:
    """The least wall-clock time of `repeat` runs."""
    best = float("inf")
    for _ in range(repeat):
        started = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - started)
    return best
