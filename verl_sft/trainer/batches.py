"""What the loop needs of a batch: its sums for the normaliser, its tensors for the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from verl_sft.data.collate import PackedBatch

_MODEL_INPUTS = (
    "input_ids",
    "target_ids",
    "weights",
    "position_ids",
    "cu_seqlens",
    "max_seqlen",
    "subtree_end",
    "parts",
)


def counts(batches: Sequence[PackedBatch]) -> tuple[float, float, float]:
    """Sum of weights, number of document tokens, number of learned tokens."""
    return (
        sum(float(b.weights.sum(dtype=torch.float64)) for b in batches),
        float(sum(int((b.document_ids >= 0).sum()) for b in batches)),
        float(sum(int(b.weights.count_nonzero()) for b in batches)),
    )


def model_inputs(batch: PackedBatch, device: torch.device) -> dict[str, Any]:
    """Arguments of the `LossModel`, on its device."""
    moved = batch.to(device, non_blocking=True) if device.type == "cuda" else batch
    return {name: getattr(moved, name) for name in _MODEL_INPUTS}
