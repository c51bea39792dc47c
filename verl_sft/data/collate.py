"""Samples -> one batch of tensors; packed and padded batches are the same type."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from tensordict import TensorClass

from verl_sft.data.sample import TokenizedSample
from verl_sft.data.tree import build_trees, side_by_side

PADDING_DOCUMENT = -1


class PackedBatch(TensorClass["nocast"]):  # type: ignore[type-arg,name-defined]
    """Rows of documents. B rows, T tokens, N documents, S segments (documents and padding tails).

    Attributes:
        input_ids: int64 [B, T].
        target_ids: int64 [B, T], the token after each input (already shifted).
        weights: float32 [B, T], 0 for context and padding.
        position_ids: int64 [B, T], from 0 in each document and in each padding tail.
        document_ids: int32 [B, T], 0 to N-1 through the whole batch, -1 for padding.
        cu_seqlens: int32 [S+1], segment boundaries in the batch flattened to B*T.
        max_seqlen: tokens of the longest segment.
        num_documents: N.
        labels: int32 [B, T], what each target is (`data/kinds.py`).
        parts: in how many slices the batch was cut (`data/slice.py`); 1: it is whole.
        subtree_end: int64 [B, T], only where documents are token trees (`data/tree.py`): in the
            batch flattened to B*T, row q sees row k (k <= q) if and only if q < subtree_end[k].
    """

    input_ids: torch.Tensor
    target_ids: torch.Tensor
    weights: torch.Tensor
    position_ids: torch.Tensor
    document_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int
    num_documents: int
    labels: torch.Tensor
    parts: int = 1
    subtree_end: torch.Tensor | None = None


def collate(
    rows: Sequence[Sequence[TokenizedSample]],
    *,
    pad_id: int,
    share: bool = False,
) -> PackedBatch:
    """Lay documents behind one another in their rows and pad the rows to one width.

    Args:
        rows: documents of each row; none at all gives one padding token of weight 0, so that a rank
            without work still runs the collectives.
        pad_id: id of padding inputs and targets; never weighted, so any id will do.
        share: merge the samples of a row that begin alike; a document is then a tree of them.

    Example: rows `[[a (3 tokens), b (2)], [c (4)]]` give
        document_ids  [[0, 0, 0, 1, 1], [2, 2, 2, 2, -1]]
        position_ids  [[0, 1, 2, 0, 1], [0, 1, 2, 3, 0]]
        cu_seqlens    [0, 3, 5, 9, 10]
    """
    flat = [(build_trees if share else side_by_side)(row) for row in rows]
    width = max([1, *map(len, flat)])
    shape = (max(len(rows), 1), width)
    inputs = np.full(shape, pad_id, dtype=np.int64)
    targets = np.full(shape, pad_id, dtype=np.int64)
    weights = np.zeros(shape, dtype=np.float32)
    positions = np.zeros(shape, dtype=np.int64)
    labels = np.zeros(shape, dtype=np.int32)
    documents = np.full(shape, PADDING_DOCUMENT, dtype=np.int32)
    subtree_end = np.zeros(shape, dtype=np.int64)
    bounds, count = [0], 0
    for index in range(shape[0]):
        at, start = 0, index * width
        if index < len(flat):
            trees, at = flat[index], len(flat[index])
            place = (index, slice(0, at))
            inputs[place], targets[place] = trees.input_ids, trees.target_ids
            weights[place], positions[place] = trees.weights, trees.positions
            labels[place] = trees.labels
            documents[place], subtree_end[place] = trees.trees + count, trees.subtree_end + start
            ends = np.flatnonzero(np.diff(trees.trees, append=-1)) + 1
            bounds.extend((ends + start).tolist())
            count += len(ends)
        if at < width:
            positions[index, at:] = np.arange(width - at)
            subtree_end[index, at:] = start + width
            bounds.append(start + width)
    return PackedBatch(
        input_ids=torch.from_numpy(inputs),
        target_ids=torch.from_numpy(targets),
        weights=torch.from_numpy(weights),
        position_ids=torch.from_numpy(positions),
        document_ids=torch.from_numpy(documents),
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
        max_seqlen=int(np.diff(bounds).max()),
        num_documents=count,
        labels=torch.from_numpy(labels),
        subtree_end=torch.from_numpy(subtree_end) if share else None,
        batch_size=[],
    )
