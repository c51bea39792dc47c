"""What a run tells: `metrics.jsonl`, TensorBoard, trackers, a line per step or a progress bar.

Only rank 0 writes. `metrics.jsonl` is written whatever the loggers are, and holds exactly one
object per optimizer step, whatever was killed and resumed in between.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

from verl_sft import safe_io
from verl_sft.trainer.line_file import LineFile
from verl_sft.trainer.trackers import ADAPTERS, Remote, RunInfo, close_all

Metrics = Mapping[str, float | int]
METRICS_FILE = "metrics.jsonl"
LOGGERS = ("console", "file", "tensorboard", *ADAPTERS)
_CONSOLE_LINES = 500  # of a run without a terminal, unless trainer.log_freq says otherwise


class Tracker:
    """Fans the metrics of a step out to the loggers of the run; rank 0 has one.

    Args:
        directory: of the run.
        loggers: names out of `LOGGERS`.
        start_step: the step resumed from; what was written behind it is cut.
        total_steps: of the run.
        log_freq: steps per line where there is no terminal; None: all, or `_CONSOLE_LINES` evenly
            spread lines of a longer run. First, last and validated steps always show.
        info: for trackers; without it they are left out.
    """

    def __init__(
        self,
        directory: Path,
        *,
        loggers: Sequence[str],
        start_step: int,
        total_steps: int,
        log_freq: int | None = None,
        info: RunInfo | None = None,
    ) -> None:
        self._path = directory / METRICS_FILE
        cut_metrics(self._path, last_step=start_step)
        self._lines, self._refused = LineFile(self._path), False
        self._board = _open_board(directory, start_step) if "tensorboard" in loggers else None
        self._console = "console" in loggers
        self._bar = _open_bar(start_step, total_steps) if self._console else None
        self._first, self._total = start_step + 1, total_steps
        self._every = log_freq or max(1, round(total_steps / _CONSOLE_LINES))
        if self._console and self._bar is None and self._every > 1:
            self.say(f"a line every {self._every} steps; {METRICS_FILE} holds all of them")
        names = [name for name in loggers if name in ADAPTERS] if info is not None else []
        self._remotes = [Remote(name, info=info, say=self.say) for name in names if info]

    def log_step(self, metrics: Metrics) -> None:
        """Record one optimizer step.

        A line that does not fit on the disk is told, and waits for the next save, which fails if it
        still does not. What is not a finite number (a validation loss of a model that diverged) has
        no place in JSON and is left out.
        """
        metrics = {k: v for k, v in metrics.items() if not isinstance(v, float) or isfinite(v)}
        problem = self._lines.add(json.dumps(metrics, allow_nan=False))
        if problem is not None and not self._refused:
            self.say(f"WARNING, lines wait in memory: {problem}")
        self._refused = problem is not None
        step = int(metrics["step"])
        named = {name: value for name, value in metrics.items() if "/" in name}
        self._draw_on_board(named, step=step)
        for remote in self._remotes:
            remote.log(named, step=step)
        if self._bar is not None:
            self._bar[0].update(self._bar[1], completed=step, status=status(metrics))
        elif self._console and self._shows(step, metrics):
            print(f"step {step}/{self._total} {status(metrics)}", flush=True)

    def say(self, text: str) -> None:
        """Print one line without disturbing the progress bar."""
        if self._bar is not None:
            self._bar[0].console.print(text, highlight=False, markup=False)
        else:
            print(text, flush=True)

    def sync(self) -> None:
        """Force the metrics to the disk, before the checkpoint that follows from them."""
        self._lines.sync()

    def close(self) -> None:
        """Close all loggers; trackers get a while to finish."""
        if self._bar is not None:
            self._bar[0].stop()
            self._bar = None
        with contextlib.suppress(OSError):  # what it shows is in the lines as well
            if self._board is not None:
                self._board.close()
        close_all(self._remotes)
        self._lines.close()

    def _draw_on_board(self, named: Metrics, *, step: int) -> None:
        try:
            for name, value in named.items():
                if self._board is not None:
                    self._board.add_scalar(name, value, step)
        except OSError as error:
            self._board = None
            self.say(f"WARNING, TensorBoard gets no more figures of this run: {error}")

    def _shows(self, step: int, metrics: Metrics) -> bool:
        told = any(name.startswith(("val/", "env/")) for name in metrics)
        return told or step % self._every == 0 or step in (self._first, self._total)


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
    """Draw `loss.png` from `metrics.jsonl`; returns a note if that is not possible.

    Training and validation losses, one line for each named validation set, and the success rate in
    the environment on an axis of its own.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return "loss.png is not drawn: the package 'matplotlib' is not installed"
    rows = read_metrics(directory / METRICS_FILE)
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name in ["train/loss", *_named_losses(rows)]:
        _draw(axes, rows, name, "-" if name == "train/loss" else "o--")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss per learned token (nats)")
    axes.grid(alpha=0.3)
    if any(SUCCESS in row for row in rows):
        right = axes.twinx()
        _draw(right, rows, SUCCESS, "s:", color="tab:green")
        right.set_ylim(-0.02, 1.02)
        right.set_ylabel("success rate")
        right.legend(loc="upper right")
    if rows:
        axes.legend(loc="lower left")
    with safe_io.publishing(directory / "loss.png") as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    return ""


SUCCESS = "env/success_rate"


def _named_losses(rows: Sequence[Metrics]) -> list[str]:
    """`val/loss` and each `val/NAME/loss`, in order of appearance."""
    names = {name: None for row in rows for name in row if name.startswith("val/")}
    return [name for name in names if name.endswith("/loss") and "/loss_" not in name]


def _draw(axes: Any, rows: Sequence[Metrics], name: str, style: str, **options: Any) -> None:
    points = [(row["step"], row[name]) for row in rows if name in row]
    if points:
        axes.plot(*zip(*points, strict=True), style, label=name, markersize=4, **options)


def status(metrics: Metrics) -> str:
    """The line of a step: what is there of loss, gradient, rates, memory, balance and time."""
    shown = (
        ("train/loss", "loss {:.4f}"),
        ("val/loss", "val {:.4f}"),
        (SUCCESS, "success {:.1%}"),
        ("train/grad_norm", "grad {:.3f}"),
        ("train/lr", "lr {:.2e}"),
        ("train/tokens_per_second", "{:,.0f} tok/s"),
        ("train/mfu", "mfu {:.1%}"),
        ("train/mfu_executed", "({:.1%} executed)"),
        ("train/cuda_peak_gb", "cuda {:.1f} GB"),
        ("train/rss_gb", "rss {:.1f} GB"),
        ("train/learned_tokens", "learned {:,}"),
        ("train/fill", "fill {:.0%}"),
        ("train/idle", "idle {:.0%}"),
    )
    parts = [text.format(metrics[name]) for name, text in shown if name in metrics]
    if "train/eta_seconds" in metrics:  # behind the loss: a narrow terminal cuts the end off
        parts.insert(1, f"eta {_clock(metrics['train/eta_seconds'])}")
    return " ".join(parts)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def _open_bar(start: int, total: int) -> tuple[Any, Any] | None:
    if not sys.stdout.isatty():
        return None
    try:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.table import Column
    except ImportError:
        return None
    count = Column(no_wrap=True, min_width=2 * len(f"{total}") + 1)
    bar = Progress(
        TextColumn("train"),
        BarColumn(bar_width=16),
        MofNCompleteColumn(table_column=count),
        TextColumn("{task.fields[status]}", table_column=Column(no_wrap=True, overflow="ellipsis")),
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
