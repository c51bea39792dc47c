"""What a run tells: `metrics.jsonl`, TensorBoard, a line per step or a progress bar, `loss.png`.

Only rank 0 writes. `metrics.jsonl` holds exactly one object per optimizer step, whatever was
killed and resumed in between.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from verl_sft import safe_io

Metrics = Mapping[str, float | int]
METRICS_FILE = "metrics.jsonl"
LOGGERS = ("console", "file", "tensorboard")


class Tracker:
    """Fans metrics out to the loggers of the run; on other ranks than 0 it does nothing."""

    def __init__(
        self, directory: Path, *, loggers: Sequence[str], start_step: int, total_steps: int
    ) -> None:
        self._path = directory / METRICS_FILE
        cut_metrics(self._path, last_step=start_step)
        self._stream = self._path.open("a", encoding="utf-8")
        self._board = _open_board(directory, start_step) if "tensorboard" in loggers else None
        self._console = "console" in loggers
        self._bar = _open_bar(start_step, total_steps) if self._console else None
        self._total = total_steps

    def log_step(self, metrics: Metrics) -> None:
        """Record one optimizer step; it is on disk when this returns."""
        self._stream.write(json.dumps(dict(metrics), allow_nan=False) + "\n")
        self._stream.flush()
        step = int(metrics["step"])
        if self._board is not None:
            for name, value in metrics.items():
                if "/" in name:
                    self._board.add_scalar(name, value, step)
        if self._bar is not None:
            self._bar[0].update(self._bar[1], completed=step, status=_status(metrics))
        elif self._console:
            print(f"step {step}/{self._total} {_status(metrics)}", flush=True)

    def say(self, text: str) -> None:
        """Print one line without disturbing the progress bar."""
        if self._bar is not None:
            self._bar[0].console.print(text, highlight=False, markup=False)
        else:
            print(text, flush=True)

    def sync(self) -> None:
        """Force the metrics to the disk, before the checkpoint that follows from them."""
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def close(self) -> None:
        """Close all loggers."""
        if self._bar is not None:
            self._bar[0].stop()
        self._stream.close()
        if self._board is not None:
            self._board.close()


def cut_metrics(path: Path, *, last_step: int) -> None:
    """Drop a torn line and all steps after `last_step`: they will be done again."""
    if not path.exists():
        return
    kept = [m for m in read_metrics(path) if m["step"] <= last_step]
    safe_io.write_text(path, "".join(json.dumps(m) + "\n" for m in kept))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All complete lines of a `metrics.jsonl`, up to a torn one."""
    rows: list[dict[str, Any]] = []
    for line in path.read_text("utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def plot_loss(directory: Path) -> str:
    """Draw `loss.png` from `metrics.jsonl`; returns a note if that is not possible."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return "loss.png is not drawn: the package 'matplotlib' is not installed"
    rows = read_metrics(directory / METRICS_FILE)
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, style in (("train/loss", "-"), ("val/loss", "o--")):
        points = [(m["step"], m[name]) for m in rows if name in m]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=name, markersize=4)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss per learned token (nats)")
    axes.grid(alpha=0.3)
    if rows:
        axes.legend()
    with safe_io.publishing(directory / "loss.png") as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    return ""


def _status(metrics: Metrics) -> str:
    parts = [
        f"loss {metrics['train/loss']:.4f}",
        f"grad {metrics['train/grad_norm']:.3f}",
        f"lr {metrics['train/lr']:.2e}",
        f"{metrics['train/tokens_per_second']:,.0f} tok/s",
        f"learned {metrics['train/learned_tokens']:,}",
        f"eta {_clock(metrics['train/eta_seconds'])}",
    ]
    if "val/loss" in metrics:
        parts.append(f"val {metrics['val/loss']:.4f}")
    return " ".join(parts)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def _open_bar(start: int, total: int) -> tuple[Any, Any] | None:
    if not sys.stdout.isatty():
        return None
    try:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    except ImportError:
        return None
    bar = Progress(
        TextColumn("train"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[status]}")
    )
    bar.start()
    return bar, bar.add_task("train", total=total, completed=start, status="")


def _open_board(directory: Path, start_step: int) -> Any | None:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    # Steps after the one resumed from are hidden by purge_step, as they are done again.
    purge = start_step + 1 if start_step else None
    return SummaryWriter(str(directory / "tensorboard"), purge_step=purge)
