"""The contenders on one GPU, on the dialogues that ours reads."""

from __future__ import annotations

import importlib.util
import time
from typing import Any

from benchmarks.contenders import hugging_face, samples_of, trl
from benchmarks.gpu.measure import Place, flops_6n, peak_memory, wait

SAMPLES, STEPS = 64, 4  # per optimizer step; the first step is dropped


class Stopwatch:
    """What `contenders.Pace` is to processes, for one process: seconds of each step."""

    def __init__(self, place: Place) -> None:
        self.place, self.started = place, 0.0
        self.seconds: list[float] = []
        self.tokens: list[int] = []
        self.losses: list[float] = []

    def start(self) -> None:
        """A step begins."""
        wait(self.place.device)
        self.started = time.perf_counter()

    def stop(self, *, tokens: int, loss: float) -> None:
        """A step has ended."""
        wait(self.place.device)
        self.seconds.append(time.perf_counter() - self.started)
        self.tokens.append(tokens)
        self.losses.append(loss)


def job(place: Place, shape: str, **options: Any) -> dict[str, Any]:
    """What a contender is told."""
    from benchmarks.shapes import SHAPES

    batch, steps = (4, 2) if place.dry else (SAMPLES, STEPS)
    return {
        "shape": shape,
        "device": place.device.type,
        "attention": "sdpa",
        "vocabulary": SHAPES[shape][5],
        "batch": batch,
        "steps": steps,
        "longest": 256 if place.dry else 2048,
        "bf16": True,
        "flatten": False,
        "micro": batch // 2,
        "accumulate": 2,
        **options,
    }


def contenders(place: Place, shape: str) -> dict[str, dict[str, Any]]:
    """Settings by name; the micro-batches are the largest that were seen to pay."""
    flash = importlib.util.find_spec("flash_attn") is not None and not place.dry
    best = "flash_attention_2" if flash else "sdpa"
    small = job(place, shape)["batch"] // 8 or 1
    spread = {"micro": small, "accumulate": job(place, shape)["batch"] // small}
    return {
        "Trainer, padded": job(place, shape, **spread),
        "Trainer, padded, grouped": job(place, shape, sort=True, **spread),
        f"Trainer, flattened, {best}": job(place, shape, flatten=True, attention=best, **spread),
        f"TRL, packing, {best}": job(place, shape, kind="trl", attention=best, **spread),
    }


def measure(place: Place, name: str, told: dict[str, Any], *, ceiling: float) -> None:
    """Train and write useful tokens per second."""
    if told.get("kind") == "trl" and importlib.util.find_spec("trl") is None:
        raise ModuleNotFoundError("trl is not installed here")
    watch: Any = Stopwatch(place)
    (trl if told.get("kind") == "trl" else hugging_face)(told, watch)
    kept = slice(1, None)
    took, tokens = sum(watch.seconds[kept]), sum(watch.tokens[kept])
    place.write(
        "contenders",
        f"{told['shape']}, {name}",
        tokens / took,
        "tok/s",
        f"MFU {flops_6n(told['shape'], tokens=tokens) / took / ceiling:.1%} by 6N; peak "
        f"{peak_memory(place.device):.1f} GiB; micro-batches of {told['micro']}, "
        f"{sum(map(len, samples_of(told))) / told['steps']:,.0f} tokens per step; loss "
        f"{watch.losses[0]:.4f} to {watch.losses[-1]:.4f}",
    )
