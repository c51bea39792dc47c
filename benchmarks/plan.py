"""Packing and planning from 1,000 to a million samples, balance to 4096 ranks, memory estimate."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import numpy.typing as npt

from benchmarks.report import row, seconds
from verl_sft.data.packing import pack
from verl_sft.data.plan import QUADRATIC_COST, EpochPlan, plan_epoch
from verl_sft.trainer.planning import plan_figures

Lengths = npt.NDArray[np.int64]
BUDGET = 16_384
PER_RANK = 64  # samples of one optimizer step
RANKS = (8, 64, 512, 4096)


def alfworld_like(count: int) -> Lengths:
    """Whole games: a prompt of about 400 tokens and 5 to 50 steps of about 60."""
    rng = np.random.default_rng(0)
    turns = np.clip(rng.gamma(3.0, 5.0, count), 3, 50)
    return (400 + turns * rng.normal(60, 8, count)).astype(np.int64).clip(200, 8192)


def heavy_tail(count: int) -> Lengths:
    """Most samples short, few near the budget."""
    drawn = np.random.default_rng(1).lognormal(6.5, 1.0, count)
    return drawn.astype(np.int64).clip(20, BUDGET)


def planned(lengths: Lengths, *, ranks: int, batch: int, budget: int = BUDGET) -> EpochPlan:
    """The first epoch."""
    return plan_epoch(
        lengths, seed=0, epoch=0, token_budget=budget, train_batch_size=batch, dp_size=ranks
    )


def efficiency(plan: EpochPlan, *, lengths: Lengths, budget: int) -> tuple[float, float]:
    """Share of the time that ranks work, waiting for one another in every round, and the fill."""
    figures = plan_figures(
        plan, lengths=lengths, learned=lengths, budget=budget, quadratic_cost=QUADRATIC_COST
    )
    return 1 - figures.idle, figures.fill


def bound(plan: EpochPlan, *, lengths: Lengths, ranks: int, budget: int) -> float:
    """The most that `efficiency` can be, whatever the packing.

    The round that holds a step's longest sample lasts at least as long as that sample. Its ranks
    do at most the work of the costliest `ranks * budget` tokens in it, and the rest of the step
    cannot be faster than spread evenly.
    """
    even = possible = 0.0
    for step in plan.steps:
        sizes = np.sort(lengths[step.sample_indices()])[::-1]
        costs, ends = costs_of(sizes), np.cumsum(sizes)
        room = np.clip(ranks * budget - (ends - sizes), 0, sizes)  # a part of the last that fits
        in_round = float((costs * room / sizes).sum())
        even += float(costs.sum()) / ranks
        left = max(0.0, float(costs.sum()) - in_round) / ranks
        possible += max(float(costs.sum()) / ranks, float(costs[0]) + left)
    return even / possible


def costs_of(lengths: Lengths) -> npt.NDArray[np.float64]:
    """Cost of each sample."""
    return lengths + QUADRATIC_COST * lengths.astype(float) ** 2


def random_dealing(lengths: Lengths, *, ranks: int) -> float:
    """The same, where every rank gets equally many samples of a shuffled batch."""
    costs = costs_of(lengths)[np.random.default_rng(2).permutation(len(lengths))]
    table = costs.reshape(-1, ranks, PER_RANK).sum(axis=2)
    return float(table.sum() / (ranks * table.max(axis=1).sum()))


# Run in a process of its own: the growth of the peak over what was there before.
_PEAK = """
import json, sys, time
from benchmarks.plan import heavy_tail, planned
def memory(name):
    with open("/proc/self/status") as stream:
        return next(int(line.split()[1]) / 1024 for line in stream if line.startswith(name))
now, peak = (lambda: memory("VmRSS")), (lambda: memory("VmHWM"))
count, batch = int(sys.argv[1]), int(sys.argv[2])
lengths = heavy_tail(count)
planned(lengths[:1000], ranks=8, batch=256)
with open("/proc/self/clear_refs", "w") as stream:
    stream.write("5")  # the peak starts anew
before, started = now(), time.process_time()
plan = planned(lengths, ranks=8, batch=batch)
print(json.dumps([time.process_time() - started, peak() - before, len(plan.steps)]))
"""


def growth() -> None:
    """Planning time and memory of 1k to 1M samples, each in a process of its own."""
    for count in (1_000, 10_000, 100_000, 1_000_000):
        command = [sys.executable, "-c", _PEAK, str(count), "256"]
        took, peak, steps = json.loads(subprocess.check_output(command, text=True))
        row(f"plan {count:,} samples, batches of 256, 8 ranks", f"{took:.2f} s",
            f"{steps:,} steps, {peak:.0f} MiB at most")  # fmt: skip


def balance() -> None:
    """Efficiency at many ranks, with budgets of one and of four times the longest sample."""
    for name, draw in (("ALFWorld-like", alfworld_like), ("heavy tail", heavy_tail)):
        for ranks in RANKS:
            lengths = draw(max(2, 64 // ranks) * PER_RANK * ranks)
            for budget in (BUDGET, 4 * BUDGET):
                plan = planned(lengths, ranks=ranks, batch=PER_RANK * ranks, budget=budget)
                ours, fill = efficiency(plan, lengths=lengths, budget=budget)
                dealt = random_dealing(lengths, ranks=ranks)
                most = bound(plan, lengths=lengths, ranks=ranks, budget=budget)
                row(f"balance, {name}, {ranks} ranks, {budget // 1024}k tokens", f"{ours:.4f}",
                    f"{ours / most:.4f} of the bound {most:.4f}; random dealing {dealt:.4f}; "
                    f"fill {fill:.3f}")  # fmt: skip


def main() -> None:
    """All of it."""
    lengths = heavy_tail(1_000_000)
    took = seconds(lambda: pack(lengths, budget=BUDGET))
    fill = lengths.sum() / (len(pack(lengths, budget=BUDGET)) * BUDGET)
    row("pack 1,000,000 samples into 16k", f"{took:.2f} s", f"fill {fill:.4f}")
    growth()
    balance()


if __name__ == "__main__":
    main()
