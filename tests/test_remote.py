"""Data behind URLs: fetched once, by version, named without secrets when it fails."""

from __future__ import annotations

from pathlib import Path

import fsspec
import pytest

from verl_sft.cli import main
from verl_sft.config.export import ExportConfig
from verl_sft.config.secrets import hidden, hide, reveal
from verl_sft.config.train import DataConfig, TrainConfig, TrainerConfig
from verl_sft.errors import InputError, UsageError
from verl_sft.records.resolve import resolve_files


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> fsspec.AbstractFileSystem:
    monkeypatch.setenv("VERL_SFT_CACHE", str(tmp_path / "cache"))
    memory = fsspec.filesystem("memory")
    memory.pipe("/set/train.jsonl", b"{}\n")
    memory.pipe("/set/val.jsonl", b"{}\n{}\n")
    memory.pipe("/set/notes.txt", b"no data")
    yield memory
    memory.rm("/set", recursive=True)


def test_files_directories_and_globs(store: fsspec.AbstractFileSystem) -> None:
    """A file, a directory's split and a glob become local files with the same bytes."""
    (path,) = resolve_files("memory://set/train.jsonl", split="train")
    assert path.read_bytes() == b"{}\n" and path.name == "train.jsonl"
    (of_split,) = resolve_files("memory://set", split="train")
    assert (of_split.name, of_split.read_bytes()) == ("train.jsonl", b"{}\n")
    assert resolve_files("memory://set", split="val")[0].read_bytes() == b"{}\n{}\n"
    assert len(resolve_files("memory://set/*.jsonl", split="other")) == 2


def test_a_new_version_is_fetched_anew(store: fsspec.AbstractFileSystem) -> None:
    """The copy of an older version is never read for the newer one."""
    (old,) = resolve_files("memory://set/train.jsonl", split="train")
    again = resolve_files("memory://set/train.jsonl", split="train")
    assert again == [old]
    store.pipe("/set/train.jsonl", b'{"a": 1}\n')
    (new,) = resolve_files("memory://set/train.jsonl", split="train")
    assert new.read_bytes() == b'{"a": 1}\n' and old.read_bytes() == b"{}\n"


@pytest.mark.parametrize(
    "url", ["memory://nowhere/a.jsonl", "nosuch://user:word@host/a.jsonl", "memory://set/notes.md"]
)
def test_what_cannot_be_read_is_named_without_secrets(
    store: fsspec.AbstractFileSystem, url: str
) -> None:
    """Missing files and unknown kinds are errors; a password is never shown."""
    with pytest.raises(InputError) as error:
        resolve_files(url, split="train")
    assert "word" not in str(error.value) and "://" in str(error.value)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("ftp://ann:s3cret@host/a.jsonl", "ftp://***@host/a.jsonl"),
        ("ftp://ann@host:21/a", "ftp://***@host:21/a"),
        ("s3://KEY:s3/cr+et@bucket/a@b", "s3://***@b"),  # as long as a password could be
        ("simplecache::s3://KEY:s3cret@bucket/a", "simplecache::s3://***@bucket/a"),
        ("zip://a.csv::ftp://ann:s3cret@host/a.zip", "zip://a.csv::ftp://***@host/a.zip"),
        ("mongodb://ann:p/@s3cret@h1,h2/own", "mongodb://***@h1,h2/own"),
        # Addresses without a secret stay as they are.
        ("hf://datasets/ann/set@main/a.parquet", "hf://datasets/ann/set@main/a.parquet"),
        ("hdfs://name:8020/sets/a@b.parquet", "hdfs://name:8020/sets/a@b.parquet"),
        ("abfs://box@account.dfs.core.windows.net/a", "abfs://box@account.dfs.core.windows.net/a"),
        ("data/a@b.jsonl", "data/a@b.jsonl"),
    ],
)
def test_an_address_is_shown_without_its_password(url: str, shown: str) -> None:
    """Only the process that was given it can open it; what is no password is kept."""
    assert hidden(f"cannot read '{url}'") == f"cannot read '{shown}'"
    assert hide(url) == hidden(url) == shown and reveal(shown) == url


def test_configs_hold_no_password(capsys: pytest.CaptureFixture[str]) -> None:
    """Data sets, held-out sets and places to upload to, as saved, printed and sent to trackers."""
    url, shown = "ftp://ann:s3cret@host/place", "ftp://***@host/place"
    data = DataConfig(train_files=[{"path": url, "weight": 2}, url], val_files={"own": url})
    config = TrainConfig(data=data, trainer=TrainerConfig(upload_uri=url))
    assert "s3cret" not in repr(config) + repr(ExportConfig(upload=url))
    assert data.train_files == [{"path": shown, "weight": 2}, shown]
    for words in (["train", f"data.train_files={url}"], ["train", f"trainer.upload_uri={url}"],
                  ["convert", f"in={url}"], ["stats", f"in={url}", f"against=[{url}]"],
                  ["upload", f"in={url}"], ["export", f"upload={url}"]):  # fmt: skip
        assert main([*words, "--dry-run"]) == 0
        told = capsys.readouterr()
        assert shown in told.out and "s3cret" not in told.out + told.err


def test_a_hidden_address_is_opened(store: fsspec.AbstractFileSystem) -> None:
    """As it was given; one from a saved config has lost its password, and says so."""
    real = "memory://ann:s3cret@set/train.jsonl"
    store.pipe("/ann:s3cret@set/train.jsonl", b"[]")
    (path,) = resolve_files(hide(real), split="train")
    assert path.read_bytes() == b"[]"
    store.rm("/ann:s3cret@set", recursive=True)
    with pytest.raises(UsageError, match="lost its password"):
        resolve_files("memory://***@never/train.jsonl", split="train")
