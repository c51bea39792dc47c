"""What a plan amounts to: steps, fill, balance, tokens, and the memory of its largest step."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from verl_sft.config.hub import absence, hub_access
from verl_sft.config.train import ModelConfig
from verl_sft.data.plan import QUADRATIC_COST, EpochPlan, Row
from verl_sft.errors import UsageError
from verl_sft.model.shape import ModelShape, read_shape

# Of the tokens of an agent's conversation; it only decides how much the head weighs in the cost.
_LEARNED_SHARE = 1 / 3
Lengths = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class PlanFigures:
    """One epoch of a plan in numbers.

    Attributes:
        steps: optimizer steps.
        micro_batches: that hold samples, over all ranks.
        empty_micro_batches: in which a rank only waits for the others.
        rows: of all micro-batches; packed ones have one row each.
        documents: samples read, each once.
        tokens: that are computed: prefixes that are shared count once, padding not at all.
        shared_tokens: that need not be computed again.
        fill: tokens over the budget of all micro-batches.
        padding: share of the computed positions that no document fills.
        idle: share of the time in which ranks wait for the slowest, by the cost of documents.
        largest_tokens: positions of the largest micro-batch, padding included.
        largest_learned: learned tokens of the micro-batch that has most of them.
        longest: tokens of the longest sample.
        most_rounds: micro-batches of one rank in the step that has most.
    """

    steps: int
    micro_batches: int
    empty_micro_batches: int
    rows: int
    documents: int
    tokens: int
    shared_tokens: int
    fill: float
    padding: float
    idle: float
    largest_tokens: int
    largest_learned: int
    longest: int
    most_rounds: int


def plan_figures(
    plan: EpochPlan,
    *,
    lengths: Lengths,
    learned: Lengths,
    budget: int,
    quadratic_cost: float,
    shared: Lengths | None = None,
) -> PlanFigures:
    """Count one epoch.

    Args:
        plan: of the epoch.
        lengths: tokens of each sample, int64 [N].
        learned: learned tokens of each sample, int64 [N].
        budget: most tokens of a micro-batch.
        quadratic_cost: as `plan_epoch` was given it.
        shared: as `plan_epoch` was given it.
    """
    saved = np.zeros_like(lengths) if shared is None else shared
    rounds = [round_ for step in plan.steps for round_ in zip(*step.ranks, strict=True)]
    micros = [micro for round_ in rounds for micro in round_ if micro]
    found = {
        micro: [_measure(r, lengths=lengths, saved=saved, quadratic=quadratic_cost) for r in micro]
        for micro in micros
    }
    widths = [len(rows) * max(tokens for tokens, _, _ in rows) for rows in found.values()]
    tokens = sum(row[0] for rows in found.values() for row in rows)
    # A padded row costs what the longest one costs.
    work = {micro: len(rows) * max(cost for _, _, cost in rows) for micro, rows in found.items()}
    times = [[work.get(micro, 0.0) for micro in round_] for round_ in rounds]
    waited = sum(len(round_) * max(round_) for round_ in times)
    return PlanFigures(
        steps=len(plan.steps),
        micro_batches=len(micros),
        empty_micro_batches=sum(len(round_) for round_ in rounds) - len(micros),
        rows=sum(map(len, micros)),
        documents=sum(len(row) for micro in micros for row in micro),
        tokens=tokens,
        shared_tokens=sum(row[1] for rows in found.values() for row in rows),
        fill=tokens / max(1, len(micros) * budget),
        padding=1 - tokens / max(1, sum(widths)),
        idle=1 - sum(map(sum, times)) / waited if waited else 0.0,
        largest_tokens=max(widths, default=0),
        largest_learned=max(
            (int(learned[[i for r in m for i in r]].sum()) for m in micros), default=0
        ),
        longest=int(lengths.max(initial=0)),
        most_rounds=max((step.num_micro_batches for step in plan.steps), default=0),
    )


def _measure(
    row: Row, *, lengths: Lengths, saved: Lengths, quadratic: float
) -> tuple[int, int, float]:
    """Of a row: tokens that are computed, tokens that are there only once, and the cost."""
    inside = list(row)
    again = [i for before, i in pairwise(row) if i == before + 1]
    pairs = float((lengths[inside] ** 2).sum() - (saved[again] ** 2).sum())
    skipped = int(saved[again].sum())
    tokens = int(lengths[inside].sum()) - skipped
    return tokens, skipped, tokens + quadratic * pairs


def model_shape(config: ModelConfig) -> ModelShape:
    """The dimensions of `model.partial_pretrain`, from its config.json.

    Raises:
        UsageError: there is none, or it names no dimensions.
    """
    name = str(config.partial_pretrain)
    path = Path(name).expanduser() / "config.json"
    if path.is_file():
        try:
            return read_shape(json.loads(path.read_text("utf-8")), where=str(path))
        except ValueError as error:
            if isinstance(error, UsageError):
                raise
            raise UsageError(f"not JSON: {error}", where=str(path)) from error
    from transformers import AutoConfig

    try:
        with hub_access(name):
            found = AutoConfig.from_pretrained(name, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(
            f"no config.json can be read: {str(error).strip().splitlines()[0]}",
            where=f"model.partial_pretrain={name}",
            why=absence(name),
        ) from error
    return read_shape(found.to_dict(), where=name)


def planning_cost(config: ModelConfig) -> float:
    """`quadratic_cost` of this model, the same on every rank; the usual one where it is unknown."""
    try:
        return model_shape(config).quadratic_cost(learned_share=_LEARNED_SHARE)
    except UsageError:
        return QUADRATIC_COST


def figure_lines(
    figures: PlanFigures, *, report: dict[str, int], world_size: int, epochs: int, steps: int
) -> list[str]:
    """The figures as an aligned table.

    Args:
        figures: of one epoch.
        report: `rows`, `learned_tokens` and the like of the token cache.
        world_size: ranks.
        epochs: of the run.
        steps: of the whole run.
    """
    packs = figures.micro_batches
    rows: Sequence[tuple[str, str]] = (
        ("rows", f"{report['rows']:,} read, {report['refused']:,} refused or dropped"),
        ("samples", f"{figures.documents:,}, the longest {figures.longest:,} tokens"),
        (
            "packs",
            f"{packs:,} micro-batches of up to {figures.largest_tokens:,} tokens, "
            f"{figures.documents / max(1, packs):.1f} samples each",
        ),
        ("steps", f"{figures.steps:,} per epoch, {steps:,} in all ({epochs} epochs)"),
        (
            "rounds",
            f"up to {figures.most_rounds} micro-batches per step on each of {world_size} ranks, "
            f"{figures.empty_micro_batches:,} empty ones per epoch",
        ),
        ("fill", f"{figures.fill:.1%} of the token budget, {figures.padding:.1%} padding"),
        ("idle", f"{figures.idle:.2%} of the time ranks wait for the slowest one"),
        (
            "tokens",
            f"{figures.tokens:,} per epoch, of which {report['learned_tokens']:,} learned"
            + (f"; {figures.shared_tokens:,} shared ones saved" if figures.shared_tokens else ""),
        ),
    )
    return [f"{name:<10}{text}" for name, text in rows]
