"""What is kept of a forward pass for its backward: all of it, some, little, or in host memory.

Recomputation is per decoder layer, through torch's own checkpointing: `full` keeps a layer's input,
`selective` also the outputs of its matrix products and of attention, which cost the most to make.
"""

from __future__ import annotations

from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

_KEPT = ("aten::mm", "aten::addmm", "aten::linear")
_KEPT_ATTENTION = ("attention", "attn", "flash")  # in the name of an operation of any library
OFFLOAD_BYTES = 1 << 20  # smaller tensors cost more to move than they free


def recompute_activations(causal: Any, *, policy: str) -> None:
    """Let each decoder layer recompute its activations in the backward pass.

    Dropout draws the same numbers again, so losses and gradients stay those without recomputation.

    Args:
        causal: a transformers model.
        policy: `full` or `selective`.
    """
    options: dict[str, Any] = {"use_reentrant": False}
    if policy == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _keep)
    newer = getattr(causal, "activation_checkpointing_enable", None)  # the name since 5.2x
    (newer or causal.gradient_checkpointing_enable)(options)


def _keep(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = operation.name().partition(".")[0].lower()
    wanted = name in _KEPT or any(word in name.rpartition("::")[2] for word in _KEPT_ATTENTION)
    return CheckpointPolicy.MUST_SAVE if wanted else CheckpointPolicy.PREFER_RECOMPUTE


def offload_activations(layer: nn.Module, *, device: torch.device) -> None:
    """Let what the backward pass needs of `layer` wait in host memory, pinned beside a GPU.

    Parameters stay where they are. Call it before sharding; with recomputation, it moves what that
    keeps.
    """
    forward = layer.forward

    @wraps(forward)
    def offloaded(*args: Any, **kwargs: Any) -> Any:
        parameters = {p.untyped_storage().data_ptr() for p in layer.parameters()}
        with saved_tensors_hooks(partial(_pack, device, parameters), _unpack):
            return forward(*args, **kwargs)

    layer.forward = offloaded


def _pack(device: torch.device, parameters: set[int], tensor: Tensor) -> Any:
    small = tensor.numel() * tensor.element_size() < OFFLOAD_BYTES
    if tensor.device.type != device.type or small:
        return tensor
    if tensor.untyped_storage().data_ptr() in parameters:
        return tensor
    pinned = device.type == "cuda"
    host = torch.empty(tensor.size(), dtype=tensor.dtype, pin_memory=pinned)
    # On the stream that computes: the memory is reused behind the copy, and read back in order.
    host.copy_(tensor, non_blocking=pinned)
    return tensor.device, host


def _unpack(packed: Any) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    device, host = packed
    moved: Tensor = host.to(device, non_blocking=device.type == "cuda")
    return moved
