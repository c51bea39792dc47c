"""How fast a run is, how well it fills its batches, how much memory it holds, how long it takes."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from verl_sft.data.plan import QUADRATIC_COST, StepPlan
from verl_sft.distributed.setup import World
from verl_sft.trainer.flops import ModelFlops

WINDOW = 20  # steps over which rates are averaged
_GB = 1e9


@dataclass(frozen=True, slots=True)
class Layout:
    """How the samples of one step lie on the ranks.

    Attributes:
        tokens: of all documents.
        pairs: sum of their squared lengths.
        micro_batches: forward passes of all ranks, empty ones too.
        idle: share of the ranks' time spent waiting for the costliest micro-batch of each round.
    """

    tokens: int
    pairs: float
    micro_batches: int
    idle: float


def layout(step_plan: StepPlan, *, lengths: npt.NDArray[np.int64]) -> Layout:
    """Add up one step of the plan; a pure function, the same on every rank."""
    sizes = np.array(
        [[_sizes(micro, lengths) for micro in rank] for rank in step_plan.ranks], dtype=np.float64
    )  # [ranks, rounds, 2]
    tokens, pairs = sizes[..., 0], sizes[..., 1]
    costs = tokens + QUADRATIC_COST * pairs
    longest = costs.max(axis=0).sum() * len(costs)
    idle = 1 - costs.sum() / longest if longest else 0.0
    return Layout(int(tokens.sum()), float(pairs.sum()), tokens.size, max(float(idle), 0.0))


def _sizes(micro: Sequence[Sequence[int]], lengths: npt.NDArray[np.int64]) -> tuple[int, int]:
    found = lengths[[i for row in micro for i in row]]
    return int(found.sum()), int((found * found).sum())


class Meter:
    """Turns what a step did, and when, into metrics.

    Args:
        world: the ranks.
        flops: of the model; None: they are not counted.
        peak: FLOP/s of one rank's device; None: no MFU.
        budget: most tokens of one micro-batch.
    """

    def __init__(
        self, *, world: World, flops: ModelFlops | None, peak: float | None, budget: int
    ) -> None:
        self.world, self.flops, self.peak, self.budget = world, flops, peak, budget
        self._steps: deque[tuple[float, float, float, float]] = deque(maxlen=WINDOW)
        self._ends: deque[float] = deque(maxlen=WINDOW + 1)

    def measure(
        self,
        step_plan: StepPlan,
        *,
        lengths: npt.NDArray[np.int64],
        tokens: int,
        learned: int,
        seconds: float,
        remaining: int,
    ) -> dict[str, float]:
        """Metrics of one step; rates and the time that remains are means of the last `WINDOW`.

        Args:
            step_plan: what the step read.
            lengths: of all samples.
            tokens: that it computed on (fewer than it read where prefixes are shared).
            learned: tokens that it learned.
            seconds: that it took.
            remaining: steps still to do.
        """
        laid = layout(step_plan, lengths=lengths)
        work = (0.0, 0.0)
        if self.flops is not None:
            done = self.flops.executed(tokens, learned=learned, pairs=laid.pairs)
            work = self.flops.six_n(tokens), done
        if len(self._ends) == 1:  # the first step also warms up; no rate should remember it
            self._steps.clear()
        self._steps.append((tokens, seconds, *work))
        self._ends.append(time.perf_counter())
        sums = [sum(values) for values in zip(*self._steps, strict=True)]
        wall = (self._ends[-1] - self._ends[0]) / max(len(self._ends) - 1, 1) or seconds
        found = {
            "train/step_seconds": seconds,
            "train/tokens_per_second": sums[0] / sums[1],
            "train/eta_seconds": wall * remaining,
            "train/fill": tokens / (laid.micro_batches * self.budget),
            "train/idle": laid.idle,
            "train/rss_gb": resident_bytes() / _GB,
        }
        if self.world.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.world.device)
            found["train/cuda_peak_gb"] = peak / _GB
        if self.flops is not None and self.peak is not None:
            possible = sums[1] * self.peak * self.world.size
            found["train/mfu"], found["train/mfu_executed"] = sums[2] / possible, sums[3] / possible
        return found


def resident_bytes() -> int:
    """Resident memory of this process now; 0 where the system does not tell."""
    try:
        with open("/proc/self/statm", encoding="ascii") as stream:
            return int(stream.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def model_flops(loss_model: Any) -> ModelFlops | None:
    """Those of a `LossModel`'s causal model; None where its shape is not the usual one."""
    try:
        return ModelFlops.of(loss_model.causal)
    except (AttributeError, TypeError):
        return None
