"""Parameters of which a rank computes with its own rows only: FSDP neither gathers nor sums them.

At rest they are what FSDP would make of them: optimizer, checkpoint and export see no difference.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from verl_sft.distributed.setup import World
from verl_sft.distributed.sharding import local, rows_of, with_rows


def divide(modules: Sequence[nn.Module], *, world: World) -> None:
    """Leave of the `weight` of each module this rank's rows; tied ones stay tied."""
    divided: dict[int, nn.Parameter] = {}
    wholes = [module.weight for module in modules]
    for module, whole in zip(modules, wholes, strict=True):
        assert isinstance(whole, nn.Parameter)
        if id(whole) not in divided:
            divided[id(whole)] = _own_rows(whole, world=world)
        module.weight = divided[id(whole)]


def _own_rows(whole: nn.Parameter, *, world: World) -> nn.Parameter:
    low, high = rows_of(world.shard_rank, size=world.shard_size, rows=len(whole))
    rows = whole.detach()[low:high].clone()
    mesh = world.mesh
    sharded = DTensor.from_local(
        rows if rows.is_meta else rows.to(world.device),
        mesh,
        [*[Replicate()] * (mesh.ndim - 1), Shard(0)],
        run_check=False,
        shape=whole.shape,
        stride=whole.stride(),
    )
    return nn.Parameter(sharded, requires_grad=whole.requires_grad)


class DividedGradients:
    """Adds up gradients over micro-batches in float32 and, behind the last, over replicas.

    Args:
        modules: whose `weight` is divided.
        world: the ranks.
    """

    def __init__(self, modules: Sequence[nn.Module], *, world: World) -> None:
        self.last = True  # micro-batch of its step
        self._modules = modules
        self._sums: dict[nn.Parameter, torch.Tensor] = {}
        self._replicas = world.mesh.get_group("replica") if world.num_replicas > 1 else None

    def parameters(self) -> set[nn.Parameter]:
        """What is divided, as it is now."""
        return {module.weight for module in self._modules}  # type: ignore[misc]

    def watch(self) -> None:
        """Collect the gradients of the parameters that are there now."""
        for parameter in self.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._collect)  # type: ignore[no-untyped-call]

    def _collect(self, parameter: torch.Tensor) -> None:
        assert isinstance(parameter, nn.Parameter) and parameter.grad is not None
        total = local(parameter.grad).float()
        parameter.grad = None
        if parameter in self._sums:
            total += self._sums.pop(parameter)
        if not self.last:
            self._sums[parameter] = total
            return
        if self._replicas is not None:
            dist.all_reduce(total, group=self._replicas)
        assert isinstance(parameter.data, DTensor)
        parameter.grad = with_rows(parameter.data, total.to(parameter.dtype))
