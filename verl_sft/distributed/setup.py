"""One process group for every case: torchrun on GPUs, torchrun on CPU, or a plain process."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, Store
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from verl_sft.errors import UsageError

TIMEOUT = timedelta(minutes=30)  # the first rank may tokenise while the others wait


@dataclass(frozen=True)
class World:
    """Who this process is among the ranks."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one that speaks and writes."""
        return self.rank == 0


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
    """Join the process group (NCCL on GPUs, gloo on CPU) and build the data-parallel mesh.

    Args:
        wanted: `trainer.device`.
        store: rendezvous for tests that start their ranks themselves.
    """
    env = os.environ
    rank, size = int(env.get("RANK", 0)), int(env.get("WORLD_SIZE", 1))
    device = pick_device(wanted, env=env)
    if device.type == "cuda":
        torch.cuda.set_device(device)
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
    mesh = init_device_mesh(device.type, (size,), mesh_dim_names=("dp",))
    if rank == 0 and device.type == "cpu":
        ranks = "1 process" if size == 1 else f"{size} gloo ranks"
        print(f"no GPU is used: training with {ranks} on the CPU", flush=True)
    return World(rank=rank, size=size, device=device, mesh=mesh)
