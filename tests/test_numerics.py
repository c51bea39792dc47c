"""One trajectory: what must not matter to the numbers does not, by maximum and by mean residual.

In float32, with AdamW at 30 times the default learning rate. AdamW divides each entry of a gradient
by its own size, so entries as small as rounding (below eps=1e-8) move by as much as all others, in
directions that rounding decides: at ten times this rate such entries alone move losses by up to
3e-6 (5e-7 with eps=1e-6), while the first step, before any update, agrees to 1e-7 at any rate.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.train_ranks import (
    VOCAB,
    Hook,
    ToyStore,
    run_ranks,
    steps_of,
    toy_config,
    toy_model,
    weights_of,
)
from verl_sft.data.sample import make_sample

LOSS_BOUND, NORM_BOUND, WEIGHT_BOUND = 1e-6, 1e-5, 2e-5
FIRST_LOSS_BOUND = 2e-7  # before any update
PADDED = {"use_remove_padding": False}
LORA = {"model__lora_rank": 4}
STEPS = 6

Trajectory = tuple[np.ndarray[Any, Any], dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_model(tmp_path_factory.mktemp("model"))


def branching_store() -> ToyStore:
    """Twelve samples of mixed weights, most of which go on from a shared beginning."""
    rng = np.random.default_rng(7)
    samples = []
    for group, (count, shared) in enumerate(((3, 8), (1, 0), (4, 12), (2, 3), (2, 15))):
        prefix = rng.integers(3, VOCAB, size=shared)
        for member in range(count):
            ids = np.concatenate([prefix, rng.integers(3, VOCAB, size=int(rng.integers(4, 16)))])
            weights = rng.choice([0.0, 0.5, 1.0], size=len(ids))
            weights[:shared], weights[-1] = 0.0, 1.0
            samples.append(make_sample(ids, weights=weights, record_id=f"{group}.{member}"))
    return ToyStore(samples)


def train(
    model: Path, out: Path, *, size: int = 1, hook: Hook | None = None, **changes: Any
) -> Trajectory:
    """Loss and gradient norm of every step [STEPS, 2], and the weights at the end."""
    config = toy_config(model, out, **{"optim__lr": 3e-4, **changes})
    reports = run_ranks(config, size=size, train=branching_store(), hook=hook)
    assert [r["code"] for r in reports] == [0] * size, reports
    return np.array(steps_of(config, "train/loss", "train/grad_norm")), weights_of(out)


def train_in_two(
    model: Path, out: Path, *, stop_at: int, sizes: tuple[int, int], **changes: Any
) -> Trajectory:
    """The same, stopped behind a step and resumed, on another number of ranks if wanted."""
    config = toy_config(model, out, **{"optim__lr": 3e-4, **changes})

    def ask(trainer: Any) -> None:
        step = trainer.train_step

        def wrapped(plan: Any) -> Any:
            trainer.stop_asked |= trainer.progress.step == stop_at - 1
            return step(plan)

        trainer.train_step = wrapped

    reports = run_ranks(config, size=sizes[0], train=branching_store(), hook=ask)
    assert [r["code"] for r in reports] == [75] * sizes[0], reports
    return train(model, out, size=sizes[1], **changes)


def assert_same(found: Trajectory, expected: Trajectory) -> None:
    """Within the bounds at every step, and half of them on average: no one-sided drift."""
    assert found[0].shape == expected[0].shape == (STEPS, 2)
    apart = found[0] - expected[0]
    for column, bound in enumerate((LOSS_BOUND, NORM_BOUND)):
        assert np.abs(apart[:, column]).max() < bound, apart[:, column]
        assert abs(apart[:, column].mean()) < bound / 2, apart[:, column]
    assert abs(apart[0, 0]) < FIRST_LOSS_BOUND
    for name, tensor in expected[1].items():
        if name.startswith("model."):
            assert float((found[1][name] - tensor).abs().max()) < WEIGHT_BOUND, name


@pytest.fixture(scope="module")
def full(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Trajectory:
    return train(model, tmp_path_factory.mktemp("full") / "run")


@pytest.fixture(scope="module")
def lora(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Trajectory:
    return train(model, tmp_path_factory.mktemp("lora") / "run", **LORA)


def chunk_of(rows: int) -> Hook:
    """Logits of so many rows at one time."""

    def change(trainer: Any) -> None:
        trainer.model.chunk = rows

    return change


CLASS: dict[str, dict[str, Any]] = {
    "one sample at a time": {"data__micro_batch_size_per_gpu": 1},
    "whole batch at once": {"data__micro_batch_size_per_gpu": 8},
    "padded": PADDED,
    "padded, one at a time": {**PADDED, "data__micro_batch_size_per_gpu": 1},
    "recomputed": {"model__enable_gradient_checkpointing": True},
    "masked attention": {"model__attn_implementation": "sdpa"},
    "logits of one row": {"hook": chunk_of(1)},
    "logits of five rows": {"hook": chunk_of(5)},
    "prefixes computed once": {"data__prefix_sharing": "true"},
    "prefixes computed each time": {"data__prefix_sharing": "false"},
    "samples cut over 2 ranks": {"size": 2, "ulysses_sequence_parallel_size": 2},
    "kept gathered": {"engine__reshard_after_forward": False},
    "2 ranks": {"size": 2},
    "2 ranks, padded, recomputed": {
        **PADDED,
        "size": 2,
        "model__enable_gradient_checkpointing": True,
    },
    "3 ranks": {"size": 3, "data__micro_batch_size_per_gpu": 1},
    "4 ranks, one sample each": {"size": 4, "data__micro_batch_size_per_gpu": 1},
}


@pytest.mark.parametrize("name", CLASS)
def test_one_trajectory(model: Path, full: Trajectory, tmp_path: Path, name: str) -> None:
    """Micro-batches, padding, recomputation, kernels, chunks and ranks do not show."""
    assert_same(train(model, tmp_path / "run", **CLASS[name]), full)


@pytest.mark.parametrize(
    "name", ["one sample at a time", "padded", "recomputed", "logits of five rows", "2 ranks"]
)
def test_one_trajectory_of_adapters(
    model: Path, lora: Trajectory, tmp_path: Path, name: str
) -> None:
    """The same with LoRA."""
    assert_same(train(model, tmp_path / "run", **CLASS[name], **LORA), lora)


@pytest.mark.parametrize(
    ("stop_at", "sizes", "changes"),
    [(1, (1, 1), {}), (3, (1, 2), {}), (5, (2, 1), PADDED)],
)
def test_one_trajectory_resumed(
    model: Path,
    full: Trajectory,
    tmp_path: Path,
    stop_at: int,
    sizes: tuple[int, int],
    changes: dict[str, Any],
) -> None:
    """Stopping after any step, at an epoch's end or inside it, and another world size neither."""
    found = train_in_two(model, tmp_path / "run", stop_at=stop_at, sizes=sizes, **changes)
    assert_same(found, full)


def test_another_seed_is_another_trajectory(model: Path, full: Trajectory, tmp_path: Path) -> None:
    """Negative control: what should change the losses does."""
    found, _ = train(model, tmp_path / "run", trainer__seed=2)
    assert abs(found[0, 0] - full[0][0, 0]) > 1e-4


def one_rank_is_louder(trainer: Any) -> None:
    """One of two ranks counts for a millionth more."""
    if trainer.world.rank == 1:
        trainer.model.register_forward_hook(lambda model, args, loss: loss * (1 + 2e-6))


def test_the_bounds_see_a_millionth(model: Path, full: Trajectory, tmp_path: Path) -> None:
    """Negative control: a rank that counts for 2e-6 too much is not the same trajectory."""
    found = train(model, tmp_path / "run", size=2, hook=one_rank_is_louder)
    assert np.abs(found[0][:, 0] - full[0][:, 0]).max() < 1e-4
    with pytest.raises(AssertionError):
        assert_same(found, full)


def test_a_mean_of_means_is_seen(model: Path, full: Trajectory, tmp_path: Path) -> None:
    """Negative control: each micro-batch divided by its own weight is another trajectory."""

    def mean_of_means(trainer: Any) -> None:
        forward = trainer.model.forward

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if kwargs.get("weights") is not None:
                own = kwargs["weights"].sum()
                kwargs["weights"] = kwargs["weights"] / own * kwargs["denominator"] / 2
            return forward(*args, **kwargs)

        trainer.model.forward = wrapped

    found, _ = train(model, tmp_path / "run", hook=mean_of_means)
    assert np.abs(found[:, 0] - full[0][:, 0]).max() > 1e-3


def test_a_one_sided_drift_is_seen(full: Trajectory) -> None:
    """Negative control: an error within the bound at every step, always upwards, is refused."""
    drift = full[0] + np.array([[0.0, 0.0], *[[0.7 * LOSS_BOUND, 0.0]] * 5])
    with pytest.raises(AssertionError):
        assert_same((drift, full[1]), full)
    turns = (
        full[0]
        + np.array([[0.0, 0.0], *[[0.7 * LOSS_BOUND, 0.0], [-0.7 * LOSS_BOUND, 0.0]] * 3])[:STEPS]
    )
    assert_same((turns, full[1]), full)
