"""Precision policies: what parameters, optimizer states and computation are kept in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.train_ranks import run_ranks, steps_of, toy_config, toy_model, weights_of
from verl_sft.trainer.state import NUMBER

LORA = {"model__lora_rank": 4}
# bf16 keeps 8 bits: the loss of a step may be off by 0.4 %, a gradient norm by 1 %.
LOSS_BOUND, NORM_BOUND = 0.004, 0.01
LAG_BOUND = 0.05  # of six steps of bf16 parameters, which do not take up small updates

Trajectory = tuple[np.ndarray[Any, Any], dict[str, torch.Tensor], str]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_model(tmp_path_factory.mktemp("model"))


def train(model: Path, out: Path, *, size: int = 1, **changes: Any) -> Trajectory:
    """Loss and gradient norm of each step, the checkpoint's tensors, and what rank 0 printed."""
    config = toy_config(model, out, **{"optim__lr": 3e-4, **changes})
    reports = run_ranks(config, size=size)
    assert [r["code"] for r in reports] == [0] * size, reports
    (log,) = out.parent.glob(f".store-{out.name}-*.0.log")
    steps = np.array(steps_of(config, "train/loss", "train/grad_norm"))
    return steps, weights_of(out), log.read_text()


@pytest.fixture(scope="module", params=[{}, LORA], ids=["full", "lora"])
def exact(
    request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], Trajectory]:
    """The float32 run, and what it trains."""
    out = tmp_path_factory.mktemp("fp32") / "run"
    return request.param, train(model, out, engine__dtype="fp32", **request.param)


@pytest.mark.parametrize(
    ("compute", "size"),  # auto is one of the others
    [("auto", 1), ("fp32", 1), ("fp32", 2), ("bf16", 1), ("bf16", 2)],
)
@pytest.mark.parametrize("kept", ["fp32", "bf16"])
def test_every_policy(
    model: Path,
    exact: tuple[dict[str, Any], Trajectory],
    tmp_path: Path,
    compute: str,
    kept: str,
    size: int,
) -> None:
    """Each follows the float32 run within bf16's rounding; pure bf16, and it alone, is warned of.

    Parameters and both AdamW moments are kept in `engine.model_dtype`, whatever computes.
    """
    changes, (steps, _, _) = exact
    found, tensors, log = train(
        model,
        tmp_path / "run",
        size=size,
        engine__dtype=compute,
        engine__model_dtype=kept,
        **changes,
    )
    apart = np.abs(found / steps - 1)
    assert apart[0, 0] < LOSS_BOUND and apart[0, 1] < NORM_BOUND, apart
    assert (apart[:, 0] < (LAG_BOUND if kept == "bf16" else LOSS_BOUND)).all(), apart[:, 0]
    assert kept == "bf16" or (apart[:, 1] < NORM_BOUND).all(), apart[:, 1]
    kinds = {
        t.dtype
        for n, t in tensors.items()
        if n.startswith(("model.", "optim.")) and not n.startswith(NUMBER)
    }
    assert kinds - {torch.float32} == ({torch.bfloat16} if kept == "bf16" else set())
    assert ("small updates are lost" in log) == (kept == "bf16")
    if (compute, kept) == ("fp32", "fp32"):
        assert np.abs(found - steps).max() < 1e-5
    elif "bf16" in (compute, kept):
        assert np.abs(found - steps).max() > 1e-5, "nothing was rounded"


def test_pure_bf16_loses_small_updates(model: Path, tmp_path: Path) -> None:
    """Why it is warned of: at a rate of 1e-6 most bf16 weights never move, float32 ones do."""
    moved = {}
    for kept in ("fp32", "bf16"):
        ends = []
        for number, rate in enumerate((0.0, 1e-6)):
            out = tmp_path / f"{kept}{number}"
            changes = {"engine__model_dtype": kept, "optim__lr": rate, "optim__weight_decay": 0}
            ends.append(train(model, out, engine__dtype="bf16", **changes)[1])
        names = [n for n, t in ends[0].items() if n.startswith("model.") and t.ndim == 2]
        moved[kept] = np.mean([float((ends[0][n] != ends[1][n]).float().mean()) for n in names])
    assert moved["fp32"] > 0.9 and moved["bf16"] < 0.2, moved
