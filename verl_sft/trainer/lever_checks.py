"""Which levers cannot work together, which have no effect, and how fp32 products are computed."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import torch

from verl_sft.config.train import TrainConfig
from verl_sft.distributed.reduce import from_main, together
from verl_sft.distributed.setup import World
from verl_sft.errors import MissingExtraError, UsageError
from verl_sft.model.kernels import find_compiler
from verl_sft.model.lora import needs_weights, wants_lora
from verl_sft.model.matmul import LEVELS, choose_level
from verl_sft.model.quantize import quantization_config
from verl_sft.safe_io import write_json

MATMUL_FILE = "fp32_matmul.json"  # in the run's directory: what `auto` chose


def check_levers(config: TrainConfig) -> None:
    """Refuse levers that cannot work, before anything is loaded.

    Raises:
        UsageError: naming the keys.
        MissingExtraError: a package that one of them needs.
    """
    model, engine = config.model, config.engine
    if model.use_liger and importlib.util.find_spec("liger_kernel") is None:
        raise MissingExtraError("liger_kernel", "liger", why="model.use_liger needs it")
    quantization_config(model)
    if model.neftune_noise_alpha and config.ulysses_sequence_parallel_size > 1:
        raise UsageError(
            "model.neftune_noise_alpha does not work with ulysses_sequence_parallel_size",
            why="A rank that holds a slice of a document does not know the document's length",
            fix="Use one of the two",
        )
    why = needs_weights(model)
    if engine.meta_start == "true" and why:
        raise UsageError(
            "engine.meta_start=true is not possible here", why=why, fix="Use engine.meta_start=auto"
        )
    if not engine.use_torch_compile:
        return
    if model.enable_gradient_checkpointing and model.checkpoint_policy == "selective":
        raise UsageError(
            "engine.use_torch_compile does not work with model.checkpoint_policy=selective",
            why="Compiled layers hide the operations that it selects",
            fix="Use model.checkpoint_policy=full",
        )
    if not torch.cuda.is_available() and find_compiler() is None:
        raise UsageError(
            "engine.use_torch_compile needs a C++ compiler",
            why="Neither c++, g++ nor clang++ is on the PATH",
            fix="Install one, or leave engine.use_torch_compile at its default",
        )


def idle_levers(config: TrainConfig, *, on_gpu: bool) -> list[str]:
    """A line for each lever that is set and has no effect beside the others."""
    model, engine = config.model, config.engine
    lines = []
    if model.enable_activation_offload and not on_gpu:
        lines.append(
            "model.enable_activation_offload has no effect: activations are in host memory already"
        )
    if model.checkpoint_policy != "full" and not model.enable_gradient_checkpointing:
        lines.append(
            "model.checkpoint_policy has no effect without model.enable_gradient_checkpointing"
        )
    if engine.fp32_matmul != "highest" and engine.dtype == "bf16":
        lines.append("engine.fp32_matmul has no effect with engine.dtype=bf16")
    settings = {
        "model.use_rslora": model.use_rslora,
        "model.use_dora": model.use_dora,
        "model.lora_init": model.lora_init != "default",
    }
    why = "without model.lora_rank"
    if model.lora_adapter_path is not None:
        why = "beside model.lora_adapter_path, which decides the adapters"
    if model.lora_adapter_path is not None or not wants_lora(model):
        lines.extend(f"{key} has no effect {why}" for key, given in settings.items() if given)
    if config.optim.loraplus_lr_ratio is not None and not wants_lora(model):
        lines.append("optim.loraplus_lr_ratio has no effect without model.lora_rank")
    return lines


def set_matmul(wanted: str, *, directory: Path, world: World, say: Callable[[str], None]) -> str:
    """Set the precision of fp32 products on every rank; returns it.

    `auto` measures once and leaves its choice in the run's directory: a resumed run takes the same.
    """
    level = wanted
    if wanted == "auto":
        with together(world):
            level = ""
            file = directory / MATMUL_FILE
            if world.is_main and file.is_file():
                level = str(json.loads(file.read_text("utf-8")).get("level"))
            if world.is_main and level not in LEVELS:
                level, line = choose_level(device=world.device)
                write_json(file, {"level": level, "why": line})
                say(line)
        level = from_main(level, world=world)
    torch.set_float32_matmul_precision(level)
    return level
