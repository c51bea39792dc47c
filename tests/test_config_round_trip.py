"""A configuration that is printed or saved is the same when it is read back."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.test_dialects import KEYS, SCRIPTS
from verl_sft.cli import main
from verl_sft.commands.common import to_yaml
from verl_sft.config.load import load_config
from verl_sft.config.train import TrainConfig
from verl_sft.errors import UsageError


def printed(words: list[str], capsys: Any) -> str:
    """What `train --dry-run` prints as configuration."""
    assert main(["train", *words, "--dry-run"]) == 0
    return str(capsys.readouterr().out)


def script(name: str) -> list[str]:
    return [word.replace("='[", "=[").replace("]'", "]") for word in SCRIPTS[name].split()]


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_print_what_reads_back(name: str, tmp_path: Path, capsys: Any) -> None:
    """`--dry-run` of each public override list is a file that gives the same configuration."""
    text = printed(script(name), capsys)
    path = tmp_path / "config.yaml"
    path.write_text(text)
    assert load_config(TrainConfig, [f"--config={path}"]) == load_config(TrainConfig, script(name))
    assert printed([f"--config={path}"], capsys) == text


@pytest.mark.parametrize("word", KEYS.split())
def test_keys_print_what_reads_back(word: str, tmp_path: Path) -> None:
    """The same for every key of both dialects."""
    config = load_config(TrainConfig, [word])
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    assert load_config(TrainConfig, ["--config", str(path)]) == config


@pytest.mark.parametrize(
    ("word", "wanted"),
    [
        ("optim.lr=1e-5", 1e-5),
        ("optim.lr=1E-5", 1e-5),
        ("optim.lr=.5", 0.5),
        ("+optim.lr=2", 2.0),
        ("++optim.lr='1e-5'", 1e-5),
        ("trainer.experiment_name=1e-5", "1e-05"),
        ("trainer.experiment_name='1e-5'", "1e-5"),
        ("trainer.experiment_name=a b (c)", "a b (c)"),
        ('trainer.experiment_name="a, b"', "a, b"),
        ("trainer.experiment_name=caf\u00e9-\u4e2d", "caf\u00e9-\u4e2d"),
        ("trainer.experiment_name=it's", "it's"),
        ("trainer.experiment_name=a=b", "a=b"),
        ("trainer.experiment_name=a:b", "a:b"),
        ("trainer.experiment_name=#1", "#1"),
        ("trainer.experiment_name=", ""),
        ("trainer.experiment_name=''", ""),
        ("trainer.experiment_name='null'", "null"),
        ("trainer.experiment_name=${trainer.project_name}-x", "verl_sft-x"),
        ("trainer.resume_from_path=null", None),
        ("trainer.resume_from_path=", ""),
        ("model.target_modules=[q_proj, v_proj]", ["q_proj", "v_proj"]),
        ("model.target_modules='[q_proj,v_proj]'", "[q_proj,v_proj]"),
        ("data.prompt_dict_keys=[]", []),
        ("data.prompt_dict_keys=null", None),
        ("data.prompt_dict_keys=a", ["a"]),
        ("data.train_files=/data/my files/a.parquet", "/data/my files/a.parquet"),
        ("data.train_files=['/a b/c.parquet',d.parquet]", ["/a b/c.parquet", "d.parquet"]),
        ("data.train_files={path: a.json, fraction: 0.5}", {"path": "a.json", "fraction": 0.5}),
        ("data.shuffle=False", False),
        ("data.shuffle=no", False),
        ("trainer.save_freq=10", 10),
        ("~optim.lr", 1e-5),
        ("~optim.lr=3", 1e-5),
    ],
)  # fmt: skip
def test_values_as_they_are_written(word: str, wanted: Any, tmp_path: Path) -> None:
    """Numbers, quotes, spaces, unicode, nulls, lists, references; each reads back unchanged."""
    config = load_config(TrainConfig, [word])
    value: Any = config
    for part in word.lstrip("+~").partition("=")[0].split("."):
        value = getattr(value, part)
    assert value == wanted and type(value) is type(wanted)
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    assert load_config(TrainConfig, [f"--config={path}"]) == config


@settings(max_examples=150, deadline=None)
@given(text=st.text(st.characters(blacklist_categories=["Cs"]), max_size=20))
def test_any_text_in_quotes(text: str) -> None:
    """A quoted value is that text, but for references, which OmegaConf reads everywhere."""
    quoted = text.replace("\\", "\\\\").replace("'", "\\'")
    if "${" in text or "\0" in text:
        return
    try:
        config = load_config(TrainConfig, [f"trainer.experiment_name='{quoted}'"])
    except UsageError:
        return
    again = load_config(TrainConfig, [], values=asdict(config))
    assert again == config


def test_the_last_of_two_words_wins_in_any_order() -> None:
    """A key given twice, also in two dialects, has its last value; order of others is free."""
    first = load_config(TrainConfig, ["optim.lr=1", "data.max_length=9", "optim.lr=2"])
    assert first == load_config(TrainConfig, ["data.max_length=9", "optim.lr=2"])
    twice = load_config(TrainConfig, ["model.path=a", "model.partial_pretrain=b"])
    assert twice.model.partial_pretrain == "b"
    again = load_config(TrainConfig, ["model.partial_pretrain=b", "model.path=a"])
    assert again.model.partial_pretrain == "a"


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("trainer.experiment_name=${nothing.there}", "nothing.there"),
        ("trainer.experiment_name=${trainer.experiment_name}", "Recursive"),
        ("optim.lr=", "optim.lr"),
        ("optim.lr=fast", "optim.lr"),
        ("optim.lr=null", "optim.lr"),
        ("data.max_length=1.5", "data.max_length"),
        ("data.max_length=true", "data.max_length"),
        ("=3", "unknown key ''"),
        ("optim.=3", "optim."),
        (".lr=3", ".lr"),
        ("optim..lr=3", "optim..lr"),
        ("optim.lr.x=3", "optim.lr.x"),
        ("optim.lr=1,2", "more than one value"),
        ("model.pth=a", "model.path"),
        ("engine.ulyses_sequence_parallel_size=2", "ulysses_sequence_parallel_size"),
        ("~optim.lrr", "optim.lr"),
        ("+model.override_config.rope_theta=1", "config.json"),
    ],
)
def test_words_that_cannot_be_read(word: str, message: str) -> None:
    """One error that names the word or the nearest key; nothing else is raised."""
    with pytest.raises(UsageError) as refused:
        load_config(TrainConfig, [word])
    assert message in str(refused.value)
