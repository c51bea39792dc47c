"""`verl-sft export` and uploads: a checkpoint becomes a folder without the data of its run."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from tests.train_ranks import run_ranks, toy_config, toy_model
from verl_sft.cli import main
from verl_sft.errors import StorageError, UsageError
from verl_sft.export.hf import reopened_logits
from verl_sft.export.upload import check_target, try_upload, upload
from verl_sft.trainer.exporting import find_checkpoint, read_run_config

PROBE = torch.arange(3, 20)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_model(tmp_path_factory.mktemp("model"))


def trained(model: Path, out: Path, *, size: int, **changes: Any) -> Path:
    """A finished run with its own export, which is the expectation."""
    config = toy_config(model, out, trainer__export=True, optim__lr=1e-2, **changes)
    config.trainer.total_training_steps = 3
    reports = run_ranks(config, size=size)
    assert [r["code"] for r in reports] == [0] * size, reports
    return out


@pytest.fixture(scope="module")
def full(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(model, tmp_path_factory.mktemp("full") / "run", size=2)


@pytest.fixture(scope="module")
def lora(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    changes = {"model__lora_rank": 4, "model__lora_alpha": 24}
    return trained(model, tmp_path_factory.mktemp("lora") / "run", size=2, **changes)


def test_a_checkpoint_gives_the_export_of_its_run(full: Path, tmp_path: Path) -> None:
    """Shards of two ranks in one process: the same weights, and what the run noted of its data."""
    out = tmp_path / "out"
    assert main(["export", f"checkpoint={full / 'global_step_3'}", f"out={out}"]) == 0
    assert torch.equal(reopened_logits(out, PROBE), reopened_logits(full / "huggingface", PROBE))
    facts = json.loads((out / "verl_sft.json").read_text())
    assert facts["history_style"] == "windowed" and facts["checkpoint_step"] == 3
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["max_logit_difference"] == 0.0 and "model.safetensors" in manifest["files"]


def test_a_run_directory_means_its_newest_checkpoint(full: Path) -> None:
    """Without a step the newest whole checkpoint is taken, and named in the folder."""
    assert main(["export", f"checkpoint={full}"]) == 0
    assert (full / "huggingface_step3" / "config.json").is_file()


def test_lora_with_and_without_the_base(lora: Path, tmp_path: Path) -> None:
    """merge=true equals the run's export; merge=false is the adapter with its alpha, verified."""
    words = ["export", f"checkpoint={lora}"]
    assert main([*words, f"out={tmp_path / 'merged'}"]) == 0
    assert torch.equal(
        reopened_logits(tmp_path / "merged", PROBE), reopened_logits(lora / "huggingface", PROBE)
    )
    assert main([*words, f"out={tmp_path / 'alone'}", "merge=false"]) == 0
    alone = tmp_path / "alone"
    assert not list(alone.glob("*.safetensors")) and (alone / "tokenizer.json").is_file()
    settings = json.loads((alone / "adapter" / "adapter_config.json").read_text())
    assert settings["lora_alpha"] == 24 and settings["r"] == 4
    assert json.loads((alone / "manifest.json").read_text())["lora_merged"] is False


def test_large_models_are_cut_into_files(full: Path, tmp_path: Path) -> None:
    """max_shard_size gives several files and an index that transformers reads."""
    out = tmp_path / "cut"
    assert main(["export", f"checkpoint={full}", f"out={out}", "max_shard_size=100KB"]) == 0
    files = sorted(out.glob("model-*.safetensors"))
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert len(files) > 1 and set(index["weight_map"].values()) == {f.name for f in files}
    assert torch.equal(reopened_logits(out, PROBE), reopened_logits(full / "huggingface", PROBE))


def test_what_cannot_be_exported_is_named(
    full: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """No checkpoint, a damaged one, no configuration beside it, another base model."""
    assert main(["export", f"checkpoint={tmp_path}"]) == 2
    assert "no checkpoint there" in capfd.readouterr().err
    run = Path(shutil.copytree(full, tmp_path / "run"))
    shard = next((run / "global_step_3").glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(bytes(data))
    assert main(["export", f"checkpoint={run / 'global_step_3'}"]) == 5
    assert shard.name in capfd.readouterr().err
    with pytest.raises(StorageError):
        find_checkpoint(run / "global_step_3", say=print)
    with pytest.raises(UsageError, match=r"train_config\.json"):
        read_run_config(tmp_path)
    assert main(["export", f"checkpoint={full}", f"model={tmp_path / 'gone'}"]) == 2


def folder_of(tmp_path: Path) -> Path:
    folder = tmp_path / "export"
    (folder / "adapter").mkdir(parents=True)
    for name in ("manifest.json", "config.json", "adapter/adapter_config.json"):
        (folder / name).write_text(name)
    return folder


@pytest.mark.parametrize("kind", ["file", "memory", "plain"])
def test_uploads_are_whole_and_end_with_the_manifest(tmp_path: Path, kind: str) -> None:
    """Every file arrives in its place; a second upload replaces the first."""
    folder, there = folder_of(tmp_path), f"{tmp_path}/there"
    uri = {"file": f"file://{there}", "memory": f"memory:/{there}", "plain": there}[kind]
    assert upload(folder, uri) == 3
    system, root = fsspec.core.url_to_fs(uri)
    assert sorted(f.removeprefix(f"{root}/") for f in system.find(root)) == [
        "adapter/adapter_config.json", "config.json", "manifest.json",
    ]  # fmt: skip
    (folder / "config.json").write_text("changed")
    assert upload(folder, uri) == 3
    assert system.cat_file(f"{root}/config.json") == b"changed"


def test_a_cut_upload_has_no_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that fails midway leaves no manifest behind, also none of an older copy."""
    folder, uri = folder_of(tmp_path), "memory://cut"
    upload(folder, uri)
    system = fsspec.filesystem("memory")
    put = type(system).put_file
    calls = []

    def failing(self: Any, source: str, target: str, **kwargs: Any) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise ConnectionResetError("the line is dead")
        put(self, source, target, **kwargs)

    monkeypatch.setattr(type(system), "put_file", failing)
    with pytest.raises(StorageError, match="the line is dead"):
        upload(folder, uri)
    assert not system.exists("/cut/manifest.json")
    told: list[str] = []
    assert try_upload(folder, uri, say=told.append, wait_s=0.0) == f"done: {uri}"
    calls.clear()
    monkeypatch.setattr(type(system), "put_file", lambda *a, **k: 1 / 0)
    outcome = try_upload(folder, uri, say=told.append, wait_s=0.0)
    assert outcome.startswith("failed:") and "division by zero" in outcome
    assert sum("UPLOAD FAILED" in line for line in told) == 3


def test_addresses_are_checked_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """An unknown scheme, a missing driver, a hub that is switched off: what to do is said."""
    with pytest.raises(UsageError, match="nowhere:// is unknown"):
        check_target("nowhere://x")
    with pytest.raises(UsageError, match="repository is named"):
        check_target("hf://user")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UsageError, match="HF_HUB_OFFLINE"):
        check_target("hf://user/repo")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    check_target("hf://user/repo")

    def absent(scheme: str) -> None:
        raise ImportError(scheme)

    monkeypatch.setattr(fsspec, "get_filesystem_class", absent)
    with pytest.raises(UsageError, match="pip install s3fs"):
        check_target("s3://bucket/x")


def test_a_failed_upload_does_not_fail_the_run(model: Path, tmp_path: Path) -> None:
    """The run ends with 0; its status tells what became of the upload."""
    good, blocked = tmp_path / "good", tmp_path / "file"

    def block(trainer: Any) -> None:
        blocked.write_text("in the way, since the run began")
        hurry(trainer)

    hooks = {good: hurry, blocked: block}
    for place, outcome in ((good, "done: "), (blocked, "failed: ")):
        run = tmp_path / f"run-{place.name}"
        config = toy_config(
            model, run, trainer__export=True, trainer__upload_uri=str(place),
            trainer__total_training_steps=1,
        )  # fmt: skip
        assert [r["code"] for r in run_ranks(config, hook=hooks[place])] == [0]
        status = json.loads((run / "status.json").read_text())
        assert status["state"] == "done" and status["upload"].startswith(outcome), status
    assert (good / "manifest.json").is_file()
    assert os.listdir(tmp_path / "run-file" / "huggingface")


def hurry(trainer: Any) -> None:
    """No pauses between attempts, in the forked rank alone."""
    import time

    time.sleep = lambda seconds: None
