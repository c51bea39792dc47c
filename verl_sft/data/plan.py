"""Which sample is read when, by which rank, in which micro-batch: a pure function.

Every rank computes the plan alone and all agree, so resuming needs only (epoch, step), and another
number of ranks replans from the same global batches.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from verl_sft.data.packing import check_lengths, pack

Row = tuple[int, ...]  # sample indices that lie behind one another in one row
MicroBatch = tuple[Row, ...]  # rows of one forward pass; (): this rank has nothing to do in it
Lengths = npt.NDArray[np.int64]

# Attention work of one token pair over the other work of one token: about 1 / (12 * hidden size).
QUADRATIC_COST = 1 / 16384

_WORTH_A_ROUND = 0.98  # of the time: gathering parameters once more is not free


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One optimizer step; `ranks[dp_rank]` has the same number of micro-batches for all ranks."""

    ranks: tuple[tuple[MicroBatch, ...], ...]

    @property
    def num_micro_batches(self) -> int:
        """Forward passes of each rank."""
        return len(self.ranks[0])

    def sample_indices(self) -> list[int]:
        """All samples of the global batch, ascending."""
        return sorted(i for rank in self.ranks for micro in rank for row in micro for i in row)


@dataclass(frozen=True, slots=True)
class EpochPlan:
    """All optimizer steps of one epoch."""

    steps: tuple[StepPlan, ...]


def plan_epoch(
    lengths: Lengths,
    *,
    seed: int,
    epoch: int,
    token_budget: int,
    train_batch_size: int,
    dp_size: int,
    packed: bool = True,
    micro_batch_size: int | None = None,
    shuffle: bool = True,
    quadratic_cost: float = QUADRATIC_COST,
    units: Lengths | None = None,
    shared: Lengths | None = None,
) -> EpochPlan:
    """Plan one epoch: shuffle, cut into global batches, pack each, balance it over the ranks.

    Which samples share a global batch depends on (seed, epoch, units) alone, never on lengths,
    ranks, packing or shared prefixes. Inside a batch, samples are packed into micro-batches of at
    most `token_budget` tokens, then spread so that micro-batches that run at the same time cost
    the same (cost of a document = length + quadratic_cost * length^2).

    Args:
        lengths: tokens of each sample, int64 [N].
        seed: of the run.
        epoch: counted from 0.
        token_budget: most tokens of one micro-batch, padding included.
        train_batch_size: samples per optimizer step over all ranks.
        dp_size: ranks that read different data.
        packed: one row of several documents; else one document per row, padded.
        micro_batch_size: most rows of a padded micro-batch (None: as many as fit).
        shuffle: False keeps the order of the data.
        quadratic_cost: see above.
        units: samples of one unit (neighbours with one number, int64 [N], ascending) stay
            neighbours in the order; None: each sample is its own.
        shared: tokens that each sample need not compute again when the sample before it is in the
            same row, int64 [N]; None: every sample is computed whole.

    Raises:
        InputError: a sample is longer than the budget.

    Example (one step, two ranks, two micro-batches each, at most 10 tokens per micro-batch):
        >>> plan = plan_epoch(np.array([5, 9, 3, 7, 4]), seed=0, epoch=0, token_budget=10,
        ...                   train_batch_size=5, dp_size=2, shuffle=False)
        >>> plan.steps[0].ranks
        ((((3, 2),), ((4,),)), (((1,),), ((0,),)))
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    check_lengths(sizes, budget=token_budget)
    order = np.arange(len(sizes))
    if shuffle:
        order = _shuffled(order if units is None else units, seed=seed, epoch=epoch)
    rows = None if packed else micro_batch_size or len(sizes)
    return EpochPlan(
        tuple(
            _plan_step(
                sizes,
                samples=np.sort(order[start : start + train_batch_size]),
                budget=token_budget,
                dp_size=dp_size,
                padded_rows=rows,
                quadratic=quadratic_cost,
                shared=shared,
            )
            for start in range(0, len(order), train_batch_size)
        )
    )


def validation_plan(
    lengths: Lengths,
    *,
    token_budget: int,
    dp_size: int,
    packed: bool = True,
    micro_batch_size: int | None = None,
    quadratic_cost: float = QUADRATIC_COST,
    shared: Lengths | None = None,
) -> StepPlan:
    """Every sample once, in any number of micro-batches: one `StepPlan` for the whole file.

    Raises:
        InputError: a sample is longer than the budget.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    return _plan_step(
        sizes,
        samples=np.arange(len(sizes)),
        budget=token_budget,
        dp_size=dp_size,
        padded_rows=None if packed else micro_batch_size or len(sizes),
        quadratic=quadratic_cost,
        shared=shared,
    )


def _shuffled(units: Lengths, *, seed: int, epoch: int) -> Lengths:
    """Sample indices in the order of their shuffled units."""
    # The raw bit stream is frozen by numpy's compatibility policy, `permutation` is not.
    count = int(units[-1]) + 1 if len(units) else 0
    stream = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(count)
    return np.argsort(np.asarray(stream)[units], kind="stable")


def _plan_step(
    lengths: Lengths,
    *,
    samples: Lengths,
    budget: int,
    dp_size: int,
    padded_rows: int | None,
    quadratic: float,
    shared: Lengths | None,
) -> StepPlan:
    sizes = lengths[samples]
    costs = sizes + quadratic * sizes * sizes
    if padded_rows is None:
        documents: list[Row] = [(i,) for i in samples.tolist()]
        if shared is not None:
            documents = _join(
                samples, lengths=lengths, shared=shared, budget=budget, dp_size=dp_size
            )
            sizes, costs = _joined_sizes(documents, lengths, shared, quadratic)
        bins = _bins(sizes, costs=costs, dp_size=dp_size, budget=budget)
        micros: list[MicroBatch] = [
            (tuple(i for m in members for i in documents[m]),) if members else ()
            for members in bins
        ]
        work = [float(costs[members].sum()) for members in bins]
    else:
        bins = _pad_groups(sizes, budget=budget, max_rows=padded_rows)
        micros = [tuple((int(i),) for i in samples[members]) for members in bins]
        work = [len(members) * float(costs[members].max()) for members in bins]
    return _deal(micros, work=work, dp_size=dp_size)


def _join(
    samples: Lengths, *, lengths: Lengths, shared: Lengths, budget: int, dp_size: int
) -> list[Row]:
    """Runs of neighbours that share tokens, within the budget and one rank's part of the work."""
    follows = np.diff(samples, prepend=-2) == 1
    fresh = lengths[samples] - np.where(follows, shared[samples], 0)
    limit = min(budget, -(-int(fresh.sum()) // dp_size))
    runs: list[list[int]] = []
    size = 0
    for place, index in enumerate(samples.tolist()):
        if follows[place] and shared[index] and size + fresh[place] <= limit:
            runs[-1].append(index)
            size += int(fresh[place])
        else:
            runs.append([index])
            size = int(lengths[index])
    return [tuple(run) for run in runs]


def _joined_sizes(
    runs: Sequence[Row], lengths: Lengths, shared: Lengths, quadratic: float
) -> tuple[Lengths, npt.NDArray[np.float64]]:
    """Tokens and cost of each run: a token pays for the tokens that it sees."""
    sizes = np.array([lengths[list(run)].sum() - shared[list(run[1:])].sum() for run in runs])
    pairs = [(lengths[list(run)] ** 2).sum() - (shared[list(run[1:])] ** 2).sum() for run in runs]
    return sizes, sizes + quadratic * np.array(pairs)


def _bins(
    sizes: Lengths, *, costs: npt.NDArray[np.float64], dp_size: int, budget: int
) -> list[list[int]]:
    """Bins of even cost; where that cannot be, because of few long samples, these go together."""
    even = _even(sizes, costs=costs, dp_size=dp_size, budget=budget)
    took = _WORTH_A_ROUND * _time(even, costs=costs, dp_size=dp_size)
    if dp_size == 1 or took * dp_size <= float(costs.sum()):
        return even
    sorted_ = _longest_first(sizes.tolist(), costs=costs.tolist(), dp_size=dp_size, budget=budget)
    return sorted_ if _time(sorted_, costs=costs, dp_size=dp_size) < took else even


def _longest_first(
    sizes: Sequence[int], *, costs: Sequence[float], dp_size: int, budget: int
) -> list[list[int]]:
    """Fill the bins of one round after the other, each with the costliest samples that are left.

    The round of the longest sample lasts as long as that sample alone, so it is the round in which
    to do as much of the other costly work as its bins hold.
    """
    left = sorted(range(len(sizes)), key=lambda i: (-costs[i], i))
    bins: list[list[int]] = []
    while left:
        roomiest = [(-budget, slot) for slot in range(dp_size)]
        members: list[list[int]] = [[] for _ in range(dp_size)]
        later = []
        for index in left:
            room, slot = roomiest[0]
            if sizes[index] > -room:
                later.append(index)
            else:
                heapq.heapreplace(roomiest, (room + sizes[index], slot))
                members[slot].append(index)
        bins += members
        left = later
    return bins


def _even(
    sizes: Lengths, *, costs: npt.NDArray[np.float64], dp_size: int, budget: int
) -> list[list[int]]:
    """Bins of even cost in as few rounds as can be; one more where that is much faster."""
    tokens, work = sizes.tolist(), costs.tolist()
    least = -(-int(sizes.sum()) // (budget * dp_size)) * dp_size
    even = _spread(tokens, costs=work, slots=least, budget=budget)
    if even is not None:
        return even
    full = pack(sizes, budget=budget)
    slots = -(-len(full) // dp_size) * dp_size
    if slots > least:
        even = _spread(tokens, costs=work, slots=slots, budget=budget)
    if even is not None:
        return even
    even = _spread(tokens, costs=work, slots=slots + dp_size, budget=budget)
    if even is None:
        return full
    slower = _WORTH_A_ROUND * _time(full, costs=costs, dp_size=dp_size)
    return even if _time(even, costs=costs, dp_size=dp_size) < slower else full


def _time(bins: Sequence[list[int]], *, costs: npt.NDArray[np.float64], dp_size: int) -> float:
    """How long rounds of `dp_size` bins take, each as long as its costliest bin."""
    work = sorted((float(costs[members].sum()) for members in bins), reverse=True)
    return sum(work[::dp_size])


def _spread(
    sizes: Sequence[int], *, costs: Sequence[float], slots: int, budget: int
) -> list[list[int]] | None:
    """Costliest sample first into the cheapest of `slots` bins; None where the budget forbids."""
    heap = [(0.0, slot) for slot in range(slots)]
    # Bins without room for the samples so far, the roomiest first: looked at again for smaller ones
    # only, or a large file would cost samples * bins.
    full: list[tuple[int, tuple[float, int]]] = []
    free = [budget] * slots
    bins: list[list[int]] = [[] for _ in range(slots)]
    for index in sorted(range(len(sizes)), key=lambda i: (-costs[i], i)):
        while full and -full[0][0] >= sizes[index]:
            heapq.heappush(heap, heapq.heappop(full)[1])
        while heap and free[heap[0][1]] < sizes[index]:
            bin_ = heapq.heappop(heap)
            heapq.heappush(full, (-free[bin_[1]], bin_))
        if not heap:
            return None
        cost, slot = heap[0]
        heapq.heapreplace(heap, (cost + costs[index], slot))
        bins[slot].append(index)
        free[slot] -= sizes[index]
    return bins


def _pad_groups(sizes: Lengths, *, budget: int, max_rows: int) -> list[list[int]]:
    """Neighbours in length share a micro-batch: rows * longest row stays within the budget."""
    groups: list[list[int]] = []
    for index in np.argsort(-sizes, kind="stable").tolist():
        room = groups and min(max_rows, budget // int(sizes[groups[-1][0]])) > len(groups[-1])
        if room:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def _deal(micros: Sequence[MicroBatch], *, work: Sequence[float], dp_size: int) -> StepPlan:
    """Costliest first, `dp_size` at a time, each to the rank with the least work so far.

    Micro-batches of one round run at the same time and wait for one another in every collective,
    so they are neighbours in cost.
    """
    ranks: list[list[MicroBatch]] = [[] for _ in range(dp_size)]
    load = [0.0] * dp_size
    order = sorted(range(len(micros)), key=lambda i: (-work[i], i))
    for start in range(0, max(len(order), 1), dp_size):
        round_ = order[start : start + dp_size]
        for place, rank in enumerate(sorted(range(dp_size), key=lambda r: (load[r], r))):
            if place < len(round_):
                ranks[rank].append(micros[round_[place]])
                load[rank] += work[round_[place]]
            else:
                ranks[rank].append(())
    return StepPlan(tuple(tuple(rank) for rank in ranks))
