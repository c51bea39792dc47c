"""Options that are set and have no effect beside the others: said at the start, never silent."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from operator import attrgetter
from typing import Any

from verl_sft.config.train import TrainConfig
from verl_sft.model.lora import wants_lora
from verl_sft.trainer.optimizers import optimizer_class, takes

_ADAPTERS = (
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "exclude_modules",
    "target_parameters",
    "use_rslora",
    "use_dora",
    "lora_init",
)
_PAIRS = ("prompt_key", "response_key", "prompt_dict_keys", "response_dict_keys")


def idle_options(config: TrainConfig, *, on_gpu: bool, world_size: int) -> list[str]:
    """A line for each key that is set and has no effect beside the others.

    Args:
        config: of the run.
        on_gpu: whether it computes on one.
        world_size: number of ranks.
    """
    default = TrainConfig()

    def given(key: str) -> bool:
        return bool(attrgetter(key)(config) != attrgetter(key)(default))

    lines = ["engine.strategy=fsdp is read as fsdp2"] if config.engine.strategy == "fsdp" else []
    rules = [
        *_of_data(config),
        *_of_model(config, on_gpu=on_gpu),
        *_of_engine(config, on_gpu=on_gpu, world_size=world_size),
        *_of_optim(config),
        *_of_trainer(config),
    ]
    lines.extend(f"{key} has no effect{why}" for key, why in rules if given(key))
    return lines


Rules = Iterator[tuple[str, str]]  # a key that does nothing here, and the rest of the sentence


def _of_data(config: TrainConfig) -> Rules:
    data = config.data
    if data.multiturn.enable:
        yield from ((f"data.{name}", " with data.multiturn.enable=true") for name in _PAIRS)
    if not data.mongo.uri and not _names_database(data.train_files, data.val_files):
        yield from ((key, " without data.mongo.uri") for key in _leaves(data.mongo, "data.mongo."))
    if not data.val_size:
        yield "data.val_seed", " without data.val_size"


def _of_model(config: TrainConfig, *, on_gpu: bool) -> Rules:
    model = config.model
    if not on_gpu:
        yield "model.enable_activation_offload", ": activations are in host memory already"
    if not model.enable_gradient_checkpointing:
        yield "model.checkpoint_policy", " without model.enable_gradient_checkpointing"
    if model.lora_adapter_path is not None:
        why = " beside model.lora_adapter_path, which decides the adapters"
        yield from ((f"model.{name}", why) for name in ("lora_rank", *_ADAPTERS))
    elif not wants_lora(model):
        yield from ((f"model.{name}", " without model.lora_rank") for name in _ADAPTERS)


def _of_engine(config: TrainConfig, *, on_gpu: bool, world_size: int) -> Rules:
    if not on_gpu:
        yield "engine.offload", ": the parameters are in host memory already"
    if config.engine.dtype == "bf16":
        yield "engine.fp32_matmul", " with engine.dtype=bf16"
    if config.engine.fsdp_size > world_size:
        yield "engine.fsdp_size", f": there are no more than {world_size} ranks"


def _of_optim(config: TrainConfig) -> Rules:
    optim = config.optim
    if not wants_lora(config.model):
        yield "optim.loraplus_lr_ratio", " without model.lora_rank"
    cls = optimizer_class(optim.optimizer, optim.optimizer_impl)
    for name in ("betas", "eps"):
        if not takes(cls, name):
            yield f"optim.{name}", f" with optim.optimizer={cls.__name__}"
    if optim.lr_scheduler == "constant":
        yield "optim.min_lr_ratio", " with optim.lr_scheduler=constant"
    if optim.lr_warmup_steps >= 0:
        yield "optim.lr_warmup_steps_ratio", " beside optim.lr_warmup_steps"


def _of_trainer(config: TrainConfig) -> Rules:
    trainer = config.trainer
    if trainer.resume_mode != "resume_path":
        yield "trainer.resume_from_path", f" with trainer.resume_mode={trainer.resume_mode}"
    if not trainer.export:
        for name in ("export_best", "upload_uri", "max_shard_size"):
            yield f"trainer.{name}", " with trainer.export=false"
    if trainer.env_eval_freq in (None, -1, 0):
        for name in ("env_eval_data_dir", "env_eval", "env_eval_timeout"):
            yield f"trainer.{name}", " without trainer.env_eval_freq"
    judges = trainer.save_best or trainer.export_best or trainer.early_stop_patience is not None
    if not judges:
        yield "trainer.early_stop_min_delta", " without trainer.early_stop_patience"
    never = trainer.test_freq in (None, -1, 0) and trainer.best_metric.startswith("val/")
    if never:
        yield "trainer.early_stop_patience", ": trainer.test_freq validates only at the end"
    if trainer.nan_policy != "skip":
        yield "trainer.max_skipped_steps", " without trainer.nan_policy=skip"


def _names_database(*specs: Any) -> bool:
    return any("mongodb" in str(spec) for spec in specs)


def _leaves(section: Any, prefix: str) -> Iterator[str]:
    for item in fields(section):
        value = getattr(section, item.name)
        if not is_dataclass(value):
            yield f"{prefix}{item.name}"
