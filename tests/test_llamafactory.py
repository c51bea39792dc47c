"""LLaMA-Factory files as they are: keys, defaults, data sets, what changes its meaning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from verl_sft.config.load import load_config
from verl_sft.config.train import TrainConfig
from verl_sft.errors import UsageError
from verl_sft.records.mix import read_mix, resolve_sources
from verl_sft.records.parse import ReadOptions

USERRL = """
model_name_or_path: Qwen/Qwen3-8B
trust_remote_code: true
stage: sft
do_train: true
finetuning_type: full
deepspeed: examples/deepspeed/ds_z3_config.json
dataset: merged_gym_sft
template: qwen3
cutoff_len: 16384
overwrite_cache: true
preprocessing_num_workers: 16
dataloader_num_workers: 4
output_dir: saves/qwen3-8b/full/sft
logging_steps: 5
save_strategy: epoch
plot_loss: true
overwrite_output_dir: true
per_device_train_batch_size: 2
gradient_accumulation_steps: 4
learning_rate: 1.0e-5
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
"""
ENVSCALER = """
model_name_or_path: Qwen/Qwen3-4B
stage: sft
do_train: true
finetuning_type: full
deepspeed: examples/deepspeed/ds_z3_config.json
dataset: envscaler
template: qwen3
mask_history: True
cutoff_len: 32768
max_samples: 1000000
preprocessing_num_workers: 16
output_dir: saves/qwen3-4b
logging_steps: 1
save_steps: 100
report_to: wandb
per_device_train_batch_size: 1
gradient_accumulation_steps: 32
learning_rate: 1.0e-6
num_train_epochs: 3
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
"""
SHAREGPT_ROW = {
    "conversations": [
        {"from": "human", "value": "Begin."},
        {"from": "gpt", "value": "<think>hm</think>\n1"},
        {"from": "observation", "value": "Result: 10"},
        {"from": "gpt", "value": "2"},
    ],
    "system": "You are an agent.",
    "tools": "[]",
}
ALPACA_ROW = {
    "instruction": "next?",
    "input": "",
    "output": "done",
    "system": "s",
    "history": [["a", "b"]],
}
INFO = {
    "merged_gym_sft": {
        "file_name": "merged.json",
        "formatting": "sharegpt",
        "columns": {"messages": "conversations", "system": "system", "tools": "tools"},
    },
    "envscaler": {
        "file_name": "envscaler.json",
        "columns": {
            "prompt": "instruction",
            "query": "input",
            "response": "output",
            "history": "history",
            "system": "system",
        },
    },
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    data = tmp_path / "data"
    data.mkdir()
    (data / "dataset_info.json").write_text(json.dumps(INFO))
    (data / "merged.json").write_text(json.dumps([SHAREGPT_ROW] * 2))
    (data / "envscaler.json").write_text(json.dumps([ALPACA_ROW] * 3))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(folder: Path, text: str, *words: str, ranks: int = 8) -> tuple[TrainConfig, list[str]]:
    (folder / "run.yaml").write_text(text)
    said: list[str] = []
    words = ("--llamafactory", str(folder / "run.yaml"), *words)
    return load_config(TrainConfig, words, say=said.append, world_size=ranks), said


def test_a_sharegpt_run(folder: Path) -> None:
    """Full fine-tuning with ZeRO-3 at 16,384 tokens: 2 x 4 x 8 samples per step, every turn."""
    config, said = load(folder, USERRL)
    data, optim = config.data, config.optim
    assert (data.max_length, data.train_batch_size, data.micro_batch_size_per_gpu) == (16384, 64, 2)
    assert (optim.lr, optim.lr_scheduler, optim.lr_warmup_steps_ratio) == (1e-5, "cosine", 0.1)
    assert (optim.betas, optim.weight_decay) == ([0.9, 0.999], 0.0)
    assert (config.model.lora_rank, config.engine.dtype) == (0, "bf16")
    assert config.model.enable_gradient_checkpointing and config.engine.reshard_after_forward
    assert (config.trainer.save_freq, config.trainer.total_epochs) == ("after_each_epoch", 3)
    assert config.trainer.default_local_dir == "saves/qwen3-8b/full/sft"
    sources = resolve_sources(data.train_files, split="train")
    options = ReadOptions(multiturn=True, mask_history=data.mask_history)
    first, _ = read_mix(sources, options=options)
    assert [m.role for m in first.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert first.supervise is None and first.data_source == "merged_gym_sft"
    told = "\n".join(said)
    for text in (
        "batch: 2 x 4 x 8 processes = data.train_batch_size=64",
        "template: qwen3 names a template",
        "ddp_timeout has no effect",
        "ZeRO stage 3",
    ):
        assert text in told


def test_an_alpaca_run_with_masked_history(folder: Path) -> None:
    """32,768 tokens, last answers only, oldest turns cut first; words on the line win."""
    config, _ = load(folder, ENVSCALER, "optim.lr=3e-6", ranks=1)
    data = config.data
    assert (data.max_length, data.train_batch_size, data.truncation) == (32768, 32, "oldest_turns")
    assert (config.optim.lr, config.trainer.save_freq) == (3e-6, 100)
    assert "wandb" in config.trainer.logger
    sources = resolve_sources(data.train_files, split="train")
    options = ReadOptions(multiturn=True, mask_history=data.mask_history)
    records = list(read_mix(sources, options=options))
    assert len(records) == 3 and {r.supervise for r in records} == {(4,)}


def test_history_is_learned_unless_it_is_masked(folder: Path) -> None:
    """Without `mask_history` the answers of an alpaca history are targets too, as there."""
    config, _ = load(folder, ENVSCALER.replace("mask_history: True", "mask_history: false"))
    sources = resolve_sources(config.data.train_files, split="train")
    options = ReadOptions(multiturn=True, mask_history=config.data.mask_history)
    assert next(iter(read_mix(sources, options=options))).supervise is None


def test_lora_quantised_and_capped(folder: Path) -> None:
    """LoRA with their defaults (rank 8, alpha twice the rank), a cap per data set, ZeRO-2."""
    text = USERRL.replace("finetuning_type: full", "finetuning_type: lora\nmax_samples: 1")
    (folder / "ds_z2_offload_config.json").write_text(
        json.dumps({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}})
    )
    text = text.replace("examples/deepspeed/ds_z3_config.json", "ds_z2_offload_config.json")
    config, _ = load(folder, text)
    assert (config.model.lora_rank, config.model.lora_alpha) == (8, 16)
    assert config.model.target_modules == "all-linear"
    assert not config.engine.reshard_after_forward and config.engine.offload
    sources = resolve_sources(config.data.train_files, split="train")
    assert len(list(read_mix(sources, options=ReadOptions(multiturn=True)))) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stage: sft": "stage: dpo"}, "stage: dpo is not supported"),
        ({"finetuning_type: full": "finetuning_type: freeze"}, "freeze is not supported"),
        ({"dataset: merged_gym_sft": "dataset: merged_gym"}, "Did you mean 'merged_gym_sft'"),
        ({"dataset: merged_gym_sft": ""}, "no dataset is named"),
        ({"cosine": "cosin"}, "Did you mean 'cosine'"),
        ({"stage: sft": "stage: [sft"}, "cannot read the LLaMA-Factory file"),
    ],
)
def test_what_cannot_be_done_is_refused(folder: Path, change: Any, message: str) -> None:
    """Other stages, unknown data sets and schedules, broken YAML."""
    ((old, new),) = change.items()
    with pytest.raises(UsageError, match=message.replace("[", r"\[")):
        load(folder, USERRL.replace(old, new))


def test_unknown_keys_are_named(folder: Path) -> None:
    """A key that nothing here knows is said, not dropped."""
    _, said = load(folder, USERRL + "shift_attn: true\n")
    assert "shift_attn: True has no counterpart here and is ignored" in said
