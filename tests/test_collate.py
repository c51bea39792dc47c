"""Samples and batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_sft.data.collate import PADDING_DOCUMENT, collate
from verl_sft.data.sample import TokenizedSample, make_sample

PAD = 9


def sample(size: int, *, first: int = 10) -> TokenizedSample:
    return make_sample(range(first, first + size + 1), weights=[0.5] * (size + 1))


def test_a_sample_is_shifted_once() -> None:
    """Targets are the next tokens, and weights belong to targets."""
    made = make_sample([1, 2, 3, 4], weights=[9, 0, 1, 2])
    assert made.input_ids.tolist() == [1, 2, 3]
    assert made.target_ids.tolist() == [2, 3, 4]
    assert made.weights.tolist() == [0, 1, 2]
    assert made.spans == ((1, 3),)
    assert made.num_learned == 2


def test_misaligned_samples_cannot_exist() -> None:
    """Arrays of unequal length are our own bug."""
    ids = np.arange(3, dtype=np.int32)
    with pytest.raises(AssertionError):
        TokenizedSample("", ids, ids[:2], ids.astype(np.float32))


def test_the_documented_example() -> None:
    """Documents are numbered through the batch; positions restart; boundaries are flat."""
    batch = collate([[sample(3), sample(2)], [sample(4)]], pad_id=PAD)
    assert batch.document_ids.tolist() == [[0, 0, 0, 1, 1], [2, 2, 2, 2, -1]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 0]]
    assert batch.cu_seqlens.tolist() == [0, 3, 5, 9, 10]
    assert (batch.max_seqlen, batch.num_documents) == (4, 3)
    assert batch.input_ids.dtype == batch.position_ids.dtype == torch.int64
    assert batch.weights.dtype == torch.float32


def test_an_empty_micro_batch_is_one_token_without_weight() -> None:
    """A rank without work still has something to compute."""
    batch = collate([], pad_id=PAD)
    assert batch.input_ids.tolist() == [[PAD]]
    assert batch.weights.sum() == 0
    assert batch.num_documents == 0


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=4))
def test_collating_loses_and_invents_nothing(rows: list[list[int]]) -> None:
    """Each document comes back whole from its number; padding weighs nothing; segments agree."""
    made = [[sample(n, first=100 * i + 10 * j) for j, n in enumerate(row)]
            for i, row in enumerate(rows)]  # fmt: skip
    batch = collate(made, pad_id=PAD)
    documents = [s for row in made for s in row]
    assert batch.num_documents == len(documents)
    assert batch.input_ids.shape[1] == max(map(sum, rows))
    for number, document in enumerate(documents):
        mask = batch.document_ids == number
        assert batch.input_ids[mask].tolist() == document.input_ids.tolist()
        assert batch.target_ids[mask].tolist() == document.target_ids.tolist()
        assert batch.weights[mask].tolist() == document.weights.tolist()
        assert batch.position_ids[mask].tolist() == list(range(len(document)))
    padding = batch.document_ids == PADDING_DOCUMENT
    assert (batch.input_ids[padding] == PAD).all() and not batch.weights[padding].any()
    flat = batch.document_ids.flatten()
    for a, b in zip(batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist(), strict=True):
        assert len(set(flat[a:b].tolist())) == 1
    assert batch.cu_seqlens[-1] == flat.numel()
