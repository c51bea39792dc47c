"""LLaMA-Factory files as they are: keys, defaults, data sets, what changes its meaning."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import transformers

from tests.llamafactory_table import NAMES, PAGE, table
from verl_sft.cli import main
from verl_sft.config.inspect import InspectConfig
from verl_sft.config.llamafactory import KNOWN
from verl_sft.config.llamafactory_keys import CHANGED, IDLE, REFUSED, SAME, arguments
from verl_sft.config.load import config_keys, load_config
from verl_sft.config.train import TrainConfig
from verl_sft.data.sources import open_sources
from verl_sft.errors import UsageError
from verl_sft.records.mix import read_mix, resolve_sources
from verl_sft.records.parse import ReadOptions
from verl_sft.trainer import launch

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
        "template: the model's own chat template is used",
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
        ({"finetuning_type: full": "finetuning_type: oft"}, "oft is not supported"),
        ({"bf16: true": "optim: lomo"}, "unknown optim 'lomo'"),
        ({"bf16: true": "mask_history: true\ntrain_on_prompt: true"}, "exclude each other"),
        ({"bf16: true": "val_size: 0.1\neval_dataset: envscaler"}, "data.val_size=0.1 beside"),
        ({"bf16: true": "adapter_name_or_path: a,b"}, "a, b is not supported"),
        ({"bf16: true": "quantization_bit: 3"}, "quantization_bit=3"),
        ({"bf16: true": "quantization_bit: 4\nquantization_type: fp4"}, "quantization_type=fp4"),
        (
            {
                "lr_scheduler_type: cosine": "lr_scheduler_type: polynomial\n"
                "lr_scheduler_kwargs: {power: 2}"
            },
            "another power than 1",
        ),
        ({"save_strategy: epoch": "save_strategy: often"}, "save_strategy=often"),
        ({"dataset: merged_gym_sft": "dataset: merged_gym"}, "Did you mean 'merged_gym_sft'"),
        ({"dataset: merged_gym_sft": ""}, "no dataset is named"),
        ({"cosine": "cosin"}, "Did you mean 'cosine'"),
        ({"stage: sft": "stage: [sft"}, "cannot read the LLaMA-Factory file"),
        ({"bf16: true": "bf16: true\nbf16: false"}, "'bf16' stands there twice"),
        ({"bf16: true": "optim_args: {a: 1, a: 2}"}, "'a' stands there twice"),
        ({"bf16: true": "bf16: perhaps"}, "bf16: perhaps is neither true nor false"),
        ({"examples/deepspeed/ds_z3_config.json": "nowhere.json"}, "no such DeepSpeed file"),
        ({"examples/deepspeed/ds_z3_config.json": "torn_z3.json"}, "cannot read the DeepSpeed"),
    ],
)
def test_what_cannot_be_done_is_refused(folder: Path, change: Any, message: str) -> None:
    """Other stages, unknown data sets and schedules, broken YAML."""
    ((old, new),) = change.items()
    (folder / "torn_z3.json").write_text('{"zero_optimization": {"stage"')
    with pytest.raises(UsageError, match=message.replace("[", r"\[")):
        load(folder, USERRL.replace(old, new))


def test_quoted_truths_are_truths(folder: Path) -> None:
    """`"false"` in quotes, as templating tools write it, is false; so is 0."""
    text = USERRL.replace("bf16: true", 'bf16: "False"\nmask_history: "false"\npure_bf16: 0')
    config = load(folder, text)[0]
    assert (config.engine.dtype, config.data.mask_history) == ("fp32", False)
    text = USERRL.replace("bf16: true", 'bf16: "True"\nmask_history: "true"')
    config = load(folder, text)[0]
    assert (config.engine.dtype, config.data.mask_history) == ("bf16", True)


def test_unknown_keys_are_named(folder: Path) -> None:
    """A key that nothing here knows is said, not dropped."""
    _, said = load(folder, USERRL + "learnig_rate: 1\nwandb_key: s3cret\n")
    assert "learnig_rate has no counterpart here and is ignored" in "\n".join(said)
    assert "Did you mean 'learning_rate'" in "\n".join(said) and "s3cret" not in "".join(said)


LENGTH = (
    "max_steps: 7\nlr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr: 5e-6}\n"
)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("val_size: 0.1", {"data.val_size": 0.1, "data.val_seed": 42, "data.val_files": "none"}),
        ("val_size: 30\nseed: 7", {"data.val_size": 30.0, "data.val_seed": 7, "trainer.seed": 7}),
        ("max_steps: -1", {"trainer.total_training_steps": None, "trainer.total_epochs": 3}),
        (LENGTH, {"trainer.total_training_steps": 7, "trainer.total_epochs": 7,
                  "optim.min_lr_ratio": 0.5}),
        ("lr_scheduler_type: constant", {"optim.lr_warmup_steps_ratio": 0.0}),
        ("lr_scheduler_type: constant_with_warmup", {"optim.lr_warmup_steps_ratio": 0.1}),
        ("lr_scheduler_type: polynomial", {"optim.lr_scheduler": "linear"}),
        ("lr_scheduler_type: warmup_stable_decay", {"optim.lr_scheduler": "wsd"}),
        ("warmup_steps: 0.05", {"optim.lr_warmup_steps_ratio": 0.05}),
        ("warmup_steps: 20", {"optim.lr_warmup_steps": 20}),
        ("optim: adamw_8bit", {"optim.optimizer": "AdamW8bit",
                               "optim.optimizer_impl": "bitsandbytes.optim"}),
        ("optim: adamw_torch_fused", {"optim.optimizer": "AdamW"}),
        ("optim: paged_adamw_8bit", {"optim.optimizer": "PagedAdamW8bit"}),
        ("optim: sgd\noptim_args: momentum=0.9,nesterov=true",
         {"optim.override_optimizer_config": {"momentum": 0.9, "nesterov": True}}),
        ("use_muon: true", {"optim.optimizer": "Muon"}),
        ("early_stopping_steps: 3\nload_best_model_at_end: true\neval_strategy: steps",
         {"trainer.early_stop_patience": 3, "trainer.export_best": True, "trainer.test_freq": 5}),
        ("save_strategy: best", {"trainer.save_best": True, "trainer.save_freq": -1}),
        ("save_strategy: no", {"trainer.save_freq": -1}),
        ("report_to: [wandb, swanlab]",
         {"trainer.logger": ["console", "file", "tensorboard", "wandb", "swanlab"]}),
        ("report_to: none", {"trainer.logger": ["console", "file", "tensorboard"]}),
        ("pure_bf16: true", {"engine.model_dtype": "bf16", "engine.dtype": "bf16"}),
        ("bf16: false", {"engine.dtype": "fp32"}),
        ("fp16: true", {"engine.dtype": "bf16"}),
        ("gradient_checkpointing: false", {"model.enable_gradient_checkpointing": False}),
        ("disable_gradient_checkpointing: true", {"model.enable_gradient_checkpointing": False}),
        ("flash_attn: fa2", {"model.attn_implementation": "flash_attention_2"}),
        ("flash_attn: fa3", {"model.attn_implementation": "auto"}),
        ("neftune_noise_alpha: 5", {"model.neftune_noise_alpha": 5.0}),
        ("disable_shuffling: true", {"data.shuffle": False}),
        ("preserve_thinking: true", {"data.history_thinking": "keep"}),
        ("train_on_prompt: true", {"data.prompt_weight": 1.0}),
        ("enable_thinking: false",
         {"data.apply_chat_template_kwargs": {"enable_thinking": False}}),
        ("resume_from_checkpoint: true", {"trainer.resume_mode": "auto"}),
        ("resume_from_checkpoint: old/global_step_3",
         {"trainer.resume_mode": "resume_path", "trainer.resume_from_path": "old/global_step_3"}),
        ("no_cuda: true", {"trainer.device": "cpu"}),
        ("finetuning_type: lora\nlora_target: q_proj, v_proj\npissa_init: true\n"
         "use_rslora: true\nuse_dora: true\nloraplus_lr_ratio: 16",
         {"model.target_modules": ["q_proj", "v_proj"], "model.lora_init": "pissa",
          "model.use_rslora": True, "model.use_dora": True, "optim.loraplus_lr_ratio": 16.0}),
        ("finetuning_type: lora\nquantization_bit: 8", {"model.quantization": "int8"}),
        ("fsdp: shard_grad_op offload\ndeepspeed:",
         {"engine.reshard_after_forward": False, "engine.offload": True}),
        ("deepspeed: ds_z0_config.json", {"engine.reshard_after_forward": False}),
        ("deepspeed: {zero_optimization: {stage: 3, offload_param: {device: cpu}}}",
         {"engine.reshard_after_forward": True, "engine.offload": True}),
        ("per_device_train_batch_size: 1\ngradient_accumulation_steps: 3",
         {"data.train_batch_size": 24}),
    ],
)  # fmt: skip
def test_arguments_become_keys(folder: Path, text: str, wanted: dict[str, Any]) -> None:
    """Each argument, added to a file that has others, gives exactly these values."""
    lines = {line.partition(":")[0]: line for line in USERRL.strip().splitlines()}
    lines |= {line.partition(":")[0]: line for line in text.splitlines()}
    config, _ = load(folder, "\n".join(lines.values()))
    for key, value in wanted.items():
        found: Any = config
        for part in key.split("."):
            found = getattr(found, part)
        assert found == value, key


def test_every_argument_has_a_class() -> None:
    """LLaMA-Factory's own and those of the installed transformers; none has two."""
    theirs = {f.name for f in fields(transformers.Seq2SeqTrainingArguments) if f.init}
    known = [name for name, _, _ in arguments()]
    assert sorted({*NAMES, *theirs} - set(known)) == []
    assert len(known) == len(set(known)) == len(KNOWN)
    keys = dict(config_keys(TrainConfig))
    assert all(key in keys for key in SAME.values())


def test_without_a_counterpart(folder: Path) -> None:
    """Each is said, with the reason and without its value, and changes nothing."""
    given = {line.partition(":")[0] for line in USERRL.splitlines()}
    plain, _ = load(folder, USERRL)
    added = "".join(f"{name}: s3cret\n" for name in IDLE if name not in given)
    config, said = load(folder, f"{USERRL}\n{added}")
    assert config == plain and "s3cret" not in "".join(said)
    assert {f"{name} has no effect: {reason}" for name, reason in IDLE.items()} <= set(said)


@pytest.mark.parametrize("name", REFUSED)
def test_another_training_is_refused(folder: Path, name: str) -> None:
    """With what to do instead."""
    with pytest.raises(UsageError) as refused:
        load(folder, f"{USERRL}\n{name}: 1\n")
    assert refused.value.what.startswith(name) and refused.value.fix == REFUSED[name]


@pytest.mark.parametrize("value", ["false", "null", "0", "none"])
def test_what_is_switched_off_is_no_hindrance(folder: Path, value: str) -> None:
    """Nor is what stands at its default."""
    off = "".join(f"{name}: {value}\n" for name in REFUSED)
    load(folder, f"{USERRL}\n{off}")
    load(folder, f"{USERRL}\nmix_strategy: concat\nmodel_revision: main\n")


@pytest.mark.parametrize("name", CHANGED)
def test_a_changed_meaning_is_explained(folder: Path, name: str) -> None:
    """Each has a line that begins with its name."""
    value = {"num_train_epochs": "2.5", "gradient_accumulation_steps": "2", "fsdp_config": "a.json",
             "deepspeed": "ds_z3.json", "split_special_tokens": "false",
             "metric_for_best_model": "rouge"}.get(name, "true")  # fmt: skip
    _, said = load(folder, USERRL, f"{name}={value}")
    start = "batch" if name == "gradient_accumulation_steps" else name
    assert any(line.startswith(f"{start}:") for line in said)


def test_the_page_has_the_table() -> None:
    """docs/llamafactory.md says of every argument what the code does with it."""
    assert table() in PAGE.read_text("utf-8"), "run: python -m tests.llamafactory_table"


def test_their_own_words_on_the_line(folder: Path) -> None:
    """`argument=value` beside the file, as their command takes it; ours win over both."""
    words = ("learning_rate=2e-5", "logging_steps=1", "save_strategy=no", "optim.clip_grad=0.5")
    config, _ = load(folder, USERRL, *words, "max_grad_norm=2")
    assert (config.optim.lr, config.trainer.log_freq, config.trainer.save_freq) == (2e-5, 1, -1)
    assert config.optim.clip_grad == 0.5
    with pytest.raises(UsageError, match="unknown key 'learning_rate'"):
        load_config(TrainConfig, ["learning_rate=1"])


def test_templates_are_compared(folder: Path) -> None:
    """A template of another family than the model's own is told; the right one is not."""
    model = folder / "model"
    model.mkdir()
    (model / "chat_template.jinja").write_text("<|im_start|>")
    text = USERRL.replace("Qwen/Qwen3-8B", str(model))
    _, right = load(folder, text)
    _, wrong = load(folder, text.replace("template: qwen3", "template: llama3"))
    (model / "chat_template.jinja").unlink()
    (model / "tokenizer_config.json").write_text('{"chat_template": "<|im_start|>"}')
    _, again = load(folder, text.replace("template: qwen3", "template: llama3"))
    assert not any("is another one" in line for line in right)
    assert wrong == again and any("llama3 is another one" in line for line in wrong)


def entry(root: Path, **changes: Any) -> dict[str, Any]:
    """The source that an entry of `dataset_info.json` becomes."""
    info = {"a": {"file_name": "merged.json", **changes}}
    (root / "data" / "dataset_info.json").write_text(json.dumps(info))
    config, _ = load(root, USERRL.replace("merged_gym_sft", "a"))
    return dict(config.data.train_files[0])


def test_entries_of_data_sets(folder: Path) -> None:
    """Names on the hub with folders, caps, directories, tags; only named columns are read."""
    assert entry(folder, formatting="sharegpt", num_samples=5, tags={"role_tag": "r"}) == {
        "path": str(Path("data") / "merged.json"),
        "name": "a",
        "columns": {"messages": "conversations", "system": "", "tools": ""},
        "format": "sharegpt",
        "tags": {"role_tag": "r"},
        "max_rows": 5,
    }
    hub = entry(folder, hf_hub_url="org/name", folder="sub", split="train", subset="default")
    assert hub["path"] == "hf://datasets/org/name/sub" and hub["format"] == "alpaca"
    assert hub["columns"]["query"] == "input" and hub["columns"]["history"] == ""
    named = entry(folder, columns={"prompt": "q", "response": "a"})
    assert named["columns"]["prompt"] == "q" and named["columns"]["query"] == ""
    openai = {"role_tag": "role", "user_tag": "user"}
    assert entry(folder, formatting="openai", tags=openai)["format"] == "verl"
    (folder / "data" / "many").mkdir()
    (folder / "data" / "many" / "1.json").write_text("[]")
    assert entry(folder, file_name="many")["path"] == [str(Path("data/many/1.json"))]
    assert entry(folder, file_name=None, cloud_file_name="s3://b/k.json")["path"].startswith("s3")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ranking": True}, "preferences"),
        ({"columns": {"chosen": "c", "rejected": "r"}}, "preferences"),
        ({"columns": {"images": "i"}}, "images is not supported"),
        ({"columns": ["prompt"]}, "not an object of names"),
        ({"subset": "en"}, "subset=en is not supported"),
        ({"split": "test"}, "split=test is not supported"),
        ({"script_url": "x", "file_name": None}, "script_url=x is not supported"),
        ({"ms_hub_url": "x"}, "ms_hub_url=x is not supported"),
        ({"file_name": None}, "no file_name"),
        ({"formatting": "chatml"}, "formatting=chatml"),
        ({"formating": "alpaca"}, "Did you mean 'formatting'"),
        ({"formatting": "openai", "columns": {"messages": "chat"}}, "messages_key=chat"),
        ({"formatting": "openai", "tags": {"user_tag": "human"}}, "has no tags"),
        ({"num_samples": "many"}, "max_samples=many"),
    ],
)
def test_entries_that_cannot_be_read(folder: Path, changes: Any, message: str) -> None:
    """Refused by field, with what to do instead."""
    with pytest.raises(UsageError, match=message):
        entry(folder, **changes)


def test_where_data_sets_are_described(folder: Path) -> None:
    """ONLINE takes names on the hub; a mapping stands for the file; else the file must be one."""
    config, _ = load(folder, USERRL + "dataset_dir: ONLINE\n")
    assert config.data.train_files[0]["path"] == "hf://datasets/merged_gym_sft"
    config, _ = load(folder, USERRL + "dataset_dir: {merged_gym_sft: {file_name: x.json}}\n")
    assert config.data.train_files[0]["path"] == str(folder / "x.json")
    for text, message in (
        ("[]", "no object"),
        ("{", "cannot read"),
        ('{"merged_gym_sft": 1}', "by an object"),
    ):
        (folder / "data" / "dataset_info.json").write_text(text)
        with pytest.raises(UsageError, match=message):
            load(folder, USERRL)


def test_a_file_with_a_val_size_is_trained_and_validated(folder: Path) -> None:
    """The rows are divided: none is on both sides, none is lost."""
    rows = [{**ALPACA_ROW, "instruction": f"{n}?", "history": []} for n in range(20)]
    (folder / "data" / "envscaler.json").write_text(json.dumps(rows))
    config, _ = load(folder, ENVSCALER + "val_size: 0.25\n")
    train, val = open_sources(config.data, cache=folder / "cache")
    options = ReadOptions(multiturn=True)
    sides = [[r.source for r in read_mix(found, options=options)] for found in (train, val[""])]
    assert [len(side) for side in sides] == [15, 5] and len({*sides[0], *sides[1]}) == 20


def test_several_sets_to_validate_on(folder: Path) -> None:
    """One loss for all of them, or one for each."""
    text = USERRL + "eval_dataset: merged_gym_sft, envscaler\n"
    config, _ = load(folder, text)
    assert [source["name"] for source in config.data.val_files] == ["merged_gym_sft", "envscaler"]
    config, _ = load(folder, text + "eval_on_each_dataset: true\n")
    assert list(config.data.val_files) == ["merged_gym_sft", "envscaler"]
    _, val = open_sources(config.data, cache=folder / "cache")
    assert list(val) == ["merged_gym_sft", "envscaler"]


@pytest.mark.parametrize(
    ("words", "ranks"), [("train", 2), ("train nproc=3", 3), ("plan", 2), ("plan world_size=5", 5)]
)
def test_a_dry_run_counts_the_ranks_that_would_start(
    folder: Path, words: str, ranks: int, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Their batch size is per process: a dry run shows the batch of the run."""
    monkeypatch.setattr(launch, "default_nproc", lambda: 2)
    (folder / "run.yaml").write_text(USERRL)
    batch = ("gradient_accumulation_steps=1", "per_device_train_batch_size=3")
    assert main([*words.split(), "--llamafactory", "run.yaml", "--dry-run", *batch]) == 0
    assert f"train_batch_size: {3 * ranks}\n" in capsys.readouterr().out


def test_inspect_takes_the_file_too(folder: Path) -> None:
    """What a run would train on can be looked at with the words of the run."""
    (folder / "run.yaml").write_text(USERRL)
    words = ("--llamafactory", "run.yaml", "optim.lr=1", "trainer.seed=3", "out=there")
    config = load_config(InspectConfig, words)
    assert config.data.max_length == 16384 and config.out == "there"
