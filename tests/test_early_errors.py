"""Wrong options are refused before a row is read or a model loaded, with key and way out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.train_ranks import toy_model
from verl_sft.config import hub
from verl_sft.config.load import load_config
from verl_sft.config.train import TrainConfig
from verl_sft.errors import UsageError, VerlSftError
from verl_sft.model.build import load_tokenizer
from verl_sft.model.lora import add_lora
from verl_sft.model.meta import empty_model
from verl_sft.trainer import inputs
from verl_sft.trainer.dry_run import dry_run
from verl_sft.trainer.idle_options import idle_options

TARGETS = "model.lora_rank=4 model.target_modules="

# What is written, and what the one message has to name.
TABLE = [
    # Paths.
    ("data.train_files=/nowhere", "data.train_files: /nowhere: no such file"),
    ("data.train_files=[]", "data.train_files: no training data given"),
    ("data.train_files=[{data},/no.parquet]", "data.train_files: /no.parquet"),
    ("data.val_files=/nowhere/v.parquet", "data.val_files: /nowhere/v.parquet: no such file"),
    ("data.val_files={{a: /nowhere/v.parquet}}", "data.val_files: /nowhere/v.parquet"),
    ("data.val_files={data}", "data.val_files: {data}: the directory holds no val.parquet"),
    ("data.val_files={{a/b: {data}}}", "cannot be called 'a/b'"),
    ("model.partial_pretrain=/nowhere", "model.partial_pretrain=/nowhere: no such folder"),
    ("model.partial_pretrain={data}", "model.partial_pretrain={data}: no config.json"),
    ("model.partial_pretrain=null", "model.partial_pretrain: no model given"),
    ("model.tokenizer_path=/nowhere", "model.tokenizer_path=/nowhere: no such folder"),
    ("model.tokenizer_path={data}", "model.tokenizer_path={data}: no tokenizer.json"),
    ("model.custom_chat_template=/nowhere.jinja", "model.custom_chat_template=/nowhere.jinja"),
    ("model.lora_adapter_path=/nowhere", "model.lora_adapter_path=/nowhere"),
    ("trainer.resume_mode=resume_path", "trainer.resume_from_path"),
    (
        "trainer.resume_mode=resume_path trainer.resume_from_path={data}",
        "trainer.resume_from_path={data}: no such checkpoint",
    ),
    ("trainer.env_eval_freq=1 trainer.env_eval_data_dir=/nowhere", "env_eval_data_dir=/nowhere"),
    ("trainer.env_eval_freq=1", "trainer.env_eval_data_dir"),
    ("trainer.default_local_dir=''", "trainer.default_local_dir"),
    ("data.cache_dir=/dev/null/x", "data.cache_dir: /dev/null/x"),
    ("trainer.upload_uri=nope://x", "nope://"),
    ("trainer.upload_uri=s3://", "trainer.upload_uri"),
    ("trainer.upload_uri=hf://user", "hf://user/repo"),
    ("trainer.upload_uri=file:///dev/null/x", "trainer.upload_uri=file:///dev/null/x"),
    # Names, with the nearest one.
    ("data.format=shargpt", "data.format=shargpt: .*Did you mean 'sharegpt'"),
    (
        "data.train_files={{path: {data}/train.parquet, format: shargpt}}",
        "data.train_files: format=shargpt: .*'sharegpt'",
    ),
    ("data.raw.prompt=compct", "data.raw.prompt: .*'compact'"),
    ("data.truncation=lft", "data.truncation=lft.*'left'"),
    ("optim.optimizer=AdamX", "optim.optimizer=AdamX.*AdamW|optim.optimizer=AdamX.*Adam"),
    ("optim.optimizer_impl=torch.optm", "optim.optimizer_impl=torch.optm.*torch.optim"),
    ("optim.lr_scheduler=cosin", "optim.lr_scheduler=cosin.*'cosine'"),
    ("optim.override_optimizer_config={{foo: 1}}", "optim.override_optimizer_config.foo"),
    ("optim.override_optimizer_config={{amsgrad: 5}}", "optim.override_optimizer_config"),
    ("model.attn_implementation=spda", "model.attn_implementation=spda"),
    ("trainer.best_metric=val/los", "trainer.best_metric=val/los: .*'val/loss'"),
    ("trainer.best_metric=val/unseen/loss", "trainer.best_metric"),
    ("trainer.best_metric=env/success_rate", "trainer.env_eval_freq"),
    ("trainer.best_metric=val/loss_kind/actoin", "'val/loss_kind/action'"),
    (f"{TARGETS}[q_proj,v_prj]", "model.target_modules=.*'v_prj' matches nothing.*'v_proj'"),
    (f"{TARGETS}q_prj", "model.target_modules=q_prj.*'q_proj'"),
    (f"{TARGETS}'('", "model.target_modules=.*no regular expression"),
    (f"{TARGETS}[]", "model.target_modules=.*names no layer"),
    (f"{TARGETS}5", "model.target_modules=5: names no layer"),
    (f"{TARGETS}[norm]", "model.target_modules=.*RMSNorm.*q_proj"),
    (f"{TARGETS}[lm_head]", "lm_head cannot have an adapter"),
    (f"{TARGETS}[embed_tokens]", "embed_tokens cannot have an adapter"),
    (f"{TARGETS}all-linear model.exclude_modules=[q_prj]", "model.exclude_modules=.*'q_proj'"),
    (f"{TARGETS}all-linear model.exclude_modules=.*", "model.exclude_modules=.* leaves no layer"),
    (f"{TARGETS}[] model.target_parameters=[q_proj.wight]", "'q_proj.weight'"),
    # Numbers.
    ("data.max_token_len_per_gpu=0", "data.max_token_len_per_gpu=0"),
    ("data.max_token_len_per_gpu=100", "data.max_token_len_per_gpu=100 is smaller"),
    ("data.val_max_samples=0", "data.val_max_samples=0"),
    ("data.train_max_samples=-7", "data.train_max_samples=-7"),
    ("model.lora_rank=4 model.lora_alpha=0", "model.lora_alpha=0"),
    ("model.lora_rank=4 model.lora_dropout=1", "model.lora_dropout=1"),
    ("model.lora_rank=4 optim.loraplus_lr_ratio=0", "optim.loraplus_lr_ratio=0"),
    ("trainer.seed=99999999999999999999", "trainer.seed"),
    ("trainer.max_shard_size=0GB", "trainer.max_shard_size=0GB"),
    ("ulysses_sequence_parallel_size=3", "ulysses_sequence_parallel_size=3 does not divide"),
    ("engine.fsdp_size=0", "engine.fsdp_size=0 does not divide"),
    # Without what they need.
    ("trainer.early_stop_patience=2 data.val_files=none", "trainer.early_stop_patience needs"),
    ("trainer.export_best=true data.val_files=none", "trainer.export_best needs"),
    ("trainer.save_best=true", "trainer.save_best needs"),
    ("model.quantization=nf4", "model.lora_rank"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_model(tmp_path_factory.mktemp("model"))


def config_of(model: Path, out: Path, *words: str) -> TrainConfig:
    defaults = [
        f"model.partial_pretrain={model}",
        f"data.train_files={model.parent / 'data'}",
        f"trainer.default_local_dir={out}",
        "data.multiturn.enable=true",
        "data.max_length=256",
        "trainer.device=cpu",
    ]
    return load_config(TrainConfig, [*defaults, *words])


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a row fails the test; so does loading a model, which comes later."""

    def read(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("rows are read")

    monkeypatch.setattr(inputs, "load_samples", read)
    monkeypatch.delenv("ALFWORLD_DATA", raising=False)


def test_the_table_can_fail(model: Path, tmp_path: Path, no_work: None) -> None:
    """Negative control: right options come as far as the rows."""
    with pytest.raises(AssertionError, match="rows are read"):
        dry_run(config_of(model, tmp_path), world_size=2)


@pytest.mark.parametrize(("words", "message"), TABLE, ids=[words for words, _ in TABLE])
def test_wrong_options(
    model: Path, tmp_path: Path, no_work: None, words: str, message: str
) -> None:
    """One message that names the key, exit code 2 (5 where a directory cannot be made)."""
    data = str(model.parent / "data")
    parts = words.format(data=data).split(" ") if ": " not in words else [words.format(data=data)]
    with pytest.raises(VerlSftError, match=message.format(data=data)) as error:
        dry_run(config_of(model, tmp_path, *parts), world_size=2)
    assert error.value.exit_code == (5 if "cannot write" in str(error.value) else 2)


def test_targets_are_checked_on_meta_tensors(model: Path, tmp_path: Path) -> None:
    """No memory is taken for a model whose names are asked; right targets pass."""
    words = ["model.lora_rank=2", "model.target_modules=[q_proj,down_proj]"]
    config = config_of(model, tmp_path, *words).model
    empty = empty_model(config, path=str(model))
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    adapted = add_lora(empty, config=config)
    trained = {n for n, p in adapted.named_parameters() if p.requires_grad}
    assert trained and all("q_proj" in name or "down_proj" in name for name in trained)


def test_a_hub_that_does_not_answer(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Is asked at most twice, however many files are wanted; the cache and folders still serve."""
    from huggingface_hub import constants, utils

    asked = []

    class Client:
        def head(self, url: str, *, timeout: float) -> None:
            asked.append((url, timeout))
            raise OSError("no route")

    cache = tmp_path / "cache"
    (cache / "models--qwen--some-model").mkdir(parents=True)
    monkeypatch.setattr(utils, "get_session", Client)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    hub._answers.cache_clear()
    try:
        with pytest.raises(UsageError, match="qwen/some-model") as error:
            load_tokenizer(config_of(Path("qwen/some-modl"), tmp_path).model)
        assert "does not answer" in str(error.value) and "no such folder" in str(error.value)
        assert len(asked) == 2 and all(timeout <= 5 for _, timeout in asked)
        assert not constants.HF_HUB_OFFLINE  # an upload at the end may find the hub again
        assert len(load_tokenizer(config_of(model, tmp_path).model))
        assert len(asked) == 2
    finally:
        hub._answers.cache_clear()


def test_a_hub_that_answers_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the status: nothing is switched off."""
    from huggingface_hub import constants, utils

    class Client:
        def head(self, url: str, *, timeout: float) -> int:
            return 403

    monkeypatch.setattr(utils, "get_session", Client)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub._answers.cache_clear()
    try:
        with hub.hub_access("user/name"):
            assert not constants.HF_HUB_OFFLINE
        assert hub.absence("user/name") == ""
    finally:
        hub._answers.cache_clear()


@pytest.mark.parametrize(
    "word",
    [
        "data.prompt_key=x",
        "data.mongo.filter=x",
        "data.val_seed=3",
        "model.target_modules=[q_proj]",
        "model.lora_alpha=8",
        "engine.fsdp_size=4",
        "optim.loraplus_lr_ratio=4",
        "optim.min_lr_ratio=0.5",
        "optim.betas=[0.8,0.9]",
        "trainer.export_best=true",
        "trainer.upload_uri=file:///tmp/x",
        "trainer.env_eval_data_dir=/x",
        "trainer.early_stop_min_delta=1",
        "trainer.early_stop_patience=2",
        "trainer.max_skipped_steps=3",
    ],
)
def test_options_without_effect_are_said(word: str) -> None:
    """One line that begins with the key; with its default nothing is said."""
    beside = {
        "data.prompt_key": ["data.multiturn.enable=true"],
        "optim.min_lr_ratio": ["optim.lr_scheduler=constant"],
        "optim.betas": ["optim.optimizer=SGD"],
        "trainer.export_best": ["trainer.export=false"],
        "trainer.upload_uri": ["trainer.export=false"],
        "trainer.early_stop_patience": ["trainer.test_freq=-1"],
    }
    key = word.partition("=")[0]
    more = beside.get(key, [])

    def said(*words: str) -> list[str]:
        return idle_options(load_config(TrainConfig, words), on_gpu=False, world_size=2)

    assert said(*more) == []
    (line,) = said(word, *more)
    assert line.startswith(f"{key} has no effect")
