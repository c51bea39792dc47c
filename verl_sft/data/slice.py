"""A batch cut into slices of neighbouring tokens, one for each rank that shares the batch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from verl_sft.data.collate import PADDING_DOCUMENT, PackedBatch


def slice_batch(batch: PackedBatch, *, part: int, parts: int) -> PackedBatch:
    """Slice `part` of `parts`: 1 row of T/parts tokens, where T is B*T padded until it divides.

    Targets and weights are shifted already, so each token is in exactly one slice with all that it
    needs, and sums over slices are those of the whole. What describes documents (`cu_seqlens`,
    `max_seqlen`, `num_documents`, `subtree_end`) stays that of the whole batch.

    Example: rows `[[0 1 2 3 4]]` of one document in two parts give the tokens `[[0 1 2]]` and
    `[[3 4 pad]]`, both with `cu_seqlens` `[0, 5, 6]`.
    """
    if parts == 1:
        return batch
    total = batch.input_ids.numel()
    missing = -total % parts
    size = (total + missing) // parts
    own = slice(part * size, (part + 1) * size)

    def cut(tensor: Tensor, filler: int) -> Tensor:
        return _padded(tensor, missing, filler)[own][None]

    bounds, longest = batch.cu_seqlens, batch.max_seqlen
    if missing:
        bounds = torch.cat((bounds, bounds.new_tensor([total + missing])))
        longest = max(longest, missing)
    positions = batch.position_ids.reshape(-1)
    positions = torch.cat((positions, torch.arange(missing, dtype=positions.dtype)))
    changed: dict[str, Any] = {
        "input_ids": cut(batch.input_ids, 0),
        "target_ids": cut(batch.target_ids, 0),
        "weights": cut(batch.weights, 0),
        "position_ids": positions[own][None],
        "labels": cut(batch.labels, 0),
        "document_ids": cut(batch.document_ids, PADDING_DOCUMENT),
        "cu_seqlens": bounds,
        "max_seqlen": longest,
        "parts": parts,
    }
    if batch.subtree_end is not None:
        ends = batch.subtree_end.reshape(-1)
        changed["subtree_end"] = torch.cat((ends, ends.new_full((missing,), total + missing)))
    return replace(batch, **changed)


def _padded(tensor: Tensor, missing: int, filler: int) -> Tensor:
    flat = tensor.reshape(-1)
    return torch.cat((flat, flat.new_full((missing,), filler)))
