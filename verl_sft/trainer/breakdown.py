"""The loss of a step by kind of token, by turn and by source, out of the same forward passes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from verl_sft.data.collate import PackedBatch
from verl_sft.data.kinds import KINDS, LAST_TURN, SOURCE, TURN

_TURNS = TURN  # room for turn numbers; LAST_TURN is the highest in use
_SIZE = len(KINDS) + _TURNS


class LossParts:
    """Sums of weight * loss and of weight, per part; sums over ranks are exact sums.

    Args:
        groups: names of the sources, in the order of their numbers in the labels.
        device: where losses come from.
    """

    def __init__(self, groups: Sequence[str], *, device: torch.device) -> None:
        self.groups = tuple(groups)
        size = _SIZE + max(len(self.groups), 1)
        self._sums = torch.zeros(2, size, dtype=torch.float64, device=device)

    def add(self, batch: PackedBatch, losses: Tensor | None) -> None:
        """Add the learned rows of a micro-batch.

        Args:
            batch: the micro-batch, on any device.
            losses: float32 [N], unweighted loss of each learned row; None: the model keeps none.
        """
        weights = batch.weights.reshape(-1)
        learned = weights != 0
        weights, labels = weights[learned], batch.labels.reshape(-1)[learned].long()
        if losses is None or len(losses) != len(weights) or not len(weights):
            return  # a rank without learned tokens passes a row of weight 0 through the model
        weights, labels = weights.double().to(losses.device), labels.to(losses.device)
        values = torch.stack((weights * losses.double(), weights))
        within = labels % SOURCE
        places = (within % TURN, len(KINDS) + within // TURN, _SIZE + labels // SOURCE)
        for place in places:
            self._sums.index_add_(1, place, values)

    def values(self) -> list[float]:
        """This rank's sums, to be added over ranks."""
        return list(self._sums.reshape(-1).tolist())

    def named(self, values: Sequence[float], *, prefix: str) -> dict[str, float]:
        """Mean losses by name out of the sums of all ranks; parts without weight are left out.

        A single source is the whole loss and is not repeated.
        """
        half = len(values) // 2
        names = [f"loss_kind/{name}" for name in KINDS]
        names += [f"loss_turn/{n}{'+' if n == LAST_TURN else ''}" for n in range(_TURNS)]
        if len(self.groups) > 1:
            names += [f"loss_source/{name}" for name in self.groups]
        pairs = zip(values[:half], values[half:], strict=True)
        return {
            f"{prefix}{name}": loss / weight
            for name, (loss, weight) in zip(names, pairs, strict=False)
            if weight
        }
