"""Helpers of the trainer's tests: tiny data, a tiny model, and ranks as forked processes.

A forked rank runs the real entry point (`run`), with tokenised samples put in place of files.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from verl_sft.config.collect import MakeModelConfig
from verl_sft.config.load import load_config
from verl_sft.config.train import TrainConfig
from verl_sft.data.sample import TokenizedSample, make_sample
from verl_sft.distributed.setup import setup_world
from verl_sft.errors import VerlSftError
from verl_sft.model.tiny import make_model
from verl_sft.trainer import fsdp_sft_trainer, inputs
from verl_sft.trainer.tracking import read_metrics

torch.set_num_threads(1)  # forked children must not inherit a thread pool

VOCAB = 259  # bytes and three control tokens: every tokenizer here has these
Hook = Callable[[Any], None]


class ToyStore:
    """Samples in memory with the interface of the real store."""

    groups: tuple[str, ...] = ()

    def __init__(self, samples: list[TokenizedSample]) -> None:
        self.samples = samples
        self.lengths = np.array([len(s) for s in samples], dtype=np.int64)
        self.fingerprint = f"toy-{len(samples)}-{int(self.lengths.sum())}"

    def input_ids(self, index: int) -> np.ndarray:
        return self.samples[index].input_ids

    def units(self) -> np.ndarray:
        names = [s.record_id for s in self.samples]
        return np.cumsum([a != b for a, b in zip(names, [None, *names], strict=False)]) - 1

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> TokenizedSample:
        return self.samples[index]


def toy_store(count: int, *, seed: int = 0, longest: int = 24) -> ToyStore:
    """Samples with a rule to learn (each token is the last one plus 3) and mixed weights."""
    rng = np.random.default_rng(seed)
    samples = []
    for index in range(count):
        length = int(rng.integers(4, longest))
        ids = (rng.integers(3, VOCAB) + 3 * np.arange(length + 1)) % (VOCAB - 3) + 3
        weights = rng.choice([0.0, 0.5, 1.0], size=length + 1)
        weights[-1] = 1.0
        samples.append(make_sample(ids, weights=weights, record_id=f"sample-{index}"))
    return ToyStore(samples)


def toy_model(folder: Path, *, size: str = "nano") -> Path:
    """A model folder made from a little parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    data = folder / "data"
    data.mkdir()
    texts = [f"go to shelf {i} and take apple {i * 7}" for i in range(20)]
    pq.write_table(
        pa.table({"messages": [[{"role": "user", "content": t}] for t in texts]}),
        data / "train.parquet",
    )
    config = MakeModelConfig(out=str(folder / "model"), data=str(data), size=size, vocab_size=300)
    return make_model(config)


def toy_config(model: Path, out: Path, **changes: Any) -> TrainConfig:
    """A config for tiny fp32 runs on the CPU; `changes` use `__` for dots."""
    defaults: dict[str, Any] = {
        "model__partial_pretrain": str(model),
        "data__train_files": "toy",
        "data__train_batch_size": 4,
        "data__max_length": 32,
        "data__micro_batch_size_per_gpu": 2,
        "engine__dtype": "fp32",
        "optim__lr": 3e-3,
        "trainer__default_local_dir": str(out),
        "trainer__total_epochs": 2,
        "trainer__device": "cpu",
        "trainer__logger": "[file]",
        "trainer__export": False,
        "trainer__save_freq": -1,
    }
    words = [
        f"{k.replace('__', '.')}={v if v is not None else 'null'}"
        for k, v in {**defaults, **changes}.items()
    ]
    return load_config(TrainConfig, words)


def run_ranks(
    config: TrainConfig,
    *,
    size: int = 1,
    train: ToyStore | None = None,
    val: ToyStore | None = None,
    hook: Hook | None = None,
    kill_after: float | None = None,
) -> list[dict[str, Any]]:
    """Train with `size` forked ranks; returns what each reported (`code`, `error`).

    Args:
        config: of the run.
        size: number of ranks.
        train: samples; default 10.
        val: validation samples.
        hook: called with the trainer in each rank before it starts.
        kill_after: SIGKILL all ranks after so many seconds.
    """
    folder = Path(config.trainer.default_local_dir)
    folder.mkdir(parents=True, exist_ok=True)
    store = folder.parent / f".store-{folder.name}-{time.monotonic_ns()}"
    reports = [store.with_suffix(f".{rank}") for rank in range(size)]
    children = []
    for rank in range(size):
        child = os.fork()
        if child == 0:
            _child(config, rank, size, store, reports[rank], train or toy_store(10), val, hook)
        children.append(child)
    deadline = time.monotonic() + (kill_after if kill_after is not None else 120)
    waiting = set(children)
    while waiting and time.monotonic() < deadline:
        waiting = {c for c in waiting if os.waitpid(c, os.WNOHANG)[0] == 0}
        time.sleep(0.005)
    for child in waiting:
        os.kill(child, signal.SIGKILL)
    for child in waiting:
        os.waitpid(child, 0)
    if kill_after is None:
        assert not waiting, "a rank hangs"
    return [json.loads(r.read_text()) if r.exists() else {"code": -9} for r in reports]


def _child(
    config: TrainConfig,
    rank: int,
    size: int,
    store: Path,
    report: Path,
    train: ToyStore,
    val: ToyStore | None,
    hook: Hook | None,
) -> None:
    """Run one rank and leave, whatever happens, without returning to pytest."""
    result: dict[str, Any] = {"code": 0, "error": ""}
    try:
        log = os.open(f"{report}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.stdout = os.fdopen(1, "w", closefd=False)
        sys.stderr = os.fdopen(2, "w", closefd=False)
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(size))
        torch.set_num_threads(1)  # renews the inherited pool, before loading threads race to do it
        world = setup_world(config.trainer.device, store=dist.FileStore(str(store), size))

        def load(config: TrainConfig, **kwargs: Any) -> inputs.Inputs:
            plan = inputs.make_plan(config, train=train, val=val, world=kwargs["world"])
            return inputs.Inputs(train, val, [Path("toy.csv")], plan)

        fsdp_sft_trainer.load_inputs = load
        inputs.data_fingerprint = lambda store: store.fingerprint
        if hook is not None:
            build = fsdp_sft_trainer.assemble

            def assemble(*args: Any, **kwargs: Any) -> Any:
                trainer, model = build(*args, **kwargs)
                hook(trainer)
                return trainer, model

            fsdp_sft_trainer.assemble = assemble
        with ExitStack() as stack:
            fsdp_sft_trainer.run(config, world=world, stack=stack, owned=[])
    except VerlSftError as error:
        result = {"code": error.exit_code, "error": str(error)}
    except BaseException:
        result = {"code": 1, "error": traceback.format_exc()}
    sys.stdout.flush()
    report.write_text(json.dumps(result))
    os._exit(0)


def steps_of(config: TrainConfig, *keys: str) -> list[tuple[float, ...]]:
    """The named metrics of each step of a run."""
    rows = read_metrics(Path(config.trainer.default_local_dir) / "metrics.jsonl")
    return [tuple(row[key] for key in keys) for row in rows]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the newest checkpoint of a one-rank or many-rank run, whole."""
    from safetensors.torch import load_file

    from verl_sft.trainer.checkpoint import list_checkpoints

    _, newest = list_checkpoints(folder)[0]
    shards = [load_file(f) for f in sorted(newest.glob("*.safetensors"))]
    names = [n for n in shards[0] if not n.startswith("rng")]
    whole = {n: torch.cat([s[n] for s in shards if n in s]) for n in names}
    return {**whole, "optim.step": shards[0]["optim.step"]}
