"""Scripts of other tools run unchanged: verl's override lists and keys, flags of two more."""

from __future__ import annotations

import pytest

from verl_sft.config.load import load_config
from verl_sft.config.train import TrainConfig
from verl_sft.errors import UsageError

_GSM8K = (
    "data.train_files=/data/gsm8k/train.parquet data.val_files=/data/gsm8k/test.parquet "
    "data.prompt_key=extra_info data.response_key=extra_info data.prompt_dict_keys=['question'] "
    "+data.response_dict_keys=['answer'] "
)
_LOGGERS = 'trainer.logger=\'["console","wandb"]\' '
_PEFT = "model.lora_rank=32 model.lora_alpha=16 model.target_modules=all-linear "
_SP2 = "ulysses_sequence_parallel_size=2 use_remove_padding=true "
# The public example scripts, shell variables replaced by what they stand for.
SCRIPTS = {
    "deepseek": _GSM8K + "data.micro_batch_size_per_gpu=4 model.partial_pretrain=deepseek-ai/x "
    "trainer.default_local_dir=out trainer.project_name=gsm8k-sft "
    "trainer.experiment_name=gsm8k-sft-x trainer.total_epochs=4 " + _LOGGERS,
    "peft_sp2_npu": _GSM8K + "optim.lr=1e-4 data.micro_batch_size_per_gpu=64 "
    "model.partial_pretrain=Qwen/Qwen3-8B trainer.logger=console trainer.total_epochs=2 "
    + _PEFT
    + "model.strategy=fsdp "
    + _SP2,
    "peft": _GSM8K
    + "optim.lr=1e-4 model.partial_pretrain=Qwen/Qwen2.5-0.5B-Instruct "
    + _PEFT
    + "model.target_modules=[q_proj,v_proj]",
    "sp2": _GSM8K + "data.micro_batch_size=4 trainer.total_training_steps=1 " + _SP2,
    "liger": _GSM8K + "data.micro_batch_size=4 model.use_liger=True " + _SP2,
    "multiturn": "data.train_files=a.parquet data.val_files=b.parquet data.multiturn.enable=true "
    "data.multiturn.messages_key=messages data.micro_batch_size=4 " + _SP2,
    "engine": "engine=fsdp optim=fsdp optim.lr=2e-5 optim.lr_warmup_steps_ratio=0.01 "
    "optim.weight_decay=0.1 optim.betas=[0.9,0.95] optim.clip_grad=1.0 optim.min_lr_ratio=0.1 "
    "optim.warmup_style=cosine engine.ulysses_sequence_parallel_size=2 engine.strategy=fsdp2 "
    "engine.fsdp_size=-1 optim.lr_warmup_init=0 optim.lr_decay_style=cosine optim.min_lr=2e-6 "
    "engine.tensor_model_parallel_size=1 engine.pipeline_model_parallel_size=1 "
    "engine.virtual_pipeline_model_parallel_size=null engine.context_parallel_size=1 "
    "engine.use_mbridge=True engine.vanilla_mbridge=True data.train_files=a.parquet "
    "data.train_batch_size=96 data.max_length=2048 data.pad_mode=no_padding "
    "data.truncation=error data.use_dynamic_bsz=True data.max_token_len_per_gpu=65536 "
    "model.path=m model.use_remove_padding=true trainer.test_freq=-1 trainer.save_freq=4000 "
    "trainer.logger=['console','wandb'] trainer.project_name=p trainer.experiment_name=e "
    "trainer.total_epochs=10 trainer.default_local_dir=out trainer.resume_mode=auto "
    "trainer.max_ckpt_to_keep=5 checkpoint.save_contents=[model,optimizer,extra]",
}
# Every other key of the two dialects, with a value that scripts give it.
KEYS = """
data.train_max_samples=100 data.val_max_samples=-1 data.balance_dp_token=True
data.enable_thinking_default=none data.enable_thinking_default=true data.messages_key=messages
data.tools_key=tools data.enable_thinking_key=enable_thinking +data.image_key=images
+data.video_key=videos +data.image_patch_size=14 data.ignore_input_ids_mismatch=True
data.chat_template=null data.apply_chat_template_kwargs={enable_thinking:false}
data.num_workers=8 data.use_shm=False data.custom_cls.path=null data.custom_cls.name=null
+data.shuffle=true +data.seed=1
model.fsdp_config.model_dtype=fp32 model.fsdp_config.cpu_offload=False
model.fsdp_config.offload_params=False model.fsdp_config.wrap_policy.min_num_params=0
model.trust_remote_code=False model.external_lib=null model.use_shm=False model.hf_config_path=null
+model.override_config.attn_implementation=sdpa model.enable_gradient_checkpointing=True
+model.lora_adapter_path=null model.use_fused_kernels=False
model.fused_kernel_options.impl_backend=torch model.tiled_mlp.enabled=False
model.tiled_mlp.num_shards=4 model.mtp.enable=False model.lora.rank=0
engine.reshard_after_forward=True engine.wrap_policy.min_num_params=0
engine.wrap_policy.transformer_layer_cls_to_wrap=null engine.wrap_policy.disable=False
engine.param_offload=False engine.optimizer_offload=False engine.offload_policy=False
engine.forward_prefetch=False engine.use_orig_params=False engine.pad_to_length=False
engine.pad_to_length_bucket=1024 engine.seed=42 engine.full_determinism=False
engine.model_dtype=fp32 engine.dtype=bfloat16 +engine.mixed_precision.param_dtype=bf16
+engine.mixed_precision.reduce_dtype=fp32 +engine.mixed_precision.buffer_dtype=fp32
optim.grad_clip=1.0 optim.lr_scheduler_type=constant optim.num_cycles=0.5
optim.zero_indexed_step=True optim.lr_warmup_steps=-1 optim.warmup_steps_ratio=0.1
trainer.default_hdfs_dir=null trainer.resume_from_path=null trainer.resume_path=null
trainer.checkpoint.save_contents=[model] trainer.checkpoint.load_contents=[model]
+checkpoint.save_lora_only=true checkpoint.load_contents=[model] trainer.nnodes=1
trainer.n_gpus_per_node=8 trainer.device=cpu profiler.tool=nsys trainer.profile_interval=[-1,-1]
trainer.balance_batch=True trainer.save_freq=after_each_epoch ~trainer.experiment_name
++trainer.seed=3
"""


def said_by(*words: str, ranks: int = 1) -> tuple[TrainConfig, list[str]]:
    lines: list[str] = []
    return load_config(TrainConfig, words, say=lines.append, world_size=ranks), lines


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_public_script_runs_unchanged(name: str) -> None:
    """Each override list is accepted as it stands, and what it says is what is read."""
    words = [w.strip("'") if w.startswith("trainer.logger='") else w for w in SCRIPTS[name].split()]
    config, _ = said_by(*(w.replace("='[", "=[").replace("]'", "]") for w in words))
    if name == "engine":
        assert (config.optim.min_lr_ratio, config.ulysses_sequence_parallel_size) == (0.1, 2)
        assert (config.model.partial_pretrain, config.trainer.save_freq) == ("m", 4000)
    if name == "peft":
        assert config.model.target_modules == ["q_proj", "v_proj"]
    if "gsm8k" in SCRIPTS[name]:
        assert config.data.response_dict_keys == ["answer"]


@pytest.mark.parametrize("word", KEYS.split())
def test_every_key_of_both_dialects_is_known(word: str) -> None:
    """A key is ours, is read as one of ours, or is said to have no effect."""
    said_by(word)


def test_what_would_change_the_run_is_refused() -> None:
    """A dataset class is not ignored; the error says what to write instead."""
    with pytest.raises(UsageError, match=r"file\.py:function"):
        said_by("data.custom_cls.path=my.py")


def test_values_of_the_engine_dialect() -> None:
    """Other spellings of the same values arrive as ours."""
    config, said = said_by(
        "engine.mixed_precision.param_dtype=bfloat16", "data.enable_thinking_default=false"
    )
    assert config.engine.dtype == "bf16"
    assert config.data.apply_chat_template_kwargs == {"enable_thinking": False}
    assert "engine.mixed_precision.param_dtype is read as engine.dtype" in said


def test_flags_of_transformers_trainers() -> None:
    """`--flag value`, `--flag=value` and bare flags; batch sizes are per process."""
    config, said = said_by(
        *("--model_name_or_path", "Qwen/x", "--train_file", "a.parquet", "--max_tokens", "65536"),
        *("--loss_calculater", "CrossEntropy", "--enable_sampling", "false", "--bf16"),
        *("--per_device_train_batch_size=2", "--gradient_accumulation_steps", "4"),
        *("--learning_rate", "1e-6", "--save_total_limit", "3", "optim.clip_grad=0.5"),
        ranks=4,
    )
    assert (config.model.partial_pretrain, config.data.train_files) == ("Qwen/x", "a.parquet")
    assert (config.data.max_length, config.data.train_batch_size) == (65536, 32)
    assert (config.optim.lr, config.optim.clip_grad, config.engine.dtype) == (1e-6, 0.5, "bf16")
    assert config.trainer.max_ckpt_to_keep == 3
    assert "batch: 2 x 4 x 4 processes = data.train_batch_size=32" in said


def test_dashed_flags_and_training_keys() -> None:
    """The same through dashes, and as `training.sft_config.*`."""
    flags, _ = said_by(
        *("--model-name", "m", "--train-file", "a.jsonl", "--use-lora", "--lora-r", "32"),
        *("--batch-size", "2", "--gradient-accumulation", "8", "--num-epochs", "3"),
    )
    keys, said = said_by(
        "+training.sft_config.model_name_or_path=m",
        "training.sft_config.use_lora=true",
        "training.sft_config.lora_r=32",
        "training.sft_config.per_device_train_batch_size=2",
        "training.sft_config.gradient_accumulation_steps=8",
        "training.sft_config.num_train_epochs=3",
        "training.run_sft_training=True",
        "data.train_files=a.jsonl",
    )
    assert flags == keys
    assert (keys.model.lora_rank, keys.data.train_batch_size) == (32, 16)
    assert any(line.startswith("--run_sft_training has no effect") for line in said)


@pytest.mark.parametrize(
    ("words", "freq", "best"),
    [
        ("--save_strategy epoch --save_steps 7", "after_each_epoch", False),
        ("--save_strategy=best", -1, True),
        ("training.save_strategy=no", -1, False),
        ("--save_steps 7", 7, False),
        ("--learning_rate 1", "after_each_epoch", False),  # neither is given: our default
    ],
)
def test_flags_that_say_when_to_save(words: str, freq: str | int, best: bool) -> None:
    """As transformers' trainer reads them."""
    trainer = said_by(*words.split())[0].trainer
    assert (trainer.save_freq, trainer.save_best) == (freq, best)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--loss_calculater", "GRPO"], "--loss_calculater GRPO is not supported"),
        (["--tp_size", "2"], "--tp_size 2 is not supported"),
        (["--learning_rat", "1"], "Did you mean '--learning_rate'"),
    ],
)
def test_wrong_flags_are_errors(words: list[str], message: str) -> None:
    """Another kind of training is refused, a misspelled flag gets the nearest name."""
    with pytest.raises(UsageError, match=message):
        said_by(*words)
