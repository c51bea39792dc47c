"""Other tools' keys, read as ours: one table, and one line said for each key that was translated.

Canonical are the keys of `train.py` (verl's legacy dialect). `ALIASES` maps the engine dialect and
older spellings; `NO_EFFECT` names keys that scripts carry and that need no counterpart here.
"""

from __future__ import annotations

from typing import Any

from verl_sft.errors import UsageError

ALIASES: dict[str, str] = {
    "model.path": "model.partial_pretrain",
    "data.messages_key": "data.multiturn.messages_key",
    "data.tools_key": "data.multiturn.tools_key",
    "data.enable_thinking_key": "data.multiturn.enable_thinking_key",
    "data.micro_batch_size": "data.micro_batch_size_per_gpu",
    "model.use_remove_padding": "use_remove_padding",
    "model.strategy": "engine.strategy",
    "model.use_torch_compile": "engine.use_torch_compile",
    "model.fsdp_config.model_dtype": "engine.model_dtype",
    "model.fsdp_config.cpu_offload": "engine.offload",
    "model.fsdp_config.offload_params": "engine.offload",
    "engine.param_offload": "engine.offload",
    "engine.optimizer_offload": "engine.offload",
    "engine.offload_policy": "engine.offload",
    "engine.ulysses_sequence_parallel_size": "ulysses_sequence_parallel_size",
    "model.override_config.attn_implementation": "model.attn_implementation",
    "optim.warmup_steps_ratio": "optim.lr_warmup_steps_ratio",
    "optim.lr_scheduler_type": "optim.lr_scheduler",
    "optim.warmup_style": "optim.lr_scheduler",
    "optim.grad_clip": "optim.clip_grad",
    "trainer.resume_path": "trainer.resume_from_path",
    "engine.seed": "trainer.seed",
    "engine.mixed_precision.param_dtype": "engine.dtype",
}

_ENGINE = "this engine shards by torch FSDP2 alone"
_ALWAYS = "always so here"
_TEXT = "training is on text"
_LOSS = "the loss is computed on learned tokens in chunks"
NO_EFFECT: dict[str, str] = {
    "engine": _ENGINE,
    "optim": "the optimizer does not depend on the engine here",
    "data.pad_mode": "samples are packed, or padded to the longest of a micro-batch",
    "data.use_dynamic_bsz": _ALWAYS,
    "data.balance_dp_token": _ALWAYS,
    "trainer.balance_batch": _ALWAYS,
    "data.use_shm": "files are read where they are",
    "model.use_shm": "files are read where they are",
    "data.chat_template": "the tokenizer's own template is used",
    "data.ignore_input_ids_mismatch": "a row whose mask cannot be proven is refused",
    "model.fsdp_config.wrap_policy.min_num_params": _ENGINE,
    "engine.wrap_policy.min_num_params": _ENGINE,
    "engine.forward_prefetch": _ENGINE,
    "engine.use_orig_params": _ENGINE,
    "engine.tensor_model_parallel_size": _ENGINE,
    "engine.pipeline_model_parallel_size": _ENGINE,
    "engine.virtual_pipeline_model_parallel_size": _ENGINE,
    "engine.context_parallel_size": _ENGINE,
    "engine.use_mbridge": _ENGINE,
    "engine.vanilla_mbridge": _ENGINE,
    "optim.lr_warmup_init": "warm-up starts at zero",
    "optim.lr_decay_style": "optim.lr_scheduler decides",
    "optim.min_lr": "optim.min_lr_ratio decides",
    "optim.num_cycles": "the cosine schedule is one half wave",
    "trainer.default_hdfs_dir": "write to trainer.default_local_dir and copy from there",
    "trainer.nnodes": "torchrun decides",
    "trainer.n_gpus_per_node": "torchrun decides",
    "trainer.checkpoint.save_contents": "checkpoints hold model, optimizer and progress",
    "trainer.checkpoint.load_contents": "checkpoints hold model, optimizer and progress",
    "checkpoint.save_contents": "checkpoints hold model, optimizer and progress",
    "checkpoint.load_contents": "checkpoints hold model, optimizer and progress",
    "model.external_lib": "no code is imported by name",
    "data.image_key": _TEXT,
    "data.video_key": _TEXT,
    "data.image_patch_size": _TEXT,
    "data.seed": "trainer.seed decides the order; the first rows are taken",
    "engine.full_determinism": "runs are repeatable on the CPU; on GPUs kernels decide",
    "engine.mixed_precision": "gradients are reduced in fp32",
    "engine.pad_to_length": "samples are packed without padding",
    "engine.pad_to_length_bucket": "samples are packed without padding",
    "engine.wrap_policy": "one unit of sharding per decoder layer",
    "model.hf_config_path": "config.json of the model decides",
    "model.lora": "model.lora_rank, lora_alpha and lora_dropout decide",
    "model.mtp": "the next token is predicted",
    "model.tiled_mlp": "no engine reads it",
    "model.use_fused_kernels": _LOSS,
    "model.fused_kernel_options": _LOSS,
    "optim.zero_indexed_step": "warm-up starts above zero",
    "checkpoint.save_lora_only": "a LoRA checkpoint holds no base weights",
    "profiler": "torch's own profilers can be attached from outside",
    "trainer.profile_interval": "torch's own profilers can be attached from outside",
}
# A key of another tool that would change what is trained: refused, with what to write instead.
REFUSED: dict[str, str] = {
    "data.custom_cls": "Give data.format=file.py:function, a function from one row to a record",
    "model.override_config": "Edit config.json of the model",
}


def translate(key: str, value: Any) -> tuple[str | None, Any, str]:
    """Read one override of another dialect.

    Raises:
        UsageError: it would change what is trained.

    Returns:
        The canonical key (None: no effect), the value, and a line to say ("" for our own keys).
    """
    if key in ALIASES:
        return ALIASES[key], value, f"{key} is read as {ALIASES[key]}"
    if key == "data.enable_thinking_default":
        if value is None or str(value).lower() == "none":
            return None, value, ""
        canonical = "data.apply_chat_template_kwargs.enable_thinking"
        return canonical, value, f"{key} is read as {canonical}"
    for name in _with_parents(key):
        if name in NO_EFFECT:
            return None, value, f"{key} has no effect: {NO_EFFECT[name]}"
        if name in REFUSED:
            if value is None:
                return None, value, ""
            raise UsageError(f"{key}={value} is not supported", fix=REFUSED[name])
    return key, value, ""


def _with_parents(key: str) -> list[str]:
    """A key and the sections that it lies in: a.b.c, a.b (a section of ours is never one)."""
    parts = key.split(".")
    names = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
    return [key, *(n for n in names[1:] if "." in n or n == "profiler")]
