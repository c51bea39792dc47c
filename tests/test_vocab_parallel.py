"""The head and the embedding divided over ranks: the same run, with fewer bytes on the way."""

from __future__ import annotations

import json
import os
import shutil
import traceback
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.functional import embedding
from transformers import AutoConfig, AutoModelForCausalLM

from tests.train_ranks import (
    ToyStore,
    run_ranks,
    steps_of,
    toy_config,
    toy_model,
    toy_store,
    weights_of,
)
from verl_sft.data.sample import make_sample
from verl_sft.distributed.divided import DividedGradients, divide
from verl_sft.distributed.setup import World
from verl_sft.distributed.sharding import rows_of
from verl_sft.model import vocab_parallel
from verl_sft.model.loss import LossModel, loss_sum
from verl_sft.model.vocab_parallel import VocabPart, vocab_tables
from verl_sft.trainer import vocab as choosing
from verl_sft.trainer.memory import MemorySettings, estimate_memory
from verl_sft.trainer.planning import model_shape
from verl_sft.trainer.vocab import VocabWork, chosen, obstacle, plan_divided, vocab_traffic

SP = "ulysses_sequence_parallel_size"
LORA = {"model__lora_rank": 4}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of a model with tied matrices, of one with two, and of one with 301 rows."""
    folder = tmp_path_factory.mktemp("models")
    found = {"tied": toy_model(folder)}
    for name, changes in {
        "untied": {"tie_word_embeddings": False, "pad_token_id": None},
        "uneven": {"tie_word_embeddings": True, "vocab_size": 301, "pad_token_id": 5},
    }.items():
        found[name] = folder / name
        ignored = shutil.ignore_patterns("*.safetensors", "config.json")
        shutil.copytree(found["tied"], found[name], ignore=ignored)
        config = AutoConfig.from_pretrained(found["tied"])
        config.update(changes)
        torch.manual_seed(4)
        AutoModelForCausalLM.from_config(config).save_pretrained(found[name])
    return found


def run_once(
    model: Path, out: Path, divided: str, *, size: int = 2, train: Any = None, **changes: Any
) -> Any:
    config = toy_config(model, out, model__vocab_parallel=divided, **changes)
    reports = run_ranks(config, size=size, train=train, val=toy_store(5, seed=9))
    assert [r["code"] for r in reports] == [0] * size, "\n".join(r["error"] for r in reports)
    return np.array(steps_of(config, "train/loss", "train/grad_norm")), weights_of(out)


def assert_same(one: Any, other: Any) -> None:
    """Losses within 1e-6, gradient norms within 1e-5 of themselves; Adam enlarges the rest."""
    assert one[0].shape == other[0].shape
    assert np.abs(one[0][:, 0] - other[0][:, 0]).max() < 1e-6
    assert np.abs(one[0][:, 1] / other[0][:, 1] - 1).max() < 1e-5
    assert one[1].keys() == other[1].keys()
    for name, tensor in one[1].items():
        if name.startswith("model."):
            assert torch.allclose(tensor, other[1][name], atol=2e-5), name


def lonely_store() -> ToyStore:
    """Neighbours of which always one teaches nothing: read in order, a rank of two without rows."""
    store = toy_store(6)
    for index in (0, 3, 4):
        old = store.samples[index]
        ids = np.append(old.input_ids, old.target_ids[-1])
        store.samples[index] = make_sample(ids, weights=np.zeros(len(ids)), record_id=old.record_id)
    return store


@pytest.mark.parametrize(
    ("model", "size", "changes"),
    [
        ("tied", 2, LORA),
        ("untied", 2, {**LORA, "engine__meta_start": "false"}),
        ("untied", 2, {**LORA, "model__target_modules": "[embed_tokens,q_proj]"}),  # head alone
        ("untied", 2, {"engine__reshard_after_forward": False, "use_remove_padding": False}),
        ("uneven", 2, {"data__micro_batch_size_per_gpu": 1, "data__train_batch_size": 5}),
        ("tied", 2, {SP: 2, "model__enable_gradient_checkpointing": True}),
        ("uneven", 4, {SP: 2, "engine__fsdp_size": 2, "data__micro_batch_size_per_gpu": 1}),
    ],
)
def test_the_run_is_the_same(
    models: dict[str, Path], tmp_path: Path, model: str, size: int, changes: dict[str, Any]
) -> None:
    """Losses, gradient norms and final weights are those of gathered matrices."""
    found = [
        run_once(models[model], tmp_path / divided, divided, size=size, **changes)
        for divided in ("false", "true")
    ]
    assert_same(*found)


def test_ranks_without_learned_rows(models: dict[str, Path], tmp_path: Path) -> None:
    """A rank whose samples teach nothing gives its columns to the others' rows all the same."""
    found = [
        run_once(
            models["uneven"], tmp_path / divided, divided, train=lonely_store(),
            data__train_batch_size=2, data__micro_batch_size_per_gpu=1, data__shuffle=False,
            optim__lr=3e-4,
        )
        for divided in ("false", "true")
    ]  # fmt: skip
    assert_same(*found)


@pytest.mark.parametrize(
    ("before", "after", "sizes"), [("false", "true", (2, 3)), ("true", "false", (2, 1))]
)
def test_resume_from_the_other_way(
    models: dict[str, Path], tmp_path: Path, before: str, after: str, sizes: tuple[int, ...]
) -> None:
    """A checkpoint does not know how it was computed, on as many ranks or on others."""
    model, whole = models["uneven"], tmp_path / "whole"
    expected = run_once(model, whole, before, trainer__save_freq=1)
    for size in sizes:
        rest = begin(whole, tmp_path / f"rest{size}")
        assert_same(run_once(model, rest, after, size=size), expected)


def begin(whole: Path, rest: Path) -> Path:
    """A directory with nothing but the checkpoint of step 3."""
    rest.mkdir()
    shutil.copytree(whole / "global_step_3", rest / "global_step_3")
    shutil.copy(whole / "metrics.jsonl", rest)
    return rest


def test_resume_of_its_own_is_bit_exact(models: dict[str, Path], tmp_path: Path) -> None:
    """What goes on from step 3 has the bits of the run that never stopped."""
    whole = run_once(models["tied"], tmp_path / "whole", "true", trainer__save_freq=1)
    rest = begin(tmp_path / "whole", tmp_path / "rest")
    found = run_once(models["tied"], rest, "true", trainer__save_freq=1)
    assert np.array_equal(found[0], whole[0])
    assert all(torch.equal(found[1][name], whole[1][name]) for name in whole[1])


def test_export_is_the_same(models: dict[str, Path], tmp_path: Path) -> None:
    """The folder has the live logits, and every weight of the run that gathered."""
    from safetensors.torch import load_file

    weights = []
    for divided in ("false", "true"):
        out = tmp_path / divided
        changes = {"trainer__export": True, "trainer__total_training_steps": 2}
        run_once(models["untied"], out, divided, **changes)
        manifest = json.loads((out / "huggingface" / "manifest.json").read_text())
        assert manifest["max_logit_difference_live"] < 1e-4
        weights.append(load_file(out / "huggingface" / "model.safetensors"))
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.allclose(weights[0][n], weights[1][n], atol=2e-5) for n in weights[0])


def test_replicas_must_be_added_up(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: without the sum over replicas the gradient is another one."""

    class Alone(DividedGradients):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._replicas = None

    settings = {"trainer__total_training_steps": 1, "engine__fsdp_size": 2, "size": 4}
    whole, _ = run_once(models["tied"], tmp_path / "false", "false", **settings)
    monkeypatch.setattr(choosing, "DividedGradients", Alone)
    wrong, _ = run_once(models["tied"], tmp_path / "true", "true", **settings)
    assert abs(whole[0, 0] - wrong[0, 0]) < 1e-6 and abs(whole[0, 1] - wrong[0, 1]) > 1e-3


ROWS = (3, 1, 5, 2)  # of the ranks


def on_ranks(folder: Path, job: Any, *, size: int) -> None:
    """Run `job(rank)` on forked ranks; what one raises is shown."""
    children = []
    for rank in range(size):
        child = os.fork()
        if child == 0:
            try:
                torch.set_num_threads(1)
                store = dist.FileStore(str(folder / "store"), size)
                dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
                job(rank)
                dist.barrier()
            except BaseException:
                (folder / "error").write_text(traceback.format_exc())
                os._exit(1)
            os._exit(0)
        children.append(child)
    codes = [os.waitpid(child, 0)[1] for child in children]
    problem = folder / "error"
    assert not any(codes), problem.read_text() if problem.exists() else codes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [5, 33])
def test_loss_and_look_up_of_any_rows(tmp_path: Path, vocab: int, dtype: torch.dtype) -> None:
    """Ranks with other numbers of rows, one perhaps without vocabulary: as with whole matrices."""
    size, width = len(ROWS), 8
    torch.manual_seed(vocab)
    table = torch.randn(vocab, width)
    ids = [torch.randint(0, vocab, (n,)) for n in ROWS]
    targets = [torch.randint(0, vocab, (n,)) for n in ROWS]
    weights = [torch.rand(n) for n in ROWS]
    limit = 1e-5 if dtype is torch.float32 else 0.03

    def whole(rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        each = torch.empty(ROWS[rank])
        rows = embedding(ids[rank], everything.to(dtype), padding_idx=2).square()
        loss = loss_sum(rows, everything.to(dtype), targets[rank], weights[rank], 2, each)
        return loss, each, rows @ everything.to(dtype).T

    everything = table.clone().requires_grad_()
    expected = [whole(rank) for rank in range(size)]
    sum(loss for loss, *_ in expected).backward()

    def job(rank: int) -> None:
        part = VocabPart(vocab, rank, size, None, dtype)
        mesh = init_device_mesh("cpu", (size,))
        weight = distribute_tensor(table, mesh, [Shard(0)]).requires_grad_()
        module = SimpleNamespace(weight=weight, padding_idx=2)
        assert len(weight.to_local()) == rows_of(rank, size=size, rows=vocab)[1] - part.start
        rows = vocab_parallel._look_up(module, ids[rank][None], part=part)[0].square()
        each = torch.empty(ROWS[rank])
        loss = vocab_parallel.vocab_loss(
            rows, weight, targets[rank], weights[rank], 2, each, part=part
        )
        with torch.no_grad():
            quiet = vocab_parallel.vocab_loss(
                rows, weight, targets[rank], weights[rank], 0, None, part=part
            )
            logits = vocab_parallel._logits(module, rows[None], part=part)[0]
        loss.backward()
        torch.testing.assert_close(loss, expected[rank][0].detach(), rtol=limit, atol=limit)
        torch.testing.assert_close(quiet, loss.detach(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(each, expected[rank][1], rtol=limit, atol=limit)
        torch.testing.assert_close(logits, expected[rank][2].detach(), rtol=limit, atol=limit)
        found = weight.grad.full_tensor()
        torch.testing.assert_close(found, everything.grad, rtol=limit, atol=10 * limit)

    on_ranks(tmp_path, job, size=size)


def test_gradients_add_up_in_float32(tmp_path: Path) -> None:
    """Micro-batches too small for bf16 count, as they do where FSDP adds up."""

    def job(rank: int) -> None:
        mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("shard",))
        world = World(rank=0, size=1, device=torch.device("cpu"), mesh=mesh)
        module = torch.nn.Linear(2, 3, bias=False, dtype=torch.bfloat16)
        divide([module], world=world)
        gradients = DividedGradients([module], world=world)
        gradients.watch()
        for number, size in enumerate((1, 2**-9, 2**-9, 2**-9, 2**-9)):
            gradients.last = number == 4
            (module.weight.to_local() * size).sum().backward()
        found = module.weight.grad.full_tensor()
        assert found.dtype is torch.bfloat16 and bool((found == 1 + 2**-7).all())

    on_ranks(tmp_path, job, size=1)


def traffic(*, tokens: int = 16384, **changes: Any) -> Any:
    """Of a 7B model on the GPUs of a node."""
    work = VocabWork(tokens=tokens, learned=tokens * 0.3, rounds=4)
    sizes = {"vocab": 152064, "hidden": 3584, "matrices": 2, "shards": 8, "half": True}
    return vocab_traffic(**{"work": work, "trained": True, **sizes, **changes})


def test_auto_takes_what_travels_less() -> None:
    """Rows of a node are fewer than two vocabularies; those of many nodes are not."""
    few = traffic()
    assert few.divided < few.whole / 3
    divided, line = chosen("auto", why="", traffic=few)
    assert divided and "MiB" in line
    many = traffic(shards=128, matrices=1, trained=False)
    assert many.divided > many.whole
    assert not chosen("auto", why="", traffic=many)[0] and chosen("true", why="", traffic=many)[0]
    assert chosen("false", why="", traffic=few) == (False, "")
    small = traffic(tokens=640, vocab=2048, hidden=128, shards=2)
    assert small.divided < small.whole and not chosen("auto", why="", traffic=small)[0]
    assert traffic(reshard=False).whole < few.whole


def test_the_plan_knows(models: dict[str, Path], tmp_path: Path) -> None:
    """A dry run chooses as the run will, and expects less memory where rows stay divided."""
    config = toy_config(models["tied"], tmp_path / "run")
    work = VocabWork(tokens=64, learned=20, rounds=1)
    shape = replace(model_shape(config.model), vocab=100_000)
    settings = MemorySettings(shard_size=4)
    known = {"shape": shape, "settings": settings, "work": work, "on_gpu": False}
    assert plan_divided(config, **known)[0]
    config.model.vocab_parallel = "false"
    assert plan_divided(config, **known) == (False, "")
    totals = [
        estimate_memory(shape, settings=s, tokens=64, learned=20).total
        for s in (replace(settings, divided=True), settings)
    ]
    assert totals[0] < totals[1]


def test_what_cannot_be_divided(models: dict[str, Path], tmp_path: Path) -> None:
    """`auto` says why it gathers; `true` is refused where the model has no plain head."""
    config = toy_config(models["tied"], tmp_path / "run")
    assert "whole copy" in obstacle(config, shards=1, on_gpu=False)
    config.engine.offload = True
    assert not obstacle(config, shards=2, on_gpu=False)
    assert "engine.offload" in obstacle(config, shards=2, on_gpu=True)
    config.model.quantization = "nf4"
    assert "model.quantization=nf4" in obstacle(config, shards=2, on_gpu=False)
    causal = AutoModelForCausalLM.from_pretrained(models["tied"])
    assert len(vocab_tables(LossModel(causal))) == 2
    causal.get_input_embeddings().max_norm = 1.0
    assert "the embedding, which is also the head" in str(vocab_tables(LossModel(causal)))
    changes = {**LORA, "model__target_modules": "[lm_head,q_proj]"}
    changes["trainer__total_training_steps"] = 1
    run_once(models["untied"], tmp_path / "auto", "auto", **changes)
    (log,) = tmp_path.glob(".store-auto*.0.log")
    assert "the vocabulary is not divided over ranks: the model's head" in log.read_text()
    config = toy_config(
        models["untied"], tmp_path / "true", model__vocab_parallel="true", **changes
    )
    for report in run_ranks(config, size=2):
        assert report["code"] == 2 and "model.vocab_parallel=true" in report["error"]
