"""The trainer's numerics: one trajectory, whatever the ranks, packing and memory settings."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.train_ranks import (
    VOCAB,
    run_ranks,
    steps_of,
    toy_config,
    toy_model,
    toy_store,
    weights_of,
)
from verl_sft.config.load import load_config
from verl_sft.config.train import TrainConfig
from verl_sft.data.collate import collate
from verl_sft.errors import UsageError
from verl_sft.model.attention import document_kwargs, pick_attention, register_attention
from verl_sft.model.build import build_model, probe_packing
from verl_sft.trainer.idle_options import idle_options
from verl_sft.trainer.launch import exit_code
from verl_sft.trainer.learning_rate import lr_factor
from verl_sft.trainer.status import write_status

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_model(tmp_path_factory.mktemp("model"))


def run_once(model: Path, out: Path, *, size: int = 1, **changes: Any) -> tuple[Any, Any]:
    config = toy_config(model, out, **changes)
    reports = run_ranks(config, size=size, val=toy_store(5, seed=9))
    assert [r["code"] for r in reports] == [0] * size, reports
    return steps_of(config, "train/loss", "train/grad_norm"), weights_of(out)


@pytest.fixture(scope="module")
def baseline(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    return run_once(model, tmp_path_factory.mktemp("baseline") / "run")


def test_it_learns(model: Path, tmp_path: Path) -> None:
    """Twenty epochs on a simple rule bring the loss far down."""
    steps, _ = run_once(model, tmp_path / "run", trainer__total_epochs=20, optim__lr=1e-2)
    assert steps[-1][0] < 0.6 * steps[0][0]


def test_validation_covers_every_row(model: Path, tmp_path: Path) -> None:
    """The validation loss is the weighted mean over all rows, on any number of ranks."""
    losses = []
    for size, micro in ((1, 1), (2, 2)):
        out = tmp_path / f"run{size}"
        run_once(model, out, size=size, data__micro_batch_size_per_gpu=micro)
        config = toy_config(model, out)
        losses.append([row for row in _rows(config) if "val/loss" in row])
    assert [r["step"] for r in losses[0]] == [3, 6]
    for one, other in zip(*losses, strict=True):
        assert abs(one["val/loss"] - other["val/loss"]) < 1e-5


def _rows(config: Any) -> list[dict[str, Any]]:
    from verl_sft.trainer.tracking import read_metrics

    return read_metrics(Path(config.trainer.default_local_dir) / "metrics.jsonl")


def test_nan_reaches_no_weight(model: Path, tmp_path: Path) -> None:
    """A NaN on one rank stops all with exit code 6, the sample named, checkpoints untouched."""
    store = toy_store(10)
    store.samples[3].weights[-1] = np.nan

    config = toy_config(model, tmp_path / "run", trainer__save_freq=1)
    reports = run_ranks(config, size=2, train=store)
    assert [r["code"] for r in reports] == [6, 6]
    assert "sample-3" in reports[0]["error"]
    from verl_sft.trainer.checkpoint import list_checkpoints

    if list_checkpoints(tmp_path / "run"):
        assert all(bool(t.isfinite().all()) for t in weights_of(tmp_path / "run").values())


def test_sigterm_saves_and_resumes(model: Path, baseline: tuple[Any, Any], tmp_path: Path) -> None:
    """SIGTERM on one rank ends both behind the same step, with a checkpoint to go on from."""
    config = toy_config(model, tmp_path / "run")

    def ask_in_step_two(trainer: Any) -> None:
        step = trainer.train_step

        def wrapped(plan: Any) -> Any:
            if trainer.progress.step == 1 and trainer.world.rank == 1:
                signal.raise_signal(signal.SIGTERM)
            return step(plan)

        trainer.train_step = wrapped

    reports = run_ranks(config, size=2, hook=ask_in_step_two)
    assert [r["code"] for r in reports] == [75, 75], reports
    assert len(_rows(config)) == 2
    assert [r["code"] for r in run_ranks(config, size=2)] == [0, 0]
    losses = np.array(steps_of(config, "train/loss"))[:, 0]
    assert np.abs(losses - np.array(baseline[0])[:, 0]).max() < 1e-5


def test_packed_documents_are_isolated(model: Path) -> None:
    """Changing one document leaves the logits of its neighbours to the last bit, and causality."""
    config = toy_config(model, Path("unused"))
    for name in ("split", "sdpa"):
        attention = pick_attention(name, device=CPU, half=False)
        built = build_model(config.model, dtype=torch.float32, attention=attention, seed=0)
        store = toy_store(3)
        rows = [[store[0], store[1], store[2]]]
        first = _logits(built.loss_model, collate(rows, pad_id=0))
        start, stop = len(store[0]), len(store[0]) + len(store[1])
        changed = collate(rows, pad_id=0)
        changed.input_ids[0, start] += 1
        second = _logits(built.loss_model, changed)
        assert torch.equal(first[:start], second[:start])
        assert torch.equal(first[stop:], second[stop:])
        assert not torch.equal(first[start:stop], second[start:stop])
        assert probe_packing(built.loss_model, device=CPU, half=False, vocab_size=VOCAB) < 1e-4


def test_the_probe_sees_contamination(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: attention that ignores document boundaries is refused."""
    from verl_sft.model import loss

    config = toy_config(model, Path("unused"))
    attention = pick_attention("split", device=CPU, half=False)
    built = build_model(config.model, dtype=torch.float32, attention=attention, seed=0)

    def one_document(cu_seqlens: torch.Tensor, **kwargs: Any) -> dict[str, Any]:
        return document_kwargs(cu_seqlens[[0, -1]], max_seqlen=int(cu_seqlens[-1]))

    monkeypatch.setattr(loss, "document_kwargs", one_document)
    with pytest.raises(UsageError, match="packed documents"):
        probe_packing(built.loss_model, device=CPU, half=False, vocab_size=VOCAB)


def _logits(model: Any, batch: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(
            batch.input_ids,
            batch.position_ids,
            batch.cu_seqlens,
            batch.max_seqlen,
            mode="logits",
        )


ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "examples" / "sft" / "run_alfworld_sft_multiturn.sh"


def write_data(folder: Path) -> Path:
    """A tiny sft_data directory."""
    from verl_sft.records.io import write_parquet
    from verl_sft.records.schema import SFTRecord
    from verl_sft.types import Message

    folder.mkdir()
    for split, count in (("train", 12), ("val", 3)):
        rows = []
        for index in range(count):
            question, answer = f"take apple {index}", f"<action>take apple {index}</action>"
            rows.append(
                SFTRecord(
                    messages=(Message("user", question), Message("assistant", answer)),
                    record_id=f"{split}-{index}",
                    episode_id=f"{split}-{index}",
                    prompt=question,
                    response=answer,
                    prompt_template="default",
                )
            )
        write_parquet(folder / f"{split}.parquet", rows)
    return folder


def run_script(*words: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = ["bash", str(SCRIPT), *words]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


def test_script_from_data_to_export(model: Path, tmp_path: Path) -> None:
    """The example script trains on two ranks, and its positional arguments are really used."""
    data, out = write_data(tmp_path / "data"), tmp_path / "out"
    done = run_script(
        *("2", str(out), str(data), f"model.partial_pretrain={model}"),
        *("data.max_length=128", "data.train_batch_size=4", "trainer.total_epochs=1"),
    )
    assert done.returncode == 0, done.stderr
    assert "2 gloo ranks" in done.stdout
    assert (out / "global_step_3" / "manifest.json").is_file()
    facts = json.loads((out / "huggingface" / "verl_sft.json").read_text())
    assert facts["prompt_template"] == "default" and facts["history_style"] == "dialogue"
    assert (out / "huggingface" / "adapter" / "adapter_config.json").is_file()
    assert json.loads((out / "status.json").read_text())["exit_code"] == 0
    assert len(_lines(out / "metrics.jsonl")) == 3
    audit = json.loads((out / "audit.json").read_text())["lines"]
    assert len(audit) == 5 and "\n".join(audit) in done.stdout


def test_script_says_what_is_wrong(tmp_path: Path) -> None:
    """Wrong use is exit 2 and one line, from the script and through the launcher."""
    assert run_script("2").returncode == 2
    assert run_script("none", str(tmp_path), str(tmp_path)).returncode == 2
    assert run_script("1", str(tmp_path), str(tmp_path / "absent")).returncode == 2
    failed = run_script("2", str(tmp_path / "out"), str(tmp_path), "model.partial_pretrain=/absent")
    assert failed.returncode == 2
    (line,) = failed.stderr.strip().splitlines()
    assert line.startswith("verl-sft: model.partial_pretrain=/absent: no such folder. Give")


def test_script_finds_its_own_interpreter(tmp_path: Path) -> None:
    """From any directory and without PYTHON, the checkout's own `.venv` runs the trainer."""
    root = tmp_path / "check out"
    python = root / ".venv/bin/python"
    for folder in (root / "examples/sft", python.parent, tmp_path / "data"):
        folder.mkdir(parents=True)
    script = root / "examples/sft" / SCRIPT.name
    for path in SCRIPT.parent.iterdir():
        (script.parent / path.name).write_bytes(path.read_bytes())
    python.write_text('#!/bin/sh\necho "$PYTHONPATH" "$@"\n')
    python.chmod(0o755)
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHON", "PYTHONPATH")}
    words = ["bash", str(script), "2", "out", str(tmp_path / "data"), "optim.lr=1"]
    done = subprocess.run(words, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert f"{root} -m verl_sft.trainer.launch 2 data.train_files={tmp_path}/data" in done.stdout
    assert done.stdout.rstrip().endswith("trainer.default_local_dir=out optim.lr=1")


def test_signals_through_the_launcher(model: Path, tmp_path: Path) -> None:
    """SIGTERM to the whole group saves, exit 75; a launcher killed outright leaves no process."""
    data, out = write_data(tmp_path / "data"), tmp_path / "run"
    words = [
        *("nproc=2", f"data.train_files={data}", f"model.partial_pretrain={model}"),
        *(f"trainer.default_local_dir={out}", "trainer.total_epochs=1000", "data.max_length=128"),
    ]
    command = [sys.executable, "-m", "verl_sft.cli", "train", *words]
    metrics, log = out / "metrics.jsonl", tmp_path / "log"
    env = {**os.environ, "TEST_RUN": str(tmp_path)}

    def start(steps: int) -> subprocess.Popen[bytes]:
        with log.open("wb") as stream:
            run = subprocess.Popen(
                command, cwd=ROOT, env=env, stdout=stream, stderr=stream, start_new_session=True
            )
        assert _soon(lambda: metrics.is_file() and len(_lines(metrics)) > steps), log.read_text()
        return run

    run = start(1)
    os.killpg(run.pid, signal.SIGTERM)
    assert run.wait(60) == 75, log.read_text()
    assert "Traceback" not in log.read_text()
    status = json.loads((out / "status.json").read_text())
    done = len(_lines(metrics))
    assert status["state"] == "preempted" and (out / f"global_step_{done}").is_dir()

    run = start(done)
    run.kill()
    run.wait()
    assert _soon(lambda: not _alive(f"TEST_RUN={tmp_path}")), "ranks outlive their launcher"


def _soon(true: Callable[[], bool]) -> bool:
    """Whether it becomes true within a minute."""
    end = time.monotonic() + 60
    while not true() and time.monotonic() < end:
        time.sleep(0.05)
    return true()


def _alive(mark: str) -> bool:
    """Whether a process with that in its environment still runs (ranks have other sessions)."""
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if mark.encode() in path.read_bytes().split(b"\0"):
                return True
    return False


def test_a_killed_rank_is_a_lost_peer(tmp_path: Path) -> None:
    """The launcher's code 1 means exit 8 where the ranks had begun and none could say why."""
    status = tmp_path / "status.json"
    assert exit_code(status, launcher_code=0) == 0
    assert exit_code(status, launcher_code=1) == 1
    write_status(tmp_path, state="running", code=None)
    assert exit_code(status, launcher_code=1) == 8
    write_status(tmp_path, state="failed", code=6)
    assert exit_code(status, launcher_code=1) == 6


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


def test_sliding_window_inside_a_document() -> None:
    """A window narrower than the document gives what masked attention gives."""
    from torch.nn.functional import scaled_dot_product_attention

    from verl_sft.model.attention import split_attention

    register_attention()
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 9, 4) for _ in range(3))
    out, _ = split_attention(
        torch.nn.Identity(), q, k, v, None, sliding_window=3, document_lengths=(9,)
    )
    back = torch.arange(9)[:, None] - torch.arange(9)
    mask = (back >= 0) & (back < 3)
    expected = scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
    assert torch.allclose(out, expected, atol=1e-6)


def test_lora_targets_that_match_nothing(model: Path, tmp_path: Path) -> None:
    """Wrong LoRA targets are refused with the names that exist."""
    config = toy_config(model, tmp_path, model__lora_rank=4, model__target_modules="[nonsense]")
    with pytest.raises(UsageError, match="q_proj"):
        build_model(config.model, dtype=torch.float32, attention="sdpa", seed=0)


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant", "wsd"])
def test_schedules(kind: str) -> None:
    """Warm-up starts above 0, the peak is 1, the end is the minimum (constant stays)."""
    factors = [
        lr_factor(s, total_steps=100, warmup=10, kind=kind, min_ratio=0.1) for s in range(101)
    ]
    assert 0 < factors[0] < 0.2 and max(factors) == 1.0 and factors[10] == 1.0
    assert all(a < b for a, b in pairwise(factors[:11]))
    assert math.isclose(factors[100], 1.0 if kind == "constant" else 0.1)
    assert all(a >= b for a, b in pairwise(factors[10:]))
    if kind == "wsd":
        assert factors[89] == 1.0 > factors[95]


def test_a_key_without_effect_is_said() -> None:
    """Each with its name; a default config, or a key that does have its effect, says nothing."""

    def said(*words: str, on_gpu: bool = False) -> list[str]:
        return idle_options(load_config(TrainConfig, words), on_gpu=on_gpu, world_size=1)

    assert said() == [] and said("engine.offload=true", on_gpu=True) == []
    assert said("trainer.resume_mode=resume_path", "trainer.resume_from_path=x") == []
    for words in (
        ["engine.strategy=fsdp"],
        ["engine.offload=true"],
        ["trainer.resume_from_path=x"],
        ["model.lora_rank=8", "model.lora_adapter_path=x"],
    ):
        (line,) = said(*words)
        assert line.startswith(words[0].partition("=")[0])
