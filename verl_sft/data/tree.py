"""Samples that begin alike, flattened into token trees: what they share is computed once.

A view of a conversation repeats the history of the views before it; samples of one task repeat its
prompt. Each token of a tree attends to its ancestors only and has the position that it has in its
samples, so losses and gradients are those of the separate samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np
import numpy.typing as npt

from verl_sft.data.sample import Float32Array, Int32Array, TokenizedSample

# Shorter common beginnings stay apart: a branch costs one more attention call.
MIN_SHARED = 16

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class TokenTrees:
    """Trees behind one another, each depth first; T tokens.

    Attributes:
        input_ids: int32 [T].
        target_ids: int32 [T].
        weights: float32 [T], summed over the samples that learn the token's target.
        positions: int64 [T], depth in the tree.
        subtree_end: int64 [T], end of the token's descendants: row q sees row k (k <= q) if and
            only if q < subtree_end[k].
        trees: int64 [T], number of the tree, from 0.
        labels: int32 [T], of a sample that learns the token's target.
    """

    input_ids: Int32Array
    target_ids: Int32Array
    weights: Float32Array
    positions: Int64Array
    subtree_end: Int64Array
    trees: Int64Array
    labels: Int32Array

    def __len__(self) -> int:
        return len(self.input_ids)


class Samples(Protocol):
    """Stored samples."""

    def input_ids(self, index: int) -> Int32Array:
        """Of one of them."""


def build_trees(samples: Sequence[TokenizedSample], *, min_shared: int = MIN_SHARED) -> TokenTrees:
    """Merge the common beginnings (of `min_shared` tokens or more) of any samples.

    A row has one target. Where samples part behind a token whose target is learned, the next
    sample repeats that token as the first of its branch: same id, same context, same position.

    Example (the second `b` is there because both `c` and `d` are learned):
        samples       a b c<end>   a b d e<end>      all tokens learned, min_shared=1
        input_ids     a b d e b c
        target_ids    b d e . c .
        weights       2 1 1 1 1 1
        positions     0 1 2 3 1 2
        subtree_end   6 4 4 4 6 6
    """
    order = _depth_first(samples)
    room = sum(map(len, order))
    ids, targets = np.empty(room, dtype=np.int32), np.empty(room, dtype=np.int32)
    weights, labels = np.zeros(room, dtype=np.float32), np.zeros(room, dtype=np.int32)
    positions, subtree_end, trees = np.empty((3, room), dtype=np.int64)
    # Rows of the sample before; their targets are its targets, so only the last may differ below.
    path = np.empty(0, dtype=np.int64)
    before, stop, count = np.empty(0, dtype=np.int32), 0, 0
    for sample in order:
        shared = common_length(before, sample.input_ids)
        if shared < min_shared:
            shared, count = 0, count + 1
        elif targets[path[shared - 1]] != sample.target_ids[shared - 1]:
            if weights[path[shared - 1]]:
                shared -= 1
            else:
                targets[path[shared - 1]] = sample.target_ids[shared - 1]
        start, stop = stop, stop + len(sample) - shared
        ids[start:stop] = sample.input_ids[shared:]
        targets[start:stop] = sample.target_ids[shared:]
        positions[start:stop] = np.arange(shared, len(sample))
        trees[start:stop] = count - 1
        path = np.concatenate((path[:shared], np.arange(start, stop)))
        weights[path] += sample.weights
        learned = sample.weights != 0
        labels[path[learned]] = sample.label_ids()[learned]
        subtree_end[path] = stop
        before = sample.input_ids
    return TokenTrees(
        ids[:stop], targets[:stop], weights[:stop], positions[:stop], subtree_end[:stop],
        trees[:stop], labels[:stop],
    )  # fmt: skip


def _depth_first(samples: Sequence[TokenizedSample]) -> list[TokenizedSample]:
    """Samples that share more are nearer; where they part, the longest comes first.

    A trunk is then one run of rows, which attention without a mask can take at once.
    """
    found = sorted(samples, key=lambda sample: sample.input_ids.astype(">u4").tobytes())
    common = [common_length(a.input_ids, b.input_ids) for a, b in pairwise(found)]
    order, waiting = [], [(0, len(found))] if found else []
    while waiting:
        start, stop = waiting.pop()
        if stop - start == 1:
            order.append(found[start])
            continue
        least = min(common[start : stop - 1])
        cuts = [start, *(i + 1 for i in range(start, stop - 1) if common[i] == least), stop]
        waiting.extend(sorted(pairwise(cuts), key=lambda g: max(map(len, found[g[0] : g[1]]))))
    return order


def side_by_side(samples: Sequence[TokenizedSample]) -> TokenTrees:
    """Every sample whole, in the given order, a tree of its own without branches."""
    lengths = np.array([len(sample) for sample in samples], dtype=np.int64)
    ends = lengths.cumsum()
    return TokenTrees(
        np.concatenate([s.input_ids for s in samples]),
        np.concatenate([s.target_ids for s in samples]),
        np.concatenate([s.weights for s in samples]),
        np.arange(int(lengths.sum())) - np.repeat(ends - lengths, lengths),
        np.repeat(ends, lengths),
        np.repeat(np.arange(len(samples)), lengths),
        np.concatenate([s.label_ids() for s in samples]),
    )


def shared_lengths(
    samples: Samples, *, units: Int64Array, min_shared: int = MIN_SHARED
) -> Int64Array:
    """What a tree saves at least for each sample that comes behind the one before it, int64 [N].

    0 for the first of a unit. One token less than the common beginning: the last may be repeated.
    """
    shared = np.zeros(len(units), dtype=np.int64)
    for index in (np.flatnonzero(np.diff(units, prepend=-1) == 0)).tolist():
        common = common_length(samples.input_ids(index - 1), samples.input_ids(index))
        shared[index] = common - 1 if common >= min_shared else 0
    return shared


def neighbour_units(samples: Samples, units: Int64Array) -> Int64Array:
    """Join units (int64 [N], ascending) whose neighbours share at least half of the shorter one."""
    starts = np.diff(units, prepend=-1)
    for index in np.flatnonzero(starts[1:]).tolist():
        one, other = samples.input_ids(index), samples.input_ids(index + 1)
        starts[index + 1] = 2 * common_length(one, other) < min(len(one), len(other))
    joined: Int64Array = starts.cumsum() - starts[:1]
    return joined


def common_length(one: Int32Array, other: Int32Array) -> int:
    """Tokens with which both begin.

    Example:
        >>> common_length(np.array([4, 5, 6]), np.array([4, 5, 7, 8]))
        2
    """
    size = min(len(one), len(other))
    differ = one[:size] != other[:size]
    first = int(differ.argmax()) if size else 0
    return first if size and differ[first] else size
