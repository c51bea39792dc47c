"""Weights that were left in their files at the start: each rank reads its own rows of them."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from verl_sft.distributed.reduce import together
from verl_sft.distributed.setup import World
from verl_sft.distributed.sharding import rows_of, with_rows
from verl_sft.errors import UsageError
from verl_sft.model.build import BuiltModel
from verl_sft.model.meta import Slot, read_rows


def wants_meta(meta_start: str, *, world: World) -> bool:
    """Whether to try; `auto` does where there is more than one rank to share the model."""
    return meta_start == "true" or (meta_start == "auto" and world.shard_size > 1)


def check_start(built: BuiltModel, *, meta_start: str) -> None:
    """Raise if the start without weights was demanded and is not possible.

    Raises:
        UsageError: with the reason.
    """
    if meta_start == "true" and built.whole_because:
        raise UsageError(
            "engine.meta_start=true is not possible here",
            why=f"This model cannot be read row by row: {built.whole_because}",
            fix="Use engine.meta_start=auto",
        )


def fill(slots: Iterable[Slot], *, world: World, offload: bool) -> None:
    """Read this rank's rows of each slot of a sharded model; call it before the first forward.

    Raises:
        UsageError: on every rank, if any rank could not read.
    """
    device = "cpu" if offload else world.device
    with together(world):
        for slot in slots:
            rows = slot.parameter.shape[0]
            own = rows_of(world.shard_rank, size=world.shard_size, rows=rows)
            whole = with_rows(slot.parameter, read_rows(slot, *own).to(device))
            slot.assign(nn.Parameter(whole, requires_grad=slot.parameter.requires_grad))
