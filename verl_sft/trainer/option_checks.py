"""What the config alone tells: options that cannot be, or cannot be together.

What needs files beside it is in `file_checks.py`, what needs the live model in `self_checks.py`,
and options that merely have no effect are told by `idle_options.py`.
"""

from __future__ import annotations

import importlib.util

import torch

from verl_sft.config.train import OptimConfig, TrainConfig
from verl_sft.distributed.setup import check_layout
from verl_sft.errors import MissingExtraError, UsageError
from verl_sft.export.upload import check_target
from verl_sft.model.kernels import find_compiler
from verl_sft.model.lora import needs_weights
from verl_sft.model.quantize import quantization_config
from verl_sft.model.ulysses import check_kernel
from verl_sft.trainer.best import check_metric
from verl_sft.trainer.env_eval import check_env_eval
from verl_sft.trainer.optimizers import build_optimizer, check_shards
from verl_sft.trainer.sharing import check_sharing


def check_options(config: TrainConfig, *, world_size: int) -> None:
    """Refuse settings that would otherwise be ignored, or that cannot work together.

    Raises:
        UsageError: naming the key.
        MissingExtraError: a package that one of them needs.
    """
    trainer = config.trainer
    if not trainer.default_local_dir:
        raise UsageError("trainer.default_local_dir is empty", fix="Name a directory for the run")
    check_levers(config)
    check_layout(
        world_size,
        sp_size=config.ulysses_sequence_parallel_size,
        fsdp_size=config.engine.fsdp_size,
    )
    if config.ulysses_sequence_parallel_size > 1:
        check_kernel(config.model.attn_implementation)
    shards = world_size if config.engine.fsdp_size == -1 else config.engine.fsdp_size
    check_shards(config.optim.optimizer, shard_size=min(shards, world_size))
    check_optimizer(config.optim)
    check_sharing(config)
    check_env_eval(trainer)
    check_metric(trainer)
    budget, longest = config.data.token_budget, config.data.max_length
    if budget < longest:
        raise UsageError(
            f"data.max_token_len_per_gpu={budget} is smaller than data.max_length={longest}",
            why="A sample of that length would fit into no micro-batch",
            fix=f"Use data.max_token_len_per_gpu={longest} or more",
        )
    if trainer.upload_uri and trainer.export:
        check_target(trainer.upload_uri, key="trainer.upload_uri")


def check_levers(config: TrainConfig) -> None:
    """Refuse levers that cannot work here.

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


def check_optimizer(config: OptimConfig) -> None:
    """Let the optimizer of torch make one step over a small matrix: its own checks, and its types.

    Raises:
        UsageError: an unknown optimizer, or an argument that it does not take.
        MissingExtraError: its library is not installed.
    """
    matrix = torch.nn.Parameter(torch.zeros(2, 2))
    matrix.grad = torch.zeros_like(matrix)
    optimizer = build_optimizer([{"params": [matrix], "weight_decay": 0.0}], config=config)
    if config.optimizer_impl != "torch.optim":
        return  # their kernels may need a GPU
    try:
        optimizer.step()
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(
            f"optim.optimizer={config.optimizer} fails with these settings: "
            f"{str(error).splitlines()[0].partition(' - got ')[0]}",
            fix="See optim.override_optimizer_config",
        ) from error
