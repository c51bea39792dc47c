"""One process group for every case: torchrun on GPUs, torchrun on CPU, or a plain process."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, Store
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from verl_sft.distributed.shape_caches import bound_shape_caches
from verl_sft.errors import UsageError

TIMEOUT = timedelta(minutes=30)  # the first rank may tokenise while the others wait


@dataclass(frozen=True)
class World:
    """Who this process is among the ranks, and with whom it shares what.

    Neighbours in rank share a micro-batch (`sp_size` of them, each with a slice of its tokens) and
    a copy of the parameters (`shard_size` of them, each with its rows).

    Attributes:
        rank: of this process.
        size: number of ranks.
        device: where this rank computes.
        mesh: of the parameters: (shards,), or (replicas, shards).
        sp_size: ranks that hold slices of one micro-batch.
        sp_group: those ranks; None where `sp_size` is 1.
    """

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh
    sp_size: int = 1
    sp_group: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one that speaks and writes."""
        return self.rank == 0

    @property
    def dp_size(self) -> int:
        """Micro-batches that are computed at the same time."""
        return self.size // self.sp_size

    @property
    def dp_rank(self) -> int:
        """Which of them is this rank's."""
        return self.rank // self.sp_size

    @property
    def sp_rank(self) -> int:
        """Which slice of it is this rank's."""
        return self.rank % self.sp_size

    @property
    def shard_size(self) -> int:
        """Ranks that hold one copy of the parameters together."""
        return int(self.mesh.shape[-1])

    @property
    def shard_rank(self) -> int:
        """Which rows of it are this rank's."""
        return self.rank % self.shard_size

    @property
    def replica(self) -> int:
        """Which copy of the parameters this rank has a part of."""
        return self.rank // self.shard_size

    @property
    def num_replicas(self) -> int:
        """Copies of the parameters."""
        return self.size // self.shard_size


def pick_device(wanted: str, *, env: Mapping[str, str]) -> torch.device:
    """The device of this rank: its GPU where there are any, else the CPU.

    Raises:
        UsageError: CUDA is wanted and absent, or there are fewer GPUs than ranks on this machine.
    """
    num_gpus = torch.cuda.device_count() if wanted != "cpu" else 0
    if wanted == "cuda" and not num_gpus:
        raise UsageError("trainer.device=cuda, and no GPU is visible", fix="Use trainer.device=cpu")
    if not num_gpus:
        return torch.device("cpu")
    local_size, local_rank = int(env.get("LOCAL_WORLD_SIZE", 1)), int(env.get("LOCAL_RANK", 0))
    if local_size > num_gpus:
        raise UsageError(
            f"{local_size} ranks are asked for, and {num_gpus} GPUs are visible",
            fix=f"Start at most {num_gpus}, or use trainer.device=cpu",
        )
    return torch.device("cuda", local_rank)


def setup_world(wanted: str = "auto", *, store: Store | None = None) -> World:
    """Join the process group (NCCL on GPUs, gloo on CPU) and build the mesh over all ranks.

    Args:
        wanted: `trainer.device`.
        store: rendezvous for tests that start their ranks themselves.
    """
    env = os.environ
    rank, size = int(env.get("RANK", 0)), int(env.get("WORLD_SIZE", 1))
    device = pick_device(wanted, env=env)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        bound_shape_caches(env)
    if not dist.is_initialized():
        if store is None and "MASTER_ADDR" not in env:
            rank, size, store = 0, 1, HashStore()
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=rank,
            world_size=size,
            timeout=TIMEOUT,
            device_id=device if device.type == "cuda" else None,
        )
    rank, size = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh(device.type, (size,), mesh_dim_names=("shard",))
    if rank == 0 and device.type == "cpu":
        ranks = "1 process" if size == 1 else f"{size} gloo ranks"
        print(f"no GPU is used: training with {ranks} on the CPU", flush=True)
    return World(rank=rank, size=size, device=device, mesh=mesh)


def check_layout(size: int, *, sp_size: int, fsdp_size: int) -> None:
    """Raise if the ranks cannot be divided so.

    Raises:
        UsageError: naming the key.
    """
    wanted = {"ulysses_sequence_parallel_size": sp_size}
    if fsdp_size != -1 and fsdp_size < size:
        wanted["engine.fsdp_size"] = fsdp_size
    for key, parts in wanted.items():
        if parts < 1 or size % parts:
            fitting = ", ".join(str(n) for n in range(1, size + 1) if size % n == 0)
            raise UsageError(
                f"{key}={parts} does not divide the {size} ranks", fix=f"Use one of: {fitting}"
            )


def arrange(world: World, *, sp_size: int, fsdp_size: int) -> World:
    """The same ranks with groups for sequence parallelism and for replicas of the parameters.

    Args:
        world: all ranks in one group; every rank must call.
        sp_size: ranks that share a micro-batch.
        fsdp_size: ranks that share a copy of the parameters; -1, or as many as there are: all.

    Raises:
        UsageError: the number of ranks does not divide.
    """
    check_layout(world.size, sp_size=sp_size, fsdp_size=fsdp_size)
    kind, mesh, group = world.device.type, world.mesh, None
    if fsdp_size != -1 and fsdp_size < world.size:
        shape = (world.size // fsdp_size, fsdp_size)
        mesh = init_device_mesh(kind, shape, mesh_dim_names=("replica", "shard"))
    if sp_size > 1:
        shape = (world.size // sp_size, sp_size)
        group = init_device_mesh(kind, shape, mesh_dim_names=("dp", "sp")).get_group("sp")
    return replace(world, mesh=mesh, sp_size=sp_size, sp_group=group)
