"""Resuming after every step of two epochs, in every way of running, gives the same bits."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.test_trainer import write_data
from tests.train_ranks import (
    ToyStore,
    run_ranks,
    steps_of,
    toy_config,
    toy_model,
    toy_store,
    weights_of,
)
from verl_sft.data import workers
from verl_sft.data.load import load_samples
from verl_sft.distributed.sharding import local
from verl_sft.errors import UsageError
from verl_sft.trainer import checkpoint
from verl_sft.trainer.resume import find_start, remember_data
from verl_sft.trainer.saving import Saver
from verl_sft.trainer.state import TrainState

LORA = {"model__lora_rank": 2, "model__lora_dropout": 0.2}
LONGEST = 12  # tokens of a sample of the matrix


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_model(tmp_path_factory.mktemp("model"))


class Recorder:
    """Runs the trainer's loop and keeps the exact figures of its steps."""

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.rows = trainer, list[tuple[str, ...]]()
        step = trainer.train_step

        def recorded(plan: Any) -> Any:
            found = step(plan)
            self.rows.append((found.loss.hex(), found.grad_norm.hex(), found.lr.hex()))
            return found

        trainer.train_step = recorded

    def fit(self) -> tuple[list[tuple[str, ...]], list[torch.Tensor]]:
        self.rows.clear()
        self.trainer.fit()
        kept = [p.detach().full_tensor().clone() for p in self.trainer.parameters]
        return list(self.rows), kept

    def load(self, path: Path) -> None:
        """Overwrite everything with noise, then load."""
        trainer, state = self.trainer, TrainState(self.trainer.model, self.trainer.optimizer)
        torch.manual_seed(len(path.name))
        with torch.no_grad():
            for parameter in trainer.parameters:
                local(parameter).normal_()
                for value in trainer.optimizer.state[parameter].values():
                    value.fill_(0.25)
        manifest = checkpoint.verify(path)
        trainer.resume(checkpoint.load(path, manifest=manifest, state=state, world=trainer.world))


def check_every_step(trainer: Any) -> None:
    """Train once saving each step, then go on from each of the checkpoints."""
    recorder, config = Recorder(trainer), trainer.config
    micros = trainer.plan.train(0).steps[0].ranks[trainer.world.dp_rank]
    accumulates = config.data.micro_batch_size_per_gpu < 6
    assert (len(micros) >= 3) == accumulates and (len(micros) == 1) != accumulates, micros
    assert any(len(row) > 1 for micro in micros for row in micro) == config.use_remove_padding
    rows, weights = recorder.fit()
    total = trainer.plan.total_steps
    assert len(rows) == total == 8
    saver, trainer.save = trainer.save, lambda **given: None
    for step in range(1, total):
        recorder.load(trainer.directory / f"global_step_{step}")
        assert recorder.fit()[0] == rows[step:], f"resumed from step {step}"
        for found, expected in zip(trainer.parameters, weights, strict=True):
            assert torch.equal(found.detach().full_tensor(), expected), f"from step {step}"
    check_chain(recorder, rows=rows, weights=weights)
    trainer.save = saver


def check_chain(recorder: Recorder, *, rows: Any, weights: list[torch.Tensor]) -> None:
    """A resume of a resume of a resume, one step each, across the epoch boundary."""
    trainer = recorder.trainer
    saver = Saver(trainer.directory / "chain", fingerprint={}, world=trainer.world)
    (trainer.directory / "chain").mkdir(exist_ok=True)
    recorder.load(trainer.directory / "global_step_1")
    state = TrainState(trainer.model, trainer.optimizer)
    for step in range(1, trainer.plan.total_steps):
        recorder.rows.clear()
        progress = trainer.progress
        plan = trainer.plan.train(progress.epoch).steps[progress.epoch_step]
        trainer._advance(trainer.train_step(plan))
        assert recorder.rows == [rows[step]]
        saver.save(state, progress=trainer.progress)
        recorder.load(trainer.directory / "chain" / f"global_step_{step + 1}")
    for found, expected in zip(trainer.parameters, weights, strict=True):
        assert torch.equal(found.detach().full_tensor(), expected)


def cases() -> Iterator[Any]:
    """All ways of running on 1 and 2 ranks; a test run takes those in which every pair occurs."""
    for size, lora, packed, accumulate in itertools.product((1, 2), *[(False, True)] * 3):
        often = (lora + packed + accumulate + size) % 2 == 1
        name = f"{size}-{'lora' if lora else 'full'}-{'packed' if packed else 'padded'}"
        yield pytest.param(
            *(size, lora, packed, accumulate),
            id=f"{name}-{3 if accumulate else 1}",
            marks=() if often else pytest.mark.release,
        )


@pytest.mark.parametrize(("size", "lora", "packed", "accumulate"), cases())
def test_every_step_of_two_epochs(
    model: Path, tmp_path: Path, size: int, lora: bool, packed: bool, accumulate: bool
) -> None:
    """From each of seven steps, and through all of them in a chain: losses and weights exact."""
    config = toy_config(
        model,
        tmp_path / "run",
        trainer__save_freq=1,
        use_remove_padding=packed,
        data__max_length=LONGEST,
        data__train_batch_size=6 * size,
        data__micro_batch_size_per_gpu=2 if accumulate else 6,
        **(LORA if lora else {}),
    )
    store = short_store(18 * size + 4)  # four steps an epoch, the last one of four samples
    reports = run_ranks(config, size=size, train=store, hook=check_every_step)
    assert [r["code"] for r in reports] == [0] * size, reports


def test_the_matrix_sees_a_lost_moment(model: Path, tmp_path: Path) -> None:
    """Negative control: without the optimizer's moments the next steps differ."""

    def forget(trainer: Any) -> None:
        recorder = Recorder(trainer)
        rows, _ = recorder.fit()
        recorder.load(trainer.directory / "global_step_2")
        for parameter in trainer.parameters:
            trainer.optimizer.state[parameter]["exp_avg"].zero_()
        trainer.save = lambda **given: None
        assert recorder.fit()[0] != rows[2:]

    config = toy_config(model, tmp_path / "run", trainer__save_freq=1)
    (report,) = run_ranks(config, hook=forget)
    assert report["code"] == 0, report["error"]


def short_store(count: int) -> ToyStore:
    """Samples of which two or three fit into a row of 24 tokens."""
    store = toy_store(200, seed=3)
    return ToyStore([s for s in store.samples if 8 <= len(s) <= LONGEST][:count])


def test_the_number_of_workers_changes_no_bit(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches have no workers; with 0, 1 or 2 that tokenise, stores, losses and weights agree."""
    monkeypatch.setattr(workers, "_SMALL", 4)
    data = write_data(tmp_path / "data") / "train.parquet"
    stores = []
    for number in (0, 1, 2):
        given = toy_config(model, tmp_path, data__max_length=128, data__num_workers=number).data
        cache = tmp_path / f"cache{number}"
        stores.append(load_samples([data], tokenizer=model, config=given, cache_dir=cache))
    kept = [
        {p.name: p.read_bytes() for p in store.path.iterdir() if p.suffix != ".json"}
        for store in stores
    ]
    assert len(stores[0]) == 12 and kept[0] and kept[0] == kept[1] == kept[2]

    given = {"trainer__save_freq": 1, "data__max_length": 128}
    outcomes = []
    for name, order in (("whole", [0]), ("changed", [1, 2])):
        for number in order:
            config = toy_config(model, tmp_path / name, data__num_workers=number, **given)
            if number == 2:  # as if the first start had ended behind its third step
                for step in range(4, 7):
                    shutil.rmtree(tmp_path / name / f"global_step_{step}")
            (report,) = run_ranks(config, train=ToyStore(list(stores[number])))
            assert report["code"] == 0, report
        found = steps_of(config, "train/loss", "train/grad_norm")
        outcomes.append((found, weights_of(tmp_path / name)))
    assert outcomes[0][0] == outcomes[1][0] and len(outcomes[0][0]) == 6
    assert all(torch.equal(outcomes[0][1][n], outcomes[1][1][n]) for n in outcomes[0][1])


def test_other_numbers_of_ranks(model: Path, tmp_path: Path) -> None:
    """On 1, 2, 4 and 2 -> 1 -> 2 ranks: the same samples in every step, losses within 1e-6."""

    def note(trainer: Any) -> None:
        step = trainer.train_step

        def noted(plan: Any) -> Any:
            names = sorted(trainer.train_data[i].record_id for i in plan.sample_indices())
            with (trainer.directory / "samples.txt").open("a") as stream:
                if trainer.world.is_main:
                    stream.write(f"{trainer.progress.step} {names}\n")
            return step(plan)

        trainer.train_step = noted

    def run(name: str, sizes: list[int], start: Path | None = None) -> tuple[Any, Any]:
        out = tmp_path / name
        for number, size in enumerate(sizes):
            config = toy_config(model, out, trainer__save_freq=1, optim__lr=1e-3)
            reports = run_ranks(config, size=size, train=toy_store(16), hook=note)
            assert [r["code"] for r in reports] == [0] * size, reports
            done = (out / "samples.txt").read_text().splitlines()
            if number < len(sizes) - 1:  # as if it had been stopped after some steps
                kept = 2 * number + 2
                for step in range(kept + 1, 9):
                    shutil.rmtree(out / f"global_step_{step}", ignore_errors=True)
                (out / "samples.txt").write_text("".join(f"{line}\n" for line in done[:kept]))
        return done, [row[0] for row in steps_of(config, "train/loss")]

    samples, losses = run("one", [1])
    assert len(losses) == len(samples) == 8
    for name, sizes in (("two", [2]), ("four", [4]), ("mixed", [2, 1, 2])):
        found, other = run(name, sizes)
        assert found == samples, name
        for one, two in zip(losses, other, strict=True):
            assert abs(one - two) <= 1e-6 * abs(one), (name, one, two)


def test_finished_and_retained(model: Path, tmp_path: Path) -> None:
    """Old checkpoints of an earlier start are rotated out; the one resumed from only afterwards."""
    config = toy_config(model, tmp_path / "run", trainer__save_freq=1)
    run_ranks(config)
    for step in (5, 6):
        shutil.rmtree(tmp_path / f"run/global_step_{step}")
    given = {"trainer__save_freq": 1, "trainer__max_ckpt_to_keep": 2}
    config = toy_config(model, tmp_path / "run", trainer__async_save=True, **given)
    run_ranks(config)
    assert [step for step, _ in checkpoint.list_checkpoints(tmp_path / "run")] == [6, 5]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*.safetensors")}
    tensors = weights_of(tmp_path / "run")
    (report,) = run_ranks(config)
    assert report["code"] == 0 and all(p.stat().st_mtime_ns == t for p, t in before.items())
    assert weights_of(tmp_path / "run").keys() == tensors.keys()


def test_what_changed_is_named(model: Path, tmp_path: Path) -> None:
    """Rows, chat template, tokenizer or a data option changed since: refused, each by its name."""
    config = toy_config(model, tmp_path / "run")
    assert run_ranks(config)[0]["code"] == 0
    _, newest = checkpoint.list_checkpoints(tmp_path / "run")[0]
    marks = checkpoint.verify(newest)["fingerprint"]
    key = {
        "files": [["train.parquet", "0123456789abcdef"]],
        "tokenizer": {"name": "one", "chat_template": "{{ messages }}"},
        "max_length": 64,
    }
    changes: dict[str, dict[str, Any]] = {
        "contents of train.parquet": {"files": [["train.parquet", "fedcba9876543210"]]},
        "chat_template": {"tokenizer": {"name": "one", "chat_template": "{{ tools }}"}},
        "tokenizer.name": {"tokenizer": {"name": "two", "chat_template": "{{ messages }}"}},
        "max_length: 64 -> 32": {"max_length": 32},
    }
    stores = []
    for number, change in enumerate([{}, *changes.values()]):
        folder = tmp_path / f"cache{number}"
        folder.mkdir()
        (folder / "key.json").write_text(json.dumps({**key, **change}))
        stores.append(SimpleNamespace(path=folder))
    remember_data(tmp_path / "run", store=stores[0])
    given: dict[str, Any] = {"directory": tmp_path / "run", "say": print}
    assert find_start(config, marks=marks, store=stores[0], **given) is not None
    for name, store in zip(changes, stores[1:], strict=True):
        with pytest.raises(UsageError, match=name):
            find_start(config, marks={**marks, "data": "other"}, store=store, **given)
    with pytest.raises(UsageError, match=r"trainer\.seed: 1 then, 2 now"):
        find_start(config, marks={**marks, "trainer.seed": 2}, store=stores[0], **given)
