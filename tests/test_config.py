"""`key=value` words become a validated tree, or an error that says what to write instead."""

from __future__ import annotations

from pathlib import Path

import pytest

from verl_sft.config.collect import CollectConfig, EvaluateConfig, MakeGamesConfig
from verl_sft.config.convert import ConvertConfig
from verl_sft.config.export import ExportConfig
from verl_sft.config.inspect import InspectConfig
from verl_sft.config.load import config_keys, load_config
from verl_sft.config.train import TrainConfig
from verl_sft.errors import UsageError

# Override lists as they stand in public verl scripts, both dialects.
LEGACY = """data.train_files=/d/train.parquet data.val_files=/d/test.parquet
data.prompt_key=extra_info data.response_key=extra_info optim.lr=1e-4
data.prompt_dict_keys=['question']
+data.response_dict_keys=['answer'] data.micro_batch_size=4
model.partial_pretrain=Qwen/Qwen2.5-0.5B-Instruct trainer.default_local_dir=/o
trainer.project_name=gsm8k-sft trainer.experiment_name=gsm8k-sft-qwen-2.5-0.5b-instruct-sp2
trainer.logger=console trainer.total_training_steps=1 ulysses_sequence_parallel_size=1
use_remove_padding=true model.lora_rank=32 model.lora_alpha=16 model.target_modules=all-linear
model.target_modules=[q_proj,v_proj] model.strategy=fsdp trainer.default_hdfs_dir=null
model.use_liger=False optim.warmup_steps_ratio=0.05 optim.clip_grad=1.0""".split()
ENGINE = """engine=fsdp optim=fsdp optim.lr=2e-5 optim.lr_warmup_steps_ratio=0.01
optim.weight_decay=0.1 optim.betas=[0.9,0.95] optim.clip_grad=1.0 optim.min_lr_ratio=0.1
optim.warmup_style=cosine engine.ulysses_sequence_parallel_size=1 engine.strategy=fsdp2
engine.fsdp_size=-1 optim.lr_warmup_init=0 optim.lr_decay_style=cosine optim.min_lr=2e-6
engine.tensor_model_parallel_size=1 engine.use_mbridge=True data.train_files=/d/t.parquet
data.train_batch_size=96 data.max_length=2048 data.pad_mode=no_padding data.truncation=error
data.use_dynamic_bsz=True data.max_token_len_per_gpu=65536 model.path=Qwen/Qwen3-0.6B
model.use_remove_padding=true trainer.test_freq=-1 trainer.save_freq=4000
trainer.logger=['console','wandb'] trainer.total_epochs=10 trainer.default_local_dir=/o
trainer.resume_mode=auto trainer.max_ckpt_to_keep=5
checkpoint.save_contents=[model,optimizer,extra]""".split()


def test_a_legacy_script_runs_unchanged() -> None:
    """Every override of the list is read; the last of two wins; `+` on a known key is fine."""
    said: list[str] = []
    config = load_config(TrainConfig, LEGACY, say=said.append)
    assert config.data.prompt_dict_keys == ["question"]
    assert config.data.response_dict_keys == ["answer"]
    assert config.data.micro_batch_size_per_gpu == 4
    assert config.model.target_modules == ["q_proj", "v_proj"]
    assert config.engine.strategy == "fsdp"
    assert config.optim.lr_warmup_steps_ratio == 0.05
    assert any("trainer.default_hdfs_dir has no effect" in line for line in said)


def test_an_engine_script_runs_unchanged() -> None:
    """The engine dialect's keys reach the same fields; keys without effect are said."""
    said: list[str] = []
    config = load_config(TrainConfig, ENGINE, say=said.append)
    assert config.model.partial_pretrain == "Qwen/Qwen3-0.6B"
    assert config.data.max_token_len_per_gpu == 65536
    assert config.optim.lr_scheduler == "cosine"
    assert config.trainer.logger == ["console", "wandb"]
    assert sum("has no effect" in line for line in said) >= 6


def test_interpolation_is_resolved() -> None:
    """The default output folder follows project and experiment."""
    config = load_config(TrainConfig, ["trainer.project_name=p", "trainer.experiment_name=e"])
    assert config.trainer.default_local_dir == "checkpoints/p/e"


def test_section_shorthand() -> None:
    """`env=NAME` and `policy=NAME` name the section's subject."""
    config = load_config(CollectConfig, ["env=mine", "policy=hf", "env_args.x=[1,2]"])
    assert (config.env.name, config.policy.name) == ("mine", "hf")
    assert config.env_args == {"x": [1, 2]}
    assert load_config(EvaluateConfig, ["model=/m"]).model == "/m"


@pytest.mark.parametrize(
    "value", ["/a b/c", "/a(b)", "s3://x/y?z", "/a#b", "a=b", "/a/b.c-d", "it's"]
)
def test_paths_as_a_shell_user_writes_them(value: str) -> None:
    """Characters that Hydra's grammar reserves need no second quoting."""
    assert load_config(CollectConfig, [f"output.dir={value}"]).output.dir == value


def test_a_home_path_is_expanded() -> None:
    """The shell leaves `~` alone behind `key=`; elsewhere in a value it is a character."""
    config = load_config(CollectConfig, ["output.dir=~/x", "output.name=~x"])
    assert config.output.dir == str(Path.home() / "x") and config.output.name == "~x"


def test_one_word_is_a_list_of_one() -> None:
    """A list key takes a single name without brackets."""
    config = load_config(CollectConfig, ["env.task_types=look_at_obj_in_light"])
    assert config.env.task_types == ["look_at_obj_in_light"]


@pytest.mark.parametrize(
    ("schema", "word", "message"),
    [
        (TrainConfig, "data.max_lenght=3", "Did you mean data.max_length"),
        (TrainConfig, "+data.typo=1", "unknown key 'data.typo'"),
        (TrainConfig, "max_length=3", "data.max_length"),
        (TrainConfig, "data.max_length=abc", "could not be converted"),
        (TrainConfig, "data.max_length=0", "at least 2"),
        (TrainConfig, "data.truncation=eror", "Did you mean 'error'"),
        (TrainConfig, "optim.lr=[1", "cannot read"),
        (TrainConfig, "nonsense", "key=value"),
        (CollectConfig, "policy.noise=1.5", "between 0 and 1"),
        (CollectConfig, "env.split=test", "valid_unseen"),
        (TrainConfig, "trainer.seed=-1", "between 0 and"),
        (TrainConfig, "data.num_workers=-1", "at least 0"),
        (TrainConfig, "data.train_max_samples=0", "leaves no row"),
        (ConvertConfig, "max_rows=-5", "leaves no row"),
        (InspectConfig, "max_rows=0", "leaves no row"),
        (TrainConfig, "optim.lr=inf", "at least 0"),
        (TrainConfig, "optim.clip_grad=-1", "at least 0"),
        (TrainConfig, "optim.betas=[0.9]", "two numbers"),
        (TrainConfig, "optim.betas=[2,3]", "two numbers"),
        (TrainConfig, "trainer.save_freq=often", "after_each_epoch"),
        (TrainConfig, "trainer.test_freq=1.5", "after_each_epoch"),
        (TrainConfig, "trainer.save_freq=true", "after_each_epoch"),
        (TrainConfig, "trainer.save_freq=-2", "after_each_epoch"),
        (TrainConfig, "data.mask.content=-1", "at least 0"),
        (TrainConfig, "trainer.max_shard_size=5", "such as 5GB"),
        (ExportConfig, "max_shard_size=big", "such as 5GB"),
        (TrainConfig, "trainer.total_training_steps=0", "at least 1"),
        (TrainConfig, "trainer.max_ckpt_to_keep=0", "at least 1"),
        (CollectConfig, "rollout.num_episodes=99999999999", "between 1 and"),
        (CollectConfig, "filter.max_steps=-5", "at least 1"),
        (CollectConfig, "output.name=../elsewhere", "output.dir"),
        (CollectConfig, "output.name=/tmp/elsewhere", "output.dir"),
        (MakeGamesConfig, "num_valid=-1", "between 0 and"),
        (MakeGamesConfig, "num_workers=0", "at least 1"),
        (CollectConfig, "--config", "file name"),
        (CollectConfig, "--config=nowhere.yaml", "no such configuration file"),
    ],
)  # fmt: skip
def test_a_wrong_word_is_an_error_that_helps(schema: type, word: str, message: str) -> None:
    """Each mistake names itself and what to write instead."""
    with pytest.raises(UsageError) as caught:
        load_config(schema, [word])
    assert message in str(caught.value)


@pytest.mark.parametrize("text", [b"a: [1", b"env: {}\nenv: {}", b"\xff\xfe", b"- 1"])
def test_a_broken_file_is_named(text: bytes, tmp_path: Path) -> None:
    """Not YAML, a key given twice, not text, no keys: the file is named, without a traceback."""
    path = tmp_path / "keys.yaml"
    path.write_bytes(text)
    with pytest.raises(UsageError, match=r"keys\.yaml"):
        load_config(CollectConfig, [f"--config={path}"])


def test_words_win_over_the_file(tmp_path: Path) -> None:
    """`--config FILE` first, then the words, wherever they stand."""
    path = tmp_path / "c.yaml"
    path.write_text("rollout:\n  seed: 5\n  max_steps: 7\n", encoding="utf-8")
    config = load_config(CollectConfig, ["rollout.seed=6", "--config", str(path)])
    assert (config.rollout.seed, config.rollout.max_steps) == (6, 7)


def test_every_key_is_reachable() -> None:
    """The walk that backs the error messages sees nested keys and sections."""
    keys = dict(config_keys(TrainConfig))
    assert keys["data.multiturn.enable"] is None and keys["data.multiturn"] is not None


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        (CollectConfig, ["policy=expert", "policy.constrain=admissible"]),
        (CollectConfig, ["policy=expert", "policy.temperature=0.5"]),
        (EvaluateConfig, ["policy.noise=0.1"]),
    ],
)
def test_a_key_that_the_policy_cannot_follow_is_refused(schema: type, words: list[str]) -> None:
    """Named with the key; a policy imported by name may read all of them."""
    with pytest.raises(UsageError, match=words[-1].partition("=")[0]):
        load_config(schema, words)
    load_config(schema, ["policy=my.module:policy", *words[-1:]])
