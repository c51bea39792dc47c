"""Data behind URLs: fetched once, by version, named without secrets when it fails."""

from __future__ import annotations

from pathlib import Path

import fsspec
import pytest

from verl_sft.errors import InputError
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
