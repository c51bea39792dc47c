"""One tokenised conversation, already shifted, so that no loss ever slices `[:, 1:]`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Int32Array = npt.NDArray[np.int32]
Float32Array = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class TokenizedSample:
    """The unit of shuffling, packing and loss; positions are implied, 0 to T-1.

    `input_ids`, `target_ids` (int32 [T]) and `weights` (float32 [T]) are aligned: the model reads
    `input_ids[t]`, must say `target_ids[t]`, and is held to it with `weights[t]` (0: context only).
    `spans` are the learned half-open ranges of positions t; `source` is `file:row` of the record;
    `labels` say what each target is (`data/kinds.py`, int32 [T]; None: nothing is known).

        text             <u> 2+2? <a> 4 <end>
        input_ids        <u> 2+2? <a> 4
        target_ids       2+2? <a> 4   <end>
        weights          0    0   1   1         spans ((2, 4),)
    """

    record_id: str
    input_ids: Int32Array
    target_ids: Int32Array
    weights: Float32Array
    source: str = ""
    spans: tuple[tuple[int, int], ...] = field(default=())
    labels: Int32Array | None = None

    def __post_init__(self) -> None:
        sizes = {len(self.input_ids), len(self.target_ids), len(self.weights)}
        assert len(sizes) == 1 and sizes != {0}, f"misaligned or empty sample: {sizes}"

    def __len__(self) -> int:
        return len(self.input_ids)

    def label_ids(self) -> Int32Array:
        """Labels of the targets, int32 [T]; zeros where nothing is known."""
        return np.zeros(len(self), dtype=np.int32) if self.labels is None else self.labels

    @property
    def num_learned(self) -> int:
        """Positions with a weight other than 0."""
        return int(np.count_nonzero(self.weights))


def make_sample(
    token_ids: Sequence[int] | Int32Array,
    *,
    weights: Sequence[float] | Float32Array,
    record_id: str = "",
    source: str = "",
) -> TokenizedSample:
    """Shift once.

    Args:
        token_ids: T+1 tokens of the whole text.
        weights: T+1 weights, `weights[i]` for having to produce `token_ids[i]`; the first token is
            never produced, so its weight is dropped.
        record_id: id of the record.
        source: `file:row` of the record.
    """
    ids = np.asarray(token_ids, dtype=np.int32)
    shifted = np.asarray(weights, dtype=np.float32)[1:]
    return TokenizedSample(
        record_id=record_id,
        input_ids=ids[:-1],
        target_ids=ids[1:],
        weights=shifted,
        source=source,
        spans=learned_spans(shifted),
    )


def learned_spans(weights: Float32Array) -> tuple[tuple[int, int], ...]:
    """Half-open ranges of consecutive positions whose weight is not 0."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], weights != 0, [0]))))
    return tuple((int(a), int(b)) for a, b in edges.reshape(-1, 2))
