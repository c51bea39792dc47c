"""Whether this run computes the prefixes that its samples share only once (`data/tree.py`)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from verl_sft.config.train import TrainConfig
from verl_sft.data.joined import JoinedStore
from verl_sft.data.store import SampleStore
from verl_sft.data.tree import Int64Array, neighbour_units, shared_lengths
from verl_sft.errors import UsageError
from verl_sft.model.tree_attention import probe_trees

LEAST_SAVED = 0.05  # of the tokens; below it, `auto` keeps the samples apart
_KERNELS = ("auto", "split", "varlen")


def obstacle(config: TrainConfig) -> str:
    """Why no prefixes can be shared under these settings; empty if they can."""
    if not config.use_remove_padding:
        return "use_remove_padding=false gives every sample a row of its own"
    if config.engine.use_torch_compile:
        return "engine.use_torch_compile=true would compile anew for every tree"
    if config.model.neftune_noise_alpha:
        return "model.neftune_noise_alpha adds other noise to each sample"
    if config.model.attn_implementation not in _KERNELS:
        return f"model.attn_implementation={config.model.attn_implementation} knows no trees"
    return ""


def check_sharing(config: TrainConfig) -> None:
    """Refuse `data.prefix_sharing=true` where it cannot be.

    Raises:
        UsageError: naming the other key.
    """
    why = obstacle(config)
    if config.data.prefix_sharing == "true" and why:
        raise UsageError(
            "data.prefix_sharing=true is not possible here", why=why, fix="Use auto or false"
        )


def shuffle_units(config: TrainConfig, store: SampleStore | JoinedStore) -> Int64Array:
    """Number of the unit of each sample: what `data.shuffle_unit` keeps together, int64 [N]."""
    units = store.units()
    return units if config.data.shuffle_unit == "conversation" else neighbour_units(store, units)


def shared_tokens(
    config: TrainConfig, store: SampleStore, *, units: Int64Array, on_gpu: bool
) -> Int64Array | None:
    """What `plan_epoch` needs to merge samples, or None where this run keeps them apart.

    `auto` merges on the CPU, where the gain is measured, if it saves at least `LEAST_SAVED`.
    """
    wanted = config.data.prefix_sharing
    if wanted == "false" or obstacle(config) or (wanted == "auto" and on_gpu):
        return None
    shared = shared_lengths(store, units=units)
    few = shared.sum() < LEAST_SAVED * store.lengths.sum()
    return None if wanted == "auto" and few else shared


def missed_sharing(config: TrainConfig, store: SampleStore, *, on_gpu: bool) -> str:
    """A line for a run that computes what it could share, and why; empty where that is little."""
    why = obstacle(config)
    if on_gpu and not why:
        why = "it is not yet measured on CUDA (data.prefix_sharing=true shares)"
    if config.data.prefix_sharing != "auto" or not why:
        return ""
    saved = shared_lengths(store, units=store.units()).sum() / max(store.lengths.sum(), 1)
    if saved < LEAST_SAVED:
        return ""
    return f"prefix sharing would save {saved:.0%} of the tokens: {why}"


def without_sharing(config: TrainConfig) -> TrainConfig:
    """The same run with every sample computed whole: same batches, same losses."""
    return replace(config, data=replace(config.data, prefix_sharing="false"))


def prove_sharing(
    config: TrainConfig, *, model: Any, device: torch.device, half: bool, vocab_size: int
) -> tuple[bool, str]:
    """Whether the real model computes trees as it computes their samples, and a line that says so.

    Raises:
        UsageError: it does not, and `data.prefix_sharing=true`.
    """
    try:
        apart = probe_trees(model, device=device, half=half, vocab_size=vocab_size)
    except UsageError as error:
        if config.data.prefix_sharing == "true":
            raise
        return False, f"prefix sharing is off: {error}"
    return True, f"prefix sharing: trees equal separate samples within {apart:.1e}"
