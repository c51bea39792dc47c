"""What a run proves about itself before its first step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train_ranks import run_ranks, toy_config, toy_model
from verl_sft.data.store import LoadReport
from verl_sft.errors import UsageError
from verl_sft.model import vocab_parallel
from verl_sft.trainer.self_checks import check_stop_tokens, require, self_checks

NAMES = [
    "packing isolation",
    "stop token learned",
    "precision",
    "trained parameters",
    "gradient accumulation",
]
DIVIDED = {"model__vocab_parallel": "true"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_model(tmp_path_factory.mktemp("model"))


def checked(model: Path, out: Path, *, size: int = 1, spoil: Any = None, **changes: Any) -> Any:
    """`(name, passed, told)` of each check of a run that was stopped before its first step."""
    config = toy_config(model, out, **changes)
    found = out.with_suffix(".json")

    def hook(trainer: Any) -> None:
        if spoil:
            spoil(trainer)
        checks = self_checks(
            config,
            world=trainer.world,
            model=trainer.model,
            optimizer=trainer.optimizer,
            report=LoadReport(turns=4, lost_stops=1),
            attention="split",
            dtype=torch.float32,
            apart=0.0,
        )
        if trainer.world.is_main:
            found.write_text(json.dumps([[c.name, c.passed, c.told] for c in checks]))
        raise UsageError("enough")

    reports = run_ranks(config, size=size, hook=hook)
    assert [r["error"] for r in reports] == ["enough."] * size, reports
    return json.loads(found.read_text())


@pytest.mark.parametrize(
    ("size", "changes"),
    [
        (1, {}),
        (2, {"model__lora_rank": 4}),
        (2, {"ulysses_sequence_parallel_size": 2}),
        (2, DIVIDED),
        (2, {"ulysses_sequence_parallel_size": 2, **DIVIDED}),
    ],
)
def test_a_sound_run_passes(model: Path, tmp_path: Path, size: int, changes: Any) -> None:
    """Full, LoRA and sequence parallel: every check is there and passes."""
    found = checked(model, tmp_path / "run", size=size, **changes)
    divided = ["divided vocabulary"] * (DIVIDED.items() <= changes.items())
    assert [name for name, _, _ in found] == NAMES + divided
    assert all(passed for _, passed, _ in found), found
    told = {name: text for name, _, text in found}
    assert ("the base is frozen" in told["trained parameters"]) == ("model__lora_rank" in changes)
    assert told["stop token learned"] == "in 3 of 4 turns"


def lose_a_group(trainer: Any) -> None:
    trainer.optimizer.param_groups.pop()


def freeze_one(trainer: Any) -> None:
    next(trainer.model.parameters()).requires_grad_(False)


def compute_in_half(trainer: Any) -> None:
    def halve(module: Any, inputs: Any, output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        return first.bfloat16()

    trainer.model.causal.model.layers[-1].register_forward_hook(halve)
    trainer.model.causal.model.norm.register_forward_pre_hook(lambda m, x: (x[0].float(),))


def mix_documents(trainer: Any) -> None:
    """Positions go on over the whole row, and documents are not told apart."""
    forward = trainer.model.forward

    def whole(*args: Any, **kwargs: Any) -> Any:
        total = kwargs["input_ids"].numel()
        kwargs["cu_seqlens"] = torch.tensor([0, total], dtype=torch.int32)
        kwargs["position_ids"] = torch.arange(total)[None]
        return forward(*args, **{**kwargs, "max_seqlen": total})

    trainer.model.forward = whole


@pytest.mark.parametrize(
    ("spoil", "name"),
    [
        (lose_a_group, "trained parameters"),
        (freeze_one, "trained parameters"),
        (compute_in_half, "precision"),
        (mix_documents, "gradient accumulation"),
    ],
)
def test_a_spoiled_run_fails_its_check(model: Path, tmp_path: Path, spoil: Any, name: str) -> None:
    """Negative controls: each damage fails the check that is there for it."""
    found = checked(model, tmp_path / "run", spoil=spoil)
    assert [n for n, passed, _ in found if not passed] == [name], found


def forget_columns(trainer: Any) -> None:
    """Every rank takes the columns of the first one for all."""
    combine = vocab_parallel.combine
    vocab_parallel.combine = lambda stats: combine(stats[:1])  # in this forked rank alone


def test_columns_of_other_ranks_are_missed(model: Path, tmp_path: Path) -> None:
    """Negative control: ranks that know their own columns alone."""
    found = checked(model, tmp_path / "run", size=2, spoil=forget_columns, **DIVIDED)
    assert [n for n, passed, _ in found if not passed] == ["divided vocabulary"], found


def test_turns_that_never_end_are_refused() -> None:
    """All stop tokens cut off: refused with what to do; none printed by the template: told."""
    lost = check_stop_tokens(LoadReport(turns=3, lost_stops=3))
    with pytest.raises(UsageError, match=r"stop token learned: in 0 of 3 turns.*max_length"):
        require([lost])
    silent = check_stop_tokens(LoadReport(turns=3, without_stop=3))
    assert silent.passed and "prints none in 3" in str(silent)
