"""Faster code for the decoder layers: torch's compiler, or the kernels of liger-kernel."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from functools import wraps
from inspect import unwrap
from typing import Any

import torch
from torch import nn

from verl_sft.errors import MissingExtraError, UsageError


def compile_layers(causal: Any, *, layers: Sequence[nn.Module], backend: str = "inductor") -> None:
    """Compile each decoder layer once, for all lengths and any number of documents.

    Attention is left out: it reads document boundaries as plain numbers, and a graph for every
    set of them would be compiled. Call it before sharding, whose hooks then stay outside.

    Args:
        causal: the transformers model.
        layers: its decoder layers.
        backend: of `torch.compile`.

    Raises:
        UsageError: there is no C++ compiler for the CPU.
    """
    from transformers import AttentionInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if backend == "inductor" and not (torch.cuda.is_available() or find_compiler()):
        raise UsageError(
            "engine.use_torch_compile needs a C++ compiler",
            why="Neither c++, g++ nor clang++ is on the PATH",
            fix="Install one, or leave engine.use_torch_compile at its default",
        )
    name = causal.config._attn_implementation
    function = ALL_ATTENTION_FUNCTIONS.get(name)
    if function is not None:
        disable: Any = torch.compiler.disable
        AttentionInterface.register(name, disable(function))
    compiled: dict[type, type] = {}
    for layer in layers:
        cls = type(layer)
        if cls not in compiled:  # a subclass: recomputation is put around what it compiles
            forward = torch.compile(unwrap(cls.forward), backend=backend, dynamic=True)
            compiled[cls] = type(cls.__name__, (cls,), {"forward": wraps(cls.forward)(forward)})
        layer.__class__ = compiled[cls]


def use_liger(causal: Any, *, device: torch.device) -> None:
    """Put liger-kernel's norm, MLP and rotary kernels into this model; the loss stays ours.

    Raises:
        UsageError: no GPU, or a model that it does not know.
        MissingExtraError: liger-kernel is not installed.
    """
    if device.type != "cuda":
        raise UsageError(
            "model.use_liger needs a GPU",
            why="Its kernels are written in Triton",
            fix="Leave model.use_liger at its default",
        )
    try:
        from liger_kernel.transformers import monkey_patch
    except ImportError as error:
        raise MissingExtraError("liger_kernel", "liger", why="model.use_liger needs it") from error
    kind = causal.config.model_type
    if kind not in monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise UsageError(
            f"model.use_liger: liger-kernel does not know models of type {kind}",
            fix="Leave model.use_liger at its default",
        )
    monkey_patch._apply_liger_kernel_to_instance(
        model=causal, fused_linear_cross_entropy=False, cross_entropy=False
    )


def find_compiler() -> str | None:
    """A C++ compiler's path, or None."""
    return next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
