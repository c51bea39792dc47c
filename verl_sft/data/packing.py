"""Best-fit packing of documents into rows under a hard token budget."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from verl_sft.errors import InputError


def pack(lengths: npt.NDArray[np.int64] | Sequence[int], *, budget: int) -> list[list[int]]:
    """Put every document into a bin of at most `budget` tokens, longest first, tightest bin first.

    Best-fit decreasing, grouped: only the distinct free spaces are kept sorted, and documents of
    one length fill a bin together, so a million documents take about a second. Deterministic;
    equal lengths keep their order.

    Args:
        lengths: tokens of each document, [N].
        budget: most tokens of a bin.

    Returns:
        Indices of the documents of each bin; every index once.

    Raises:
        InputError: a document is longer than the budget, or empty.

    Example:
        >>> pack([5, 9, 3, 2, 4], budget=10)
        [[1], [0, 4], [2, 3]]
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    check_lengths(sizes, budget=budget)
    order = np.argsort(-sizes, kind="stable")
    ordered = sizes[order]
    starts = np.flatnonzero(np.diff(ordered, prepend=-1)).tolist()
    indices, ends = order.tolist(), [*starts[1:], len(ordered)]
    bins: list[list[int]] = []
    spaces: list[int] = []  # distinct free spaces > 0, ascending
    holders: dict[int, list[int]] = {}  # free space -> bins that have it
    for start, end in zip(starts, ends, strict=True):
        length = int(ordered[start])
        cursor = start
        while cursor < end:
            at = bisect_left(spaces, length)
            if at == len(spaces):
                free, target = budget, len(bins)
                bins.append([])
            else:
                free = spaces[at]
                target = holders[free].pop()
                if not holders[free]:
                    del holders[free], spaces[at]
            # The bin that was tightest stays the tightest that fits until it is full.
            count = min(free // length, end - cursor)
            bins[target].extend(indices[cursor : cursor + count])
            cursor += count
            left = free - count * length
            if left in holders:
                holders[left].append(target)
            elif left:
                holders[left] = [target]
                insort(spaces, left)
    return bins


def check_lengths(lengths: npt.NDArray[np.int64], *, budget: int) -> None:
    """Refuse documents that no bin can hold.

    Raises:
        InputError: naming the first one.
    """
    for wrong, what in (
        (lengths > budget, f"more than the {budget} of a micro-batch"),
        (lengths < 1, "nothing to learn from"),
    ):
        if wrong.any():
            index = int(np.argmax(wrong))
            raise InputError(
                f"a sample has {lengths[index]} tokens, {what}",
                where=f"sample {index}",
                why=f"{int(wrong.sum())} of {len(lengths)} samples are so",
                fix="Raise data.max_token_len_per_gpu or lower data.max_length",
            )
