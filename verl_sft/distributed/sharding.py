"""FSDP2 on every device: one unit per decoder layer, the rest with the root."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy
from torch.distributed.fsdp import fully_shard as _fully_shard
from torch.distributed.tensor import DTensor

from verl_sft.distributed.setup import World

if TYPE_CHECKING:
    from verl_sft.distributed.divided import DividedGradients


def compute_dtype(wanted: str, *, device: torch.device) -> torch.dtype:
    """`engine.dtype`; `auto` is bf16 where the device multiplies it in hardware, else fp32."""
    if wanted == "auto":
        wanted = "bf16" if _fast_bf16(device) else "fp32"
    return torch.bfloat16 if wanted == "bf16" else torch.float32


def _fast_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, name, bool)()) for name in names)


def shard(
    model: nn.Module,
    *,
    layers: Sequence[nn.Module],
    world: World,
    dtype: torch.dtype,
    reshard_after_forward: bool = True,
    offload: bool = False,
    whole: Iterable[nn.Parameter] = (),
    divided: DividedGradients | None = None,
) -> Any:
    """Shard `model` in place over the ranks; its gradients become plain sums over all ranks.

    Parameters keep their dtype, computation uses `dtype`, gradients are reduced in float32.
    Those of `whole` (frozen codes, which cannot be cast) stay as they are on every rank, those of
    `divided` with their rows.

    Returns:
        `model`, now also an `FSDPModule`.
    """
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    offloading = CPUOffloadPolicy() if offload and world.device.type == "cuda" else OffloadPolicy()
    options: dict[str, Any] = {
        "mesh": world.mesh,
        "mp_policy": policy,
        "offload_policy": offloading,
        "ignored_params": set(whole) | (divided.parameters() if divided else set()),
    }
    for layer in layers:
        _fully_shard(layer, reshard_after_forward=reshard_after_forward, **options)
    # Loss weights enter at the root; they must stay float32.
    options["mp_policy"] = replace(policy, cast_forward_inputs=False)
    root: Any = _fully_shard(model, reshard_after_forward=False, **options)
    # The loss is already divided by the global weight: a mean over ranks would be wrong.
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    root.keeps_gathered, root.divided = not reshard_after_forward, divided
    return root


def begin_micro_batch(model: Any, *, last: bool) -> None:
    """Add up gradients locally until the last micro-batch of a step, which reduces them.

    Where parameters stay gathered behind a forward pass they stay so between micro-batches too:
    one gathering per step instead of one for each.
    """
    model.set_requires_gradient_sync(last)
    if model.divided:
        model.divided.last = last
    if model.keeps_gathered:
        model.set_reshard_after_backward(last)


def reshard(model: nn.Module) -> None:
    """Put parameters back to their shards after a forward pass that had no backward.

    Until then `parameters()` gives the gathered copies, which neither optimizer nor checkpoint
    knows.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a sharded tensor; a plain tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def rows_of(rank: int, *, size: int, rows: int) -> tuple[int, int]:
    """Half-open range of the first dimension that `rank` of `size` holds (torch.chunk's rule)."""
    step = -(-rows // size)
    return min(rows, rank * step), min(rows, (rank + 1) * step)


def with_rows(parameter: DTensor, rows: torch.Tensor) -> DTensor:
    """A tensor that is sharded like `parameter` (a meta tensor, say), with these rows here."""
    return DTensor.from_local(
        rows,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def gather_full(tensor: torch.Tensor) -> torch.Tensor:
    """The whole tensor on the CPU; every rank must call it."""
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().cpu()
