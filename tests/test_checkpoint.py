"""Checkpoints: bit-exact resumption from any step, on any ranks, after any kill or damage."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.train_ranks import run_ranks, steps_of, toy_config, toy_model, toy_store, weights_of
from verl_sft.errors import RunBusyError, StorageError, UsageError
from verl_sft.safe_io import run_lock
from verl_sft.trainer.checkpoint import (
    check_fingerprint,
    clean_leftovers,
    find_resume,
    list_checkpoints,
    verify,
)
from verl_sft.trainer.tracking import cut_metrics, read_metrics

LORA = {"model__lora_rank": 4, "model__lora_dropout": 0.1}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_model(tmp_path_factory.mktemp("model"))


def finish(config: Any, *, size: int = 1) -> None:
    reports = run_ranks(config, size=size)
    assert [r["code"] for r in reports] == [0] * size, reports


def losses(config: Any) -> list[tuple[float, ...]]:
    return steps_of(config, "step", "train/loss", "train/grad_norm", "train/lr")


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


@pytest.mark.parametrize("lora", [False, True])
def test_resume_after_every_step_is_bit_exact(model: Path, tmp_path: Path, lora: bool) -> None:
    """From each of the six checkpoints the rest of the run is the same to the last bit."""
    changes = LORA if lora else {}
    whole = toy_config(model, tmp_path / "whole", trainer__save_freq=1, **changes)
    finish(whole, size=2)
    for step in range(1, 6):
        out = tmp_path / f"from{step}"
        out.mkdir()
        shutil.copytree(tmp_path / "whole" / f"global_step_{step}", out / f"global_step_{step}")
        shutil.copy(tmp_path / "whole" / "metrics.jsonl", out)
        config = toy_config(model, out, trainer__save_freq=1, **changes)
        finish(config, size=2)
        assert losses(config) == losses(whole)
        assert equal(weights_of(out), weights_of(tmp_path / "whole"))


def test_resume_without_the_weights_differs(model: Path, tmp_path: Path) -> None:
    """Negative control: a run that starts afresh at another place does not give these bits."""
    one = toy_config(model, tmp_path / "one")
    other = toy_config(model, tmp_path / "other", trainer__seed=5)
    finish(one)
    finish(other)
    assert not equal(weights_of(tmp_path / "one"), weights_of(tmp_path / "other"))


@pytest.mark.parametrize(("before", "after"), [(1, 2), (3, 1)])
def test_another_number_of_ranks(model: Path, tmp_path: Path, before: int, after: int) -> None:
    """A checkpoint of any number of ranks goes on with any other, losses within 1e-5."""
    whole = toy_config(model, tmp_path / "whole", trainer__save_freq=1)
    finish(whole, size=before)
    out = tmp_path / "rest"
    out.mkdir()
    shutil.copytree(tmp_path / "whole" / "global_step_2", out / "global_step_2")
    shutil.copy(tmp_path / "whole" / "metrics.jsonl", out)
    rest = toy_config(model, out)
    finish(rest, size=after)
    found, expected = np.array(losses(rest)), np.array(losses(whole))
    assert found.shape == expected.shape
    assert np.abs(found[2, 1] - expected[2, 1]) < 1e-6
    assert np.abs(found[:, 1] - expected[:, 1]).max() < 1e-5


def test_finished_run_is_a_no_op(model: Path, tmp_path: Path) -> None:
    """Starting a finished run again changes no checkpoint and no metrics."""
    config = toy_config(model, tmp_path / "run")
    finish(config)
    kept = [*list_checkpoints(tmp_path / "run")[0][1].iterdir(), tmp_path / "run/metrics.jsonl"]
    before = [(p, p.stat().st_mtime_ns) for p in kept]
    finish(config)
    assert before == [(p, p.stat().st_mtime_ns) for p in kept]


def test_damage_is_found_and_the_previous_checkpoint_used(model: Path, tmp_path: Path) -> None:
    """Flipped, cut, missing and foreign bytes are detected, the file named, an older one taken."""
    config = toy_config(model, tmp_path / "run", trainer__save_freq=2)
    finish(config)
    good = losses(config)
    _, newest = list_checkpoints(tmp_path / "run")[0]
    shard = next(newest.glob("*.safetensors"))
    clean = shard.read_bytes()
    for position in np.random.default_rng(0).integers(0, len(clean), 20):
        damaged = bytearray(clean)
        damaged[position] ^= 1 << int(position % 8)
        shard.write_bytes(damaged)
        with pytest.raises(StorageError, match=shard.name):
            verify(newest)
    shard.write_bytes(clean[:-1])
    with pytest.raises(StorageError, match=shard.name):
        verify(newest)
    shard.write_bytes(clean)
    verify(newest)
    (newest / "extra.bin").write_bytes(b"x")
    with pytest.raises(StorageError, match=r"extra\.bin"):
        verify(newest)
    (newest / "extra.bin").unlink()
    manifest = (newest / "manifest.json").read_text()
    (newest / "manifest.json").write_text(manifest.replace('"epoch": 2', '"epoch": 3'))
    with pytest.raises(StorageError, match=r"manifest\.json"):
        verify(newest)
    said: list[str] = []
    found = find_resume(tmp_path / "run", say=said.append)
    assert found is not None and found[0].name == "global_step_4"
    assert "DAMAGED" in said[0]
    finish(config)
    assert losses(config) == good
    verify(newest)


def test_all_damaged_is_an_error(model: Path, tmp_path: Path) -> None:
    """Where every checkpoint is damaged the run stops instead of starting anew."""
    config = toy_config(model, tmp_path / "run")
    finish(config)
    for _, path in list_checkpoints(tmp_path / "run"):
        next(path.glob("*.safetensors")).write_bytes(b"")
    (report,) = run_ranks(config)
    assert report["code"] == 5


def test_other_settings_are_refused(model: Path, tmp_path: Path) -> None:
    """Going on with another seed or other data names the fields that changed."""
    finish(toy_config(model, tmp_path / "run"))
    (report,) = run_ranks(toy_config(model, tmp_path / "run", trainer__seed=3))
    assert report["code"] == 2 and "trainer.seed: 1 then, 3 now" in report["error"]
    config = toy_config(model, tmp_path / "run")
    (report,) = run_ranks(config, train=toy_store(10, seed=8))
    assert report["code"] == 2 and "data:" in report["error"]
    check_fingerprint({"a": 1}, current={"a": 1}, where=tmp_path)
    with pytest.raises(UsageError, match="a: 1 then, None now"):
        check_fingerprint({"a": 1}, current={}, where=tmp_path)


def test_wrong_resume_path_names_what_is_there(model: Path, tmp_path: Path) -> None:
    """A typo in the path is exit 2 with the checkpoints that exist, never a fresh start."""
    finish(toy_config(model, tmp_path / "run"))
    config = toy_config(
        model,
        tmp_path / "run",
        trainer__resume_mode="resume_path",
        trainer__resume_from_path=str(tmp_path / "run" / "global_step_7"),
    )
    (report,) = run_ranks(config)
    assert report["code"] == 2 and "global_step_6" in report["error"]


def test_retention_is_read_from_disk(model: Path, tmp_path: Path) -> None:
    """The newest two are kept, also across a restart."""
    settings = {"trainer__save_freq": 1, "trainer__max_ckpt_to_keep": 2}
    config = toy_config(model, tmp_path / "run", **settings)
    finish(config)
    assert [step for step, _ in list_checkpoints(tmp_path / "run")] == [6, 5]
    assert (tmp_path / "run/latest_checkpointed_iteration.txt").read_text() == "6\n"


def test_two_runs_in_one_directory(model: Path, tmp_path: Path) -> None:
    """The second run ends with exit code 9 and touches nothing."""
    (tmp_path / "run").mkdir()
    with run_lock(tmp_path / "run"):
        reports = run_ranks(toy_config(model, tmp_path / "run"), size=2)
    assert [r["code"] for r in reports] == [RunBusyError.exit_code] * 2
    assert not (tmp_path / "run" / "status.json").exists()


def test_a_lock_that_is_let_go_soon_is_waited_for(tmp_path: Path) -> None:
    """A killed run holds its directory until its last thread is gone: a restart comes through."""
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        with run_lock(tmp_path):
            os.write(tell, b".")
            time.sleep(0.3)
            os._exit(0)
    os.read(told, 1)
    with run_lock(tmp_path):
        assert os.waitpid(child, 0)[1] == 0


def test_metrics_are_cut(tmp_path: Path) -> None:
    """A torn line and steps that will be done again are dropped; leftovers are removed."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    cut_metrics(path, last_step=2)
    assert [m["step"] for m in read_metrics(path)] == [1, 2]
    (tmp_path / ".tmp-global_step_9.abc").mkdir()
    clean_leftovers(tmp_path)
    assert not list(tmp_path.glob(".tmp-*"))
