"""`--flag value` words of AgentRL and PettingLLMs, and `training.*` keys, read as ours."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from verl_sft.config.checks import whole
from verl_sft.config.trainer_args import batch_keys, save_keys
from verl_sft.errors import UsageError
from verl_sft.registry import unknown_name

PREFIXES = ("training.sft_config.", "training.")
_TRUE = ("true", "1", "yes")

# Their name (dashes as underscores) -> our key, the value as it is.
_SAME = {
    "model_name_or_path": "model.partial_pretrain",
    "model_name": "model.partial_pretrain",
    "tokenizer_name": "model.tokenizer_path",
    "train_file": "data.train_files",
    "val_file": "data.val_files",
    "db_connection_string": "data.mongo.uri",
    "drop_zero_advantage": "data.agentrl.drop_zero_advantage",
    "minimal_advantage": "data.agentrl.minimal_advantage",
    "output_dir": "trainer.default_local_dir",
    "max_tokens": "data.max_length",
    "max_seq_length": "data.max_length",
    "learning_rate": "optim.lr",
    "weight_decay": "optim.weight_decay",
    "max_grad_norm": "optim.clip_grad",
    "warmup_ratio": "optim.lr_warmup_steps_ratio",
    "warmup_steps": "optim.lr_warmup_steps",
    "lr_scheduler_type": "optim.lr_scheduler",
    "num_train_epochs": "trainer.total_epochs",
    "num_epochs": "trainer.total_epochs",
    "max_steps": "trainer.total_training_steps",
    "save_total_limit": "trainer.max_ckpt_to_keep",
    "logging_steps": "trainer.log_freq",
    "seed": "trainer.seed",
    "lora_alpha": "model.lora_alpha",
    "lora_dropout": "model.lora_dropout",
    "lora_target_modules": "model.target_modules",
    "gradient_checkpointing": "model.enable_gradient_checkpointing",
    "activation_offloading": "model.enable_activation_offload",
    "attention_implementation": "model.attn_implementation",
    "cp_size": "ulysses_sequence_parallel_size",
    "trust_remote_code": "model.trust_remote_code",
}
_NO_EFFECT = {
    "loss_seq_chunk_size": "the loss is computed on learned tokens in chunks",
    "enable_loss_parallel": "the loss is computed on learned tokens in chunks",
    "cpu_ram_efficient_loading": "engine.meta_start decides",
    "pad_to_multiple_of": "samples are packed without padding",
    "pad_to_maximum": "samples are packed without padding",
    "dynamic_batching": "data.max_token_len_per_gpu is a hard budget",
    "shift_labels": "targets are always shifted",
    "save_only_model": "checkpoints hold what a resume needs",
    "max_trained_count": "trainer.total_epochs decides",
    "retrained_interval": "trainer.total_epochs decides",
    "trainer": "there is one trainer for all models",
    "max_pixels": "training is on text",
    "tune_vision": "training is on text",
    "log_entropy": "it is not computed",
    "output_router_logits": "it is not computed",
    "decoder_sparse_step": "the model's config.json decides",
    "sft_data_dir": "give data.train_files",
    "run_sft_training": "this command trains",
    "evaluation_strategy": "trainer.test_freq decides",
    "eval_strategy": "trainer.test_freq decides",
    "load_best_model_at_end": "trainer.export_best decides",
    "optim": "optim.optimizer decides",
}
# What would make it another run: only this value is taken.
_ONLY = {
    "enable_sampling": "false",
    "loss_calculater": "CrossEntropy",
    "tp_size": "1",
    "pp_size": "1",
    "ep_size": "1",
}
_READ = ("per_device_train_batch_size", "batch_size", "gradient_accumulation_steps",
         "gradient_accumulation", "use_lora", "lora_r", "bf16", "fp16", "save_strategy",
         "save_steps")  # fmt: skip


def split_flags(words: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Take `--flag value`, `--flag=value` and bare `--flag` out of the words.

    Returns:
        The flags by name, and the words that are left.
    """
    flags: dict[str, Any] = {}
    rest: list[str] = []
    pending = list(words)
    while pending:
        word = pending.pop(0)
        if not word.startswith("--"):
            rest.append(word)
            continue
        name, sign, value = word[2:].partition("=")
        if not sign:
            # `key=value` words are ours; a flag's value holds no `=` before its first `/`.
            takes = pending and not pending[0].startswith("--") and not _is_key(pending[0])
            value = pending.pop(0) if takes else "true"
        flags[name.replace("-", "_")] = value
    return flags, rest


def translate_flags(flags: Mapping[str, Any], *, world_size: int) -> Iterator[tuple[str, Any, str]]:
    """Our key, its value and a line to say, for each flag; a line alone has an empty key.

    Raises:
        UsageError: an unknown flag, or one that asks for another kind of training.
    """
    for name, value in flags.items():
        if name in _ONLY:
            if str(value).lower() != _ONLY[name].lower():
                raise UsageError(
                    f"--{name} {value} is not supported", fix=f"Use --{name} {_ONLY[name]}"
                )
            yield "", None, f"--{name} {value} is always so here"
        elif name in _NO_EFFECT:
            yield "", None, f"--{name} has no effect: {_NO_EFFECT[name]}"
        elif name in _SAME:
            yield _SAME[name], _typed(value), f"--{name} is read as {_SAME[name]}"
        elif name not in _READ:
            raise unknown_name("flag", f"--{name}", [f"--{n}" for n in (*_SAME, *_READ)])
    yield from _batch(flags, world_size)
    yield from _lora(flags)
    if any(_is_true(flags.get(name)) for name in ("bf16", "fp16")):
        yield "engine.dtype", "bf16", "--bf16 is read as engine.dtype=bf16"
    if "save_strategy" in flags or "save_steps" in flags:
        saving = save_keys(flags.get("save_strategy", "steps"), flags.get("save_steps", 500))
        for key, value in saving.items():
            yield key, value, f"--save_strategy is read as {key}={value}"


def _batch(flags: Mapping[str, Any], world_size: int) -> Iterator[tuple[str, Any, str]]:
    micro = flags.get("per_device_train_batch_size", flags.get("batch_size"))
    steps = flags.get("gradient_accumulation_steps", flags.get("gradient_accumulation"))
    if micro is None and steps is None:
        return
    rounds = 1 if steps is None else steps
    sizes, note = batch_keys(8 if micro is None else micro, rounds, world_size=world_size)
    for key, value in sizes.items():
        yield key, value, note if key == "data.train_batch_size" else ""


def _lora(flags: Mapping[str, Any]) -> Iterator[tuple[str, Any, str]]:
    wanted = flags.get("use_lora")
    if wanted is not None and not _is_true(wanted):
        yield "model.lora_rank", 0, "--use_lora false is read as model.lora_rank=0"
    elif wanted is not None or "lora_r" in flags:
        rank = whole("--lora_r", flags.get("lora_r", 64))
        yield "model.lora_rank", rank, f"--lora_r is read as model.lora_rank={rank}"


def _is_key(word: str) -> bool:
    key = word.partition("=")[0]
    return "=" in word and "/" not in key and ":" not in key


def _is_true(value: Any) -> bool:
    return value is not None and str(value).lower() in _TRUE


def _typed(value: Any) -> Any:
    """A flag's text as the number or truth value that it spells."""
    if not isinstance(value, str):
        return value
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value
