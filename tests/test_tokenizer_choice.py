"""Another tokenizer folder and another chat template than the model's own."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.train_ranks import toy_model
from verl_sft.audit.inspect import inspect
from verl_sft.config.inspect import InspectConfig
from verl_sft.config.load import load_config
from verl_sft.config.train import ModelConfig
from verl_sft.data.tokenizer import chatml
from verl_sft.errors import UsageError
from verl_sft.model.build import load_tokenizer

CHAT = [{"role": "user", "content": "a"}]
MARKED = chatml().replace("<|im_start|>", "<|im_start|>#")


def test_the_given_template_is_used(tmp_path: Path) -> None:
    """As text or as a file; the tokenizer that a run exports carries it."""
    model = str(toy_model(tmp_path))
    (tmp_path / "own.jinja").write_text(MARKED)
    for given in (MARKED, str(tmp_path / "own.jinja")):
        tokenizer = load_tokenizer(ModelConfig(model, custom_chat_template=given))
        text = tokenizer.apply_chat_template(CHAT, tokenize=False)
        assert text.startswith("<|im_start|>#user")
    with pytest.raises(UsageError, match="no such file"):
        load_tokenizer(ModelConfig(model, custom_chat_template="nowhere.jinja"))


def test_a_tokenizer_of_another_folder(tmp_path: Path) -> None:
    """The files of `model.tokenizer_path` alone are read."""
    model = toy_model(tmp_path)
    other = tmp_path / "tokenizer"
    other.mkdir()
    for path in model.glob("*token*"):
        shutil.copy(path, other)
    template = next(model.glob("chat_template*"), None)
    if template:
        shutil.copy(template, other)
    for path in model.glob("*token*"):
        path.unlink()
    config = ModelConfig(str(model), tokenizer_path=str(other))
    with pytest.raises(UsageError):
        load_tokenizer(ModelConfig(str(model)))
    assert len(load_tokenizer(config)) > 200


def test_inspect_shows_the_given_template(tmp_path: Path) -> None:
    """What is shown is what a run with the same keys would train on."""
    config = load_config(
        InspectConfig,
        ["data.train_files=data/sample", "data.multiturn.enable=true", "data.max_length=9000",
         f"out={tmp_path / 'audit'}", "show=1", "max_rows=2"],
        values={"model.partial_pretrain": str(toy_model(tmp_path)),
                "model.custom_chat_template": MARKED},
    )  # fmt: skip
    store, _ = inspect(config)
    tokenizer = load_tokenizer(config.model)
    assert "#user" in tokenizer.decode(store[0].input_ids)
