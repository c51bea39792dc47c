"""Useful tokens per CPU-second against transformers' Trainer and TRL, then an ablation of ours.

Every contender is a process with one thread and takes its optimizer steps in turn with the others,
on the same ids, labels, initial weights, optimizer and flags; the first step is dropped. The losses
of the first and last step show that the work is the same (TRL's packing makes its own batches).
`python -m benchmarks.train small` is a quick run of a toy; `only=NAME,...` picks contenders.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.contenders import samples_of
from benchmarks.report import row
from benchmarks.shapes import SHAPES, learned_fraction, write_model
from verl_sft.distributed.shape_caches import CAPACITIES

SIZES = {  # shape, samples per step, steps (the first is dropped), longest sample
    "default": ("cpu", 8, 4, 1536),
    "small": ("toy", 4, 3, 512),
}
BUDGET, LEAN = 9216, 2304  # tokens of one micro-batch of ours: a whole step, a quarter of it
HF, TRL = "transformers Trainer, ", "TRL, "


@dataclass
class Result:
    """What one contender reported."""

    name: str
    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    peak: float = 0.0
    start: float = 0.0

    @property
    def net(self) -> float:
        """What the steps added to libraries and weights, in MiB."""
        return self.peak - self.start

    @property
    def rate(self) -> float:
        """Useful tokens per CPU-second, the first step dropped."""
        return sum(self.tokens[1:]) / sum(self.seconds[1:])

    def note(self) -> str:
        """Peak memory, losses and spread of the steps."""
        rates = [t / s for t, s in zip(self.tokens[1:], self.seconds[1:], strict=True)]
        return (
            f"peak {self.peak:,.0f} MiB ({self.start:,.0f} before the first step); "
            f"loss {self.losses[0]:.4f} to {self.losses[-1]:.4f}; "
            f"{len(rates)} steps, median {statistics.median(rates):,.0f} tok/s"
        )


def contenders(batch: int) -> dict[str, dict[str, Any]]:
    """The peers at their best settings, and ours."""
    half = max(1, batch // 2)
    peers = {
        "one sample at a time": {"micro": 1, "accumulate": batch},
        "padded": {"micro": half, "accumulate": 2},
        "padded, grouped by length": {"micro": half, "accumulate": 2, "sort": True},
        "flattened": {"micro": half, "accumulate": 2, "flatten": True},
    }
    ours = {"kind": "ours", "words": ["engine.dtype=bf16"], "budget": BUDGET}
    lean = "ours, micro-batches of a quarter"
    found: dict[str, dict[str, Any]] = {"ours": ours, lean: {**ours, "budget": LEAN}}
    for name, options in peers.items():
        found[HF + name] = {"kind": "hf", "bf16": True, "flatten": False, **options}
    # As many rows of max_length as hold about one step's tokens.
    found[TRL + "packing"] = {"kind": "trl", "bf16": True, "micro": 1, "accumulate": half}
    found[HF + "one at a time, fp32"] = {**found[HF + "one sample at a time"], "bf16": False}
    return found


def ablation() -> dict[str, dict[str, Any]]:
    """Ours with one lever off; from fp32 on they are settings of their own."""
    bf16 = ["engine.dtype=bf16"]
    levers: dict[str, tuple[list[str], list[str]]] = {
        "head on all rows, not the learned ones": (
            [*bf16, "model.learned_rows_only=false"],
            ["all rows"],
        ),
        "last layer on all rows": ([*bf16, "model.learned_rows_only=false"], []),
        "logits in one chunk": (bf16, ["one chunk"]),
        "block mask, not attention by document": ([*bf16, "model.attn_implementation=sdpa"], []),
        "padded, not packed": ([*bf16, "use_remove_padding=false"], []),
        "plain AdamW, not fused": (bf16, ["plain adamw"]),
        "no breakdown of the loss": ([*bf16, "trainer.loss_breakdown=false"], []),
        "activations recomputed": ([*bf16, "model.enable_gradient_checkpointing=true"], []),
        "activations recomputed, not the matrix products": (
            [
                *bf16,
                "model.enable_gradient_checkpointing=true",
                "model.checkpoint_policy=selective",
            ],
            [],
        ),
        "shapes remembered as torch does": (bf16, ["all shapes"]),
        "fp32, not bf16": (["engine.dtype=fp32", "engine.fp32_matmul=highest"], []),
        "fp32, products through oneDNN": (["engine.dtype=fp32", "engine.fp32_matmul=medium"], []),
        "LoRA 16": ([*bf16, "model.lora_rank=16"], []),
        "layers compiled": ([*bf16, "engine.use_torch_compile=true"], []),
    }
    return {
        name: {"kind": "ours", "words": words, "changes": changes, "budget": BUDGET}
        for name, (words, changes) in levers.items()
    }


def race(jobs: dict[str, dict[str, Any]], common: dict[str, Any]) -> list[Result]:
    """Run all contenders step by step in turn; one that fails is reported and left out."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **CAPACITIES,  # ours sets them itself; the peers profit too
    }
    results, running = [], []
    for number, (name, job) in enumerate(jobs.items()):
        log = Path(common["model"]).parent / f"{number}.log"
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.contenders", json.dumps({**common, **job})],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            text=True,
            env=environment | dict.fromkeys(CAPACITIES, "1024")
            if "all shapes" in job.get("changes", ())
            else environment,
        )
        running.append((Result(name), process, log))
    for _ in range(common["steps"]):
        for result, process, _ in running:
            assert process.stdin is not None and process.stdout is not None
            try:
                print(file=process.stdin, flush=True)
            except BrokenPipeError:
                continue
            line = process.stdout.readline()
            if not line:
                continue
            seconds, tokens, loss, peak, result.start = json.loads(line)
            result.seconds.append(seconds)
            result.tokens.append(tokens)
            result.losses.append(loss)
            result.peak = peak
    for result, process, log in running:
        with contextlib.suppress(BrokenPipeError):
            process.communicate()
        if len(result.seconds) > 1:
            results.append(result)
        else:
            reason = (log.read_text().strip().splitlines() or ["no report"])[-1]
            row(result.name, "failed", reason[:200])
    return results


def main(words: list[str]) -> None:
    """Race the contenders, then ours against ours with levers off."""
    shape, batch, steps, longest = SIZES["small" if "small" in words else "default"]
    only = [w.removeprefix("only=").split(",") for w in words if w.startswith("only=")]
    with tempfile.TemporaryDirectory() as folder:
        common = {
            "model": str(write_model(Path(folder) / "model", shape=shape)),
            "vocabulary": SHAPES[shape][5],
            "batch": batch,
            "steps": steps,
            "longest": longest,
            "matmul": "medium",
        }
        samples = samples_of(common)
        row(
            "train, data",
            f"{learned_fraction(samples):.0%} learned",
            f"{len(samples)} dialogues, {sum(map(len, samples)) / steps:,.0f} tokens per step, "
            f"longest {max(map(len, samples))}; model {shape}, vocabulary {SHAPES[shape][5]:,}",
        )
        jobs = contenders(batch)
        if only:
            jobs = {name: job for name, job in jobs.items() if any(o in name for o in only[0])}
        report_race(race(jobs, common))
        if not only:
            report_ablation(race({"ours": jobs["ours"], **ablation()}, common))


def report_race(results: list[Result]) -> None:
    """A row per contender, then the ratios that are aimed at."""
    for result in results:
        row(f"train, {result.name}", f"{result.rate:,.0f} tok/s", result.note())
    found = {r.name: r for r in results}
    us = found.get("ours")
    for peer, aim in ((HF, 3), (TRL, 6)):
        rivals = [r for r in results if r.name.startswith(peer)]
        if us is None or not rivals:
            continue
        best = max(rivals, key=lambda r: r.rate)
        lean = min(rivals, key=lambda r: r.peak)
        row(
            f"train, ours over the best of {peer.rstrip(', ')}",
            f"{us.rate / best.rate:.2f} times",
            f"aim {aim}; best: {best.name.removeprefix(peer)}; peak memory "
            f"{us.peak / lean.peak:.2f} of the leanest ({lean.name.removeprefix(peer)}), "
            f"{us.peak / best.peak:.2f} of the best",
        )
        for name in found:
            if name.startswith("ours, "):
                row(
                    f"train, {name}, over the best of {peer.rstrip(', ')}",
                    f"{found[name].rate / best.rate:.2f} times",
                    f"peak memory {found[name].peak / lean.peak:.2f} of the leanest; net of what "
                    f"each held before its first step {found[name].net / lean.net:.2f}",
                )


def report_ablation(results: list[Result]) -> None:
    """How much slower each lever's absence makes a step."""
    whole = next((r for r in results if r.name == "ours"), None)
    for result in results if whole else ():
        row(f"ablation, {result.name}", f"{whole.rate / result.rate:.2f} times", result.note())


if __name__ == "__main__":
    main(sys.argv[1:])
