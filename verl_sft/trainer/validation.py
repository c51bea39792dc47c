"""Validation: every row of every set, weighted as in training, summed over all ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from verl_sft.data.collate import PackedBatch
from verl_sft.data.joined import JoinedStore
from verl_sft.data.plan import MicroBatch, StepPlan, validation_plan
from verl_sft.data.store import SampleStore
from verl_sft.distributed.reduce import sum_over_ranks
from verl_sft.distributed.setup import World
from verl_sft.distributed.sharding import reshard
from verl_sft.trainer.breakdown import LossParts


def join_sets(stores: Mapping[str, SampleStore]) -> SampleStore | JoinedStore | None:
    """All validation samples behind one another; None where there are none."""
    if list(stores) == [""]:
        return stores[""]
    return JoinedStore(stores) if stores else None


def plan_sets(
    val: SampleStore | JoinedStore, *, shared: npt.NDArray[np.int64] | None, **options: Any
) -> dict[str, StepPlan]:
    """A plan for each set, over the samples of all.

    Args:
        val: all validation samples.
        shared: as in `validation_plan`, of all samples.
        options: of `validation_plan`.
    """
    ranges = val.ranges if isinstance(val, JoinedStore) else {"": range(len(val.lengths))}
    plans = {}
    for name, places in ranges.items():
        part = slice(places.start, places.stop)
        plan = validation_plan(
            val.lengths[part], shared=None if shared is None else shared[part], **options
        )
        plans[name] = _moved(plan, by=places.start)
    return plans


def _moved(plan: StepPlan, *, by: int) -> StepPlan:
    return StepPlan(
        tuple(
            tuple(tuple(tuple(i + by for i in row) for row in micro) for micro in rank)
            for rank in plan.ranks
        )
    )


def validate(
    model: Any,
    *,
    sets: Mapping[str, StepPlan],
    forward: Callable[[MicroBatch], tuple[PackedBatch, torch.Tensor]],
    parts: LossParts | None,
    world: World,
) -> dict[str, float]:
    """Mean loss per learned token: `val/loss` over all rows, `val/NAME/loss` of each named set.

    Args:
        model: the sharded `LossModel`; every rank must call.
        sets: what each set reads; the name of an only set may be empty.
        forward: a micro-batch as a batch, and its weighted loss sum.
        parts: fresh sums for the loss by kind, turn and source; None: none.
        world: the ranks.
    """
    sums: list[float] = []
    model.eval()
    with torch.no_grad():
        for plan in sets.values():
            total = weight = 0.0
            for micro in plan.ranks[world.dp_rank]:
                batch, loss = forward(micro)
                total += float(loss)
                weight += float(batch.weights.sum(dtype=torch.float64))
                if parts is not None:
                    parts.add(batch, model.row_losses)
            sums += [total, weight]
    model.train()
    reshard(model)
    extra = parts.values() if parts is not None else []
    sums, extra = _split(sum_over_ranks([*sums, *extra], world=world), len(sums))
    found = {"val/loss": _ratio(sum(sums[::2]), sum(sums[1::2]))}
    for name, total, weight in zip(sets, sums[::2], sums[1::2], strict=True):
        if name:
            found[f"val/{name}/loss"] = _ratio(total, weight)
    if parts is not None:
        found.update(parts.named(extra, prefix="val/"))
    return found


def _ratio(total: float, weight: float) -> float:
    return total / weight if weight else math.nan  # weights of both signs may cancel


def _split(values: list[float], size: int) -> tuple[list[float], list[float]]:
    return values[:size], values[size:]
