"""Sequence parallelism and replicas: other layouts of the ranks, the same trajectory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tests.train_ranks import run_ranks, steps_of, toy_config, toy_model, toy_store, weights_of
from verl_sft.data.collate import collate
from verl_sft.data.slice import slice_batch
from verl_sft.distributed.setup import check_layout
from verl_sft.errors import UsageError

SP = "ulysses_sequence_parallel_size"
LORA = {"model__lora_rank": 4}
PADDED = {"use_remove_padding": False}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_model(tmp_path_factory.mktemp("model"))


def run_once(model: Path, out: Path, *, size: int = 1, **changes: Any) -> Any:
    config = toy_config(model, out, **changes)
    reports = run_ranks(config, size=size, val=toy_store(5, seed=9))
    assert [r["code"] for r in reports] == [0] * size, errors(reports)
    keys = ("train/loss", "train/grad_norm", "train/global_tokens", "train/learned_tokens")
    return np.array(steps_of(config, *keys)), weights_of(out)


def errors(reports: list[dict[str, Any]]) -> str:
    return "\n".join(r.get("error", "killed") for r in reports)


@pytest.fixture(scope="module")
def baselines(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("baselines")
    return {
        "full": run_once(model, folder / "full"),
        "lora": run_once(model, folder / "lora", **LORA),
    }


@pytest.mark.parametrize(
    ("size", "changes"),
    [
        (2, {SP: 2}),
        (2, {SP: 2, **PADDED}),
        (2, {SP: 2, **LORA}),
        (2, {SP: 2, **LORA, **PADDED}),
        (2, {SP: 2, "model__enable_gradient_checkpointing": True}),
        (4, {SP: 4}),  # more ranks than key heads
        (4, {SP: 2, "engine__fsdp_size": 2}),
        (4, {"engine__fsdp_size": 2}),
        (4, {"engine__fsdp_size": 2, **LORA}),
        (2, {"engine__fsdp_size": 1}),
        (2, {"engine__reshard_after_forward": False}),
    ],
)
def test_every_layout_is_the_same_run(
    model: Path, baselines: dict[str, Any], tmp_path: Path, size: int, changes: dict[str, Any]
) -> None:
    """Losses and gradient norms are those of one process, and nothing is counted twice."""
    steps, weights = run_once(model, tmp_path / "run", size=size, **changes)
    expected, final = baselines["lora" if "model__lora_rank" in changes else "full"]
    assert steps.shape == expected.shape == (6, 4)
    assert np.abs(steps[:2, 0] - expected[:2, 0]).max() < 1e-6
    assert np.abs(steps[0, 1] - expected[0, 1]) < 1e-5
    assert np.abs(steps[:, 0] - expected[:, 0]).max() < 1e-5
    assert np.array_equal(steps[:, 2:], expected[:, 2:])
    for name, tensor in final.items():
        if name.startswith("model."):
            assert torch.allclose(weights[name], tensor, atol=2e-4), name


@pytest.mark.parametrize("changes", [{SP: 2, **LORA}, {"engine__fsdp_size": 1}])
def test_resume_is_bit_exact(model: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    """A run that goes on from a checkpoint of its layout has the bits of the uninterrupted one."""
    settings = {"trainer__save_freq": 1, **changes}
    whole, expected = run_once(model, tmp_path / "whole", size=2, **settings)
    _begin(tmp_path / "whole", tmp_path / "rest", step=3)
    rest, weights = run_once(model, tmp_path / "rest", size=2, **settings)
    assert np.array_equal(whole, rest)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((2, {SP: 2}), (2, {})),
        ((4, {SP: 2, "engine__fsdp_size": 2}), (1, {})),
        ((1, {}), (4, {SP: 2, "engine__fsdp_size": 2})),
    ],
)
def test_resume_on_another_layout(
    model: Path, baselines: dict[str, Any], tmp_path: Path, before: Any, after: Any
) -> None:
    """Checkpoints know nothing of slices and replicas."""
    run_once(model, tmp_path / "whole", size=before[0], trainer__save_freq=1, **before[1])
    _begin(tmp_path / "whole", tmp_path / "rest", step=2)
    steps, _ = run_once(model, tmp_path / "rest", size=after[0], **after[1])
    assert np.abs(steps[:, 0] - baselines["full"][0][:, 0]).max() < 1e-5


def _begin(source: Path, target: Path, *, step: int) -> None:
    target.mkdir()
    shutil.copytree(source / f"global_step_{step}", target / f"global_step_{step}")
    shutil.copy(source / "metrics.jsonl", target)


def test_one_replica_writes_tensors(model: Path, tmp_path: Path) -> None:
    """Two copies of the parameters are one in a checkpoint."""
    from safetensors import safe_open

    run_once(model, tmp_path / "run", size=4, engine__fsdp_size=2)
    folder = tmp_path / "run" / "global_step_6"
    kinds = []
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as shard:
            kinds.append({name.partition(".")[0] for name in shard.keys()})  # noqa: SIM118
    assert kinds == [{"model", "optim", "rng"}] * 2 + [{"rng"}] * 2


def test_slices_halve_the_activations(model: Path, tmp_path: Path) -> None:
    """Two ranks that share one long document keep half as much for backward as one does."""
    kept = {}
    for size in (1, 2):
        out = tmp_path / f"run{size}"
        changes = {"data__max_length": 1024, "data__micro_batch_size_per_gpu": 1}
        config = toy_config(model, out, trainer__total_training_steps=1, **{SP: size}, **changes)
        store = toy_store(1, longest=1000)
        store.samples[0] = long_sample(1000)
        store.lengths[0] = 1000

        def measure(trainer: Any) -> None:
            step, found = trainer.train_step, {}

            def keep(tensor: torch.Tensor) -> torch.Tensor:
                if not isinstance(tensor, torch.nn.Parameter):
                    storage = tensor.untyped_storage()
                    found[storage.data_ptr()] = storage.nbytes()
                return tensor

            def wrapped(plan: Any) -> Any:
                with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
                    outcome = step(plan)
                path = Path(trainer.directory) / f"kept{trainer.world.rank}.json"
                path.write_text(json.dumps(sum(found.values())))
                return outcome

            trainer.train_step = wrapped

        reports = run_ranks(config, size=size, train=store, hook=measure)
        assert [r["code"] for r in reports] == [0] * size, errors(reports)
        kept[size] = [json.loads((out / f"kept{r}.json").read_text()) for r in range(size)]
    assert max(kept[2]) < 0.6 * kept[1][0], kept


def long_sample(length: int) -> Any:
    from verl_sft.data.sample import make_sample

    return make_sample(np.arange(length + 1) % 250 + 3, weights=np.ones(length + 1), record_id="x")


def test_slices_hold_the_batch() -> None:
    """Slices behind one another are the batch and its padding; documents are described whole."""
    store = toy_store(3)
    batch = collate([[store[0], store[1]], [store[2]]], pad_id=0)
    total = batch.input_ids.numel()
    assert slice_batch(batch, part=0, parts=1) is batch
    for parts in (2, 3, 5):
        slices = [slice_batch(batch, part=p, parts=parts) for p in range(parts)]
        for name in ("input_ids", "target_ids", "weights", "position_ids", "document_ids"):
            joined = torch.cat([getattr(s, name) for s in slices], dim=1)[0]
            assert torch.equal(joined[:total], getattr(batch, name).reshape(-1)), name
        assert joined[total:].tolist() == [-1] * (-total % parts)
        assert all(s.weights[0, max(0, total - p * s.weights.numel()) :].sum() == 0
                   for p, s in enumerate(slices))  # fmt: skip
        assert int(slices[0].cu_seqlens[-1]) == total + -total % parts
        assert all(torch.equal(s.cu_seqlens, slices[0].cu_seqlens) for s in slices)
        assert slices[-1].parts == parts and slices[-1].num_documents == 3


@pytest.mark.parametrize(
    ("size", "changes", "said"),
    [
        (2, {SP: 3}, "ulysses_sequence_parallel_size=3 does not divide the 2 ranks"),
        (3, {SP: 3}, "does not divide the model's 4 attention heads"),
        (2, {SP: 2, "model__attn_implementation": "sdpa"}, "model.attn_implementation=sdpa"),
        (2, {SP: 2, "model__neftune_noise_alpha": 5}, "model.neftune_noise_alpha"),
        (3, {"engine__fsdp_size": 2}, "engine.fsdp_size=2 does not divide the 3 ranks"),
    ],
)
def test_layouts_that_cannot_be(
    model: Path, tmp_path: Path, size: int, changes: dict[str, Any], said: str
) -> None:
    """Refused on every rank, with what would fit."""
    reports = run_ranks(toy_config(model, tmp_path / "run", **changes), size=size)
    assert [r["code"] for r in reports] == [2] * size
    assert all(said in r["error"] for r in reports), reports


def test_layouts_that_can_be() -> None:
    """A script made for more ranks than there are shards over all of them, as in verl."""
    check_layout(1, sp_size=1, fsdp_size=8)
    check_layout(8, sp_size=4, fsdp_size=-1)
    with pytest.raises(UsageError, match=r"engine\.fsdp_size=0"):
        check_layout(8, sp_size=1, fsdp_size=0)


def test_a_model_that_mixes_tokens_elsewhere_is_refused(model: Path, tmp_path: Path) -> None:
    """Negative control: attention that does not exchange fails the start-up probe on all ranks."""
    from verl_sft.model import ulysses

    def without(inner: Any, *, group: Any) -> Any:
        def attention(*args: Any, sequence_parts: int = 1, **kwargs: Any) -> Any:
            if sequence_parts > 1:
                rows = args[1].shape[2]
                bounds = torch.tensor([0, rows], dtype=torch.int32)
                kwargs |= {"cu_seq_lens_q": bounds, "document_lengths": (rows,)}
            return inner(*args, **kwargs)

        return attention

    original = ulysses.ulysses
    ulysses.ulysses = without
    try:
        reports = run_ranks(toy_config(model, tmp_path / "run", **{SP: 2}), size=2)
    finally:
        ulysses.ulysses = original
    assert [r["code"] for r in reports] == [2, 2]
    assert "slices of a sequence do not give its logits" in reports[0]["error"]


@pytest.mark.parametrize(
    ("reshard", "gatherings"),
    [
        (True, 2 * (2 * 2 + 1)),  # two layers forward and backward, and the rest of the model
        (False, 2 + 1),
    ],
)
def test_gathered_parameters_are_kept(
    model: Path, tmp_path: Path, reshard: bool, gatherings: int
) -> None:
    """Two micro-batches cost as many all-gathers as the settings promise, and no more."""
    changes = {"engine__reshard_after_forward": reshard, "data__micro_batch_size_per_gpu": 1}
    config = toy_config(model, tmp_path / "run", trainer__total_training_steps=1, **changes)

    def count(trainer: Any) -> None:
        name = "all_gather_single"  # what FSDP calls it since torch 2.13
        name = name if hasattr(dist, name) else "all_gather_into_tensor"
        step, gather, found = trainer.train_step, getattr(dist, name), []

        def counted(*args: Any, **kwargs: Any) -> Any:
            found.append(1)
            return gather(*args, **kwargs)

        def wrapped(plan: Any) -> Any:
            assert plan.num_micro_batches == 2
            found.clear()
            outcome = step(plan)
            (Path(trainer.directory) / "gathers.json").write_text(json.dumps(len(found)))
            return outcome

        setattr(dist, name, counted)
        trainer.train_step = wrapped

    store = toy_store(4)
    for index in range(4):
        store.samples[index], store.lengths[index] = long_sample(30), 30
    reports = run_ranks(config, size=2, train=store, hook=count)
    assert [r["code"] for r in reports] == [0, 0], errors(reports)
    assert json.loads((tmp_path / "run" / "gathers.json").read_text()) == gatherings


def test_export_of_slices_and_replicas(model: Path, tmp_path: Path) -> None:
    """What is exported was compared with the live logits, whatever the layout of the ranks."""
    changes = {SP: 2, "engine__fsdp_size": 2, "trainer__export": True, **LORA}
    run_once(model, tmp_path / "run", size=4, trainer__total_training_steps=2, **changes)
    manifest = json.loads((tmp_path / "run" / "huggingface" / "manifest.json").read_text())
    assert manifest["max_logit_difference_live"] < 1e-4 and manifest["lora_merged"]
