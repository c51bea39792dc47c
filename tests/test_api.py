"""Training from Python: data sets in memory are what is trained, in any of their forms."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pandas
import pytest

from tests.train_ranks import toy_model
from verl_sft.config.train import TrainConfig
from verl_sft.errors import InputError, UsageError
from verl_sft.records.parse import ReadOptions
from verl_sft.records.read import read_records
from verl_sft.records.schema import SFTRecord
from verl_sft.trainer.api import SFTTrainer, to_records
from verl_sft.trainer.train_loop import TrainLoop
from verl_sft.types import Message


def rows(count: int) -> list[dict[str, Any]]:
    rng = random.Random(0)
    return [
        {
            "messages": [
                {"role": "user", "content": f"{rng.randrange(9)}+1?"},
                {"role": "assistant", "content": str(n % 7)},
            ]
        }
        for n in range(count)
    ]


def keys(tmp_path: Path, **more: Any) -> dict[str, Any]:
    return {
        "model.partial_pretrain": str(toy_model(tmp_path)),
        "data": {"train_batch_size": 4, "max_length": 256},
        "trainer": {
            "default_local_dir": str(tmp_path / "run"),
            "total_epochs": 1,
            "logger": ["file"],
            "device": "cpu",
            "export": False,
        },
        **more,
    }


def steps(run: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]


def test_the_data_set_that_is_given_is_trained(tmp_path: Path) -> None:
    """Dicts with messages: the steps and tokens of these rows, not of `data.train_files`."""
    config = keys(tmp_path, **{"data.train_files": "elsewhere.parquet"})
    run = SFTTrainer(config, train_dataset=rows(8), val_dataset=rows(2)).train()
    assert len(steps(run)) == 2 and "val/loss" in steps(run)[-1]
    kept = list(read_records(run / "datasets" / "train.parquet"))
    assert [m.content for r in kept for m in r.messages] == [
        m["content"] for row in rows(8) for m in row["messages"]
    ]


def test_records_generators_and_datasets_are_equal(tmp_path: Path) -> None:
    """Records, a generator of dicts and a `datasets.Dataset` give the same losses."""
    datasets = pytest.importorskip("datasets", reason="it comes with trl")
    records = [
        SFTRecord(messages=tuple(Message.from_json(m) for m in row["messages"])) for row in rows(8)
    ]

    def generator() -> Iterator[dict[str, Any]]:
        yield from rows(8)

    losses = []
    for name, given in (
        ("records", records),
        ("generator", generator()),
        ("datasets", datasets.Dataset.from_list(rows(8))),
    ):
        folder = tmp_path / name
        folder.mkdir()
        run = SFTTrainer(keys(folder), train_dataset=given).train()
        losses.append([m["train/loss"] for m in steps(run)])
    assert losses[0] == losses[1] == losses[2]


def test_pairs_are_read_by_the_keys_of_the_config(tmp_path: Path) -> None:
    """Prompt and response columns by their names; a second call finds the run finished."""
    pairs = [{"q": row["messages"][0]["content"], "a": "7"} for row in rows(4)]
    config = keys(tmp_path, **{"data.prompt_key": "q", "data.response_key": "a"})
    run = SFTTrainer(config, train_dataset=pairs).train()
    before = steps(run)
    assert SFTTrainer(config, train_dataset=pairs).train() == run
    assert steps(run) == before and len(before) == 1


def test_the_package_names_it_without_importing_torch() -> None:
    """`verl_sft.SFTTrainer` is this class; `import verl_sft` alone loads no torch."""
    code = (
        "import sys, verl_sft; assert 'torch' not in sys.modules; "
        "print(verl_sft.SFTTrainer.__module__); verl_sft.nothing"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == SFTTrainer.__module__
    assert "has no attribute 'nothing'" in done.stderr


def test_a_bad_row_is_named_by_its_place(tmp_path: Path) -> None:
    """The error says which row of which data set, and which field."""
    bad = [*rows(2), {"messages": [{"role": "gpt", "content": "x"}]}]
    with pytest.raises(InputError, match=r"train_dataset:2:messages\[0\]\.role"):
        SFTTrainer(keys(tmp_path), train_dataset=bad).train()
    with pytest.raises(UsageError, match="Did you mean"):
        SFTTrainer({"data.train_batch_siz": 4})
    assert isinstance(SFTTrainer(["optim.lr=1e-3"]).config, TrainConfig)


def test_loops_threads_and_two_runs_in_one_process(tmp_path: Path) -> None:
    """Inside a running event loop, as in a notebook, a run is the same, also the second one."""
    losses = []

    async def notebook() -> None:
        for name, given in (("a", rows(8)), ("b", pandas.DataFrame(rows(8)))):
            (tmp_path / name).mkdir()
            run = SFTTrainer(keys(tmp_path / name), train_dataset=given).train()
            losses.append([m["train/loss"] for m in steps(run)])

    asyncio.run(notebook())
    assert losses[0] == losses[1] and len(losses[0]) == 2


@pytest.mark.parametrize("in_thread", [False, True])
def test_signals_of_the_caller_are_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_thread: bool
) -> None:
    """A thread may have no handlers; in the main one Ctrl-C stays, and SIGTERM comes back."""
    step, during = TrainLoop.train_step, list[Any]()

    def note(*given: Any) -> Any:
        during.append([signal.getsignal(number) for number in mine])
        return step(*given)

    monkeypatch.setattr(TrainLoop, "train_step", note)
    mine = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, note) for number in mine]
    try:
        trainer = SFTTrainer(keys(tmp_path), train_dataset=rows(4))
        with ThreadPoolExecutor() as pool:
            assert (pool.submit(trainer.train).result() if in_thread else trainer.train()).is_dir()
        assert [signal.getsignal(number) for number in mine] == [note, note]
    finally:
        for number, handler in zip(mine, before, strict=True):
            signal.signal(number, handler)
    assert during[0][0] is note and (during[0][1] is note) == in_thread


@pytest.mark.parametrize(
    "given", ["rows.parquet", Path("rows.parquet"), {"train": [], "test": []}, 5, b"rows"]
)
def test_what_is_no_data_set_is_named(given: Any) -> None:
    """A path, several splits or a number is refused before anything starts."""
    for name in ("train_dataset", "val_dataset"):
        with pytest.raises(UsageError, match=f"{name} is of type {type(given).__name__}"):
            SFTTrainer({}, **{name: given})


@pytest.mark.parametrize(
    ("given", "where"),
    [
        ([["a", "b"]], "train_dataset:0"),
        ([None], "train_dataset:0"),
        (["text"], "train_dataset:0"),
        ([{"messages": []}], "train_dataset:0:messages"),
        ([{"messages": "no JSON"}], "train_dataset:0:messages"),
        ([*rows(1), {"other": 1}], "train_dataset:1"),
    ],
)
def test_rows_that_are_none_are_named(given: Any, where: str) -> None:
    """Every kind of wrong row ends in one error with its place."""
    with pytest.raises(InputError, match=where):
        list(to_records(given, options=ReadOptions(multiturn=True)))


def test_an_empty_data_set_says_so(tmp_path: Path) -> None:
    """Nothing to train on is an error of the data, not of the trainer."""
    with pytest.raises(InputError, match="nothing is left"):
        SFTTrainer(keys(tmp_path), train_dataset=[]).train()
