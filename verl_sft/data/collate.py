"""Samples -> one batch of tensors; packed and padded batches are the same type."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from tensordict import TensorClass

from verl_sft.data.sample import TokenizedSample

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
    """

    input_ids: torch.Tensor
    target_ids: torch.Tensor
    weights: torch.Tensor
    position_ids: torch.Tensor
    document_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int
    num_documents: int


def collate(
    rows: Sequence[Sequence[TokenizedSample]], *, pad_id: int, pad_to_multiple: int = 1
) -> PackedBatch:
    """Lay documents behind one another in their rows and pad the rows to one width.

    Args:
        rows: documents of each row; none at all gives one padding token of weight 0, so that a rank
            without work still runs the collectives.
        pad_id: id of padding inputs and targets; never weighted, so any id will do.
        pad_to_multiple: the width T is rounded up to it.

    Example: rows `[[a (3 tokens), b (2)], [c (4)]]` give
        document_ids  [[0, 0, 0, 1, 1], [2, 2, 2, 2, -1]]
        position_ids  [[0, 1, 2, 0, 1], [0, 1, 2, 3, 0]]
        cu_seqlens    [0, 3, 5, 9, 10]
    """
    used = max((sum(len(s) for s in row) for row in rows), default=0)
    width = -(-max(used, 1) // pad_to_multiple) * pad_to_multiple
    shape = (max(len(rows), 1), width)
    inputs = np.full(shape, pad_id, dtype=np.int64)
    targets = np.full(shape, pad_id, dtype=np.int64)
    weights = np.zeros(shape, dtype=np.float32)
    positions = np.zeros(shape, dtype=np.int64)
    documents = np.full(shape, PADDING_DOCUMENT, dtype=np.int32)
    bounds, count = [0], 0
    for index in range(shape[0]):
        at = 0
        for sample in rows[index] if index < len(rows) else ():
            place = (index, slice(at, at + len(sample)))
            inputs[place], targets[place] = sample.input_ids, sample.target_ids
            weights[place], positions[place] = sample.weights, np.arange(len(sample))
            documents[place] = count
            count, at = count + 1, at + len(sample)
            bounds.append(index * width + at)
        if at < width:
            positions[index, at:] = np.arange(width - at)
            bounds.append((index + 1) * width)
    return PackedBatch(
        input_ids=torch.from_numpy(inputs),
        target_ids=torch.from_numpy(targets),
        weights=torch.from_numpy(weights),
        position_ids=torch.from_numpy(positions),
        document_ids=torch.from_numpy(documents),
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
        max_seqlen=int(np.diff(bounds).max()),
        num_documents=count,
        batch_size=[],
    )
