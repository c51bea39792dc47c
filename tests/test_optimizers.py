"""Optimizers by name: they train, resume to the bit, and a wrong name is told."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.train_ranks import run_ranks, steps_of, toy_config, toy_model, weights_of
from verl_sft.config.load import load_config
from verl_sft.config.train import OptimConfig, TrainConfig
from verl_sft.errors import MissingExtraError, UsageError
from verl_sft.trainer.optimizers import JoinedOptimizer, make_optimizer, optimizer_class

NAMES = ["Adam", "NAdam", "RAdam", "Adamax", "SGD", "RMSprop", "Adagrad", "Adafactor", "Rprop"]
NAMES += ["Muon"]
FASTER = {"SGD": {"optim__override_optimizer_config": "{momentum: 0.9}", "optim__lr": 0.3}}
FASTER["Rprop"] = {"optim__lr": 1e-4}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_model(tmp_path_factory.mktemp("optimizers"))


def stop_behind(steps: int) -> Any:
    """A hook that asks the run to stop behind a step."""

    def hook(trainer: Any) -> None:
        inner = trainer.train_step

        def step(plan: Any) -> Any:
            trainer.stop_asked |= trainer.progress.step == steps - 1
            return inner(plan)

        trainer.train_step = step

    return hook


def resumed_equals_straight(model: Path, folder: Path, *, size: int, **changes: Any) -> None:
    """Train in one go and with a stop; losses, weights and optimizer states must be the same."""
    straight = toy_config(model, folder / "straight", **changes)
    halved = toy_config(model, folder / "halved", **changes)
    reports = run_ranks(straight, size=size)
    assert [r["code"] for r in reports] == [0] * size, reports
    assert {r["code"] for r in run_ranks(halved, size=size, hook=stop_behind(2))} == {75}
    reports = run_ranks(halved, size=size)
    assert [r["code"] for r in reports] == [0] * size, reports
    keys = ("train/loss", "train/grad_norm")
    assert steps_of(halved, *keys) == steps_of(straight, *keys)
    ours, other = weights_of(folder / "halved"), weights_of(folder / "straight")
    assert ours.keys() == other.keys()
    states = [t for name, t in ours.items() if name.startswith("optim.") and "norm" in name]
    assert states and all(t.any() for t in states)  # of something that was updated
    for name, tensor in ours.items():
        assert torch.equal(tensor.nan_to_num(), other[name].nan_to_num()), name


@pytest.mark.parametrize("name", NAMES)
def test_resume_is_bit_exact(model: Path, tmp_path: Path, name: str) -> None:
    """A run stopped behind step 2 and resumed is the run without a stop, to the bit."""
    changes = {"optim__optimizer": name, **FASTER.get(name, {})}
    resumed_equals_straight(model, tmp_path, size=1, **changes)


@pytest.mark.parametrize("name", ["SGD", "Rprop", "Muon"])
def test_resume_of_shards_is_bit_exact(model: Path, tmp_path: Path, name: str) -> None:
    """The same where two ranks hold the rows of every state."""
    changes = {"optim__optimizer": name, **FASTER.get(name, {})}
    resumed_equals_straight(model, tmp_path, size=2, **changes)


@pytest.mark.parametrize("library", ["torchao.optim", "bitsandbytes.optim"])
def test_resume_of_8_bit_states_is_bit_exact(model: Path, tmp_path: Path, library: str) -> None:
    """Quantised moments with their scales too, and only as many ranks can read them."""
    pytest.importorskip(library.partition(".")[0], reason=f"{library} is not installed")
    changes = {"optim__optimizer": "AdamW8bit", "optim__optimizer_impl": library}
    resumed_equals_straight(model, tmp_path, size=1, **changes)


def test_adafactor_of_shards_is_refused(model: Path, tmp_path: Path) -> None:
    """Rows and columns of a matrix that no rank holds cannot be its state."""
    config = toy_config(model, tmp_path / "run", optim__optimizer="adafactor")
    reports = run_ranks(config, size=2)
    assert [r["code"] for r in reports] == [2, 2] and "sharded" in reports[0]["error"]


def small_model() -> nn.Module:
    return nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 4), nn.LayerNorm(4), nn.Linear(4, 11))


# Muon is two optimizers at once: see below.
@pytest.mark.parametrize("name", [*(n for n in NAMES if n != "Muon"), "AdamW"])
def test_updates_are_those_of_torch(name: str) -> None:
    """Through our wrapper or not: the same weights as the class itself, called with our keys."""
    config = OptimConfig(optimizer=name, lr=1e-2, weight_decay=0.1, decay_norms_and_biases=True)
    ours, other = small_model(), small_model()
    other.load_state_dict(ours.state_dict())
    cls = getattr(torch.optim, name)
    known = inspect.signature(cls).parameters
    values = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.95), "eps": 1e-8}
    if name == "Adafactor":
        del values["eps"]
    values = {k: v for k, v in values.items() if k in known and (k != "betas" or name != "Rprop")}
    optimizers = [make_optimizer(ours, config=config), cls(other.parameters(), **values)]
    if name == "Rprop":  # it knows no decay, which the groups name all the same
        assert isinstance(optimizers[0], JoinedOptimizer)
    for _ in range(3):
        for net, optimizer in zip((ours, other), optimizers, strict=True):
            net(torch.arange(11)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    for one, two in zip(ours.parameters(), other.parameters(), strict=True):
        assert one.grad is None
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-5)


def test_muon_takes_only_inner_matrices() -> None:
    """Embeddings, norms and biases go to AdamW; one state and one list of groups shows both."""
    net = small_model()
    joined = make_optimizer(net, config=OptimConfig(optimizer="muon", lr=1e-2))
    net(torch.arange(11)).square().sum().backward()
    joined.step()
    kinds = {name: set(joined.state[p]) for name, p in net.named_parameters()}
    assert kinds["1.weight"] == kinds["3.weight"] == {"momentum_buffer"}
    for name in ("0.weight", "1.bias", "2.weight", "2.bias"):
        assert kinds[name] == {"step", "exp_avg", "exp_avg_sq"}
    assert sum(len(g["params"]) for g in joined.param_groups) == len(list(net.parameters()))


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["optim.optimizer=AdamV"], "AdamW"),
        (["optim.optimizer=LBFGS"], "Adam"),
        (["optim.optimizer=Optimizer"], "Adam"),
        (["optim.optimizer_impl=torch.optm"], "torch.optim"),
        (["optim.optimizer_impl=os", "optim.optimizer=system"], "Only these are imported"),
        (["optim.override_optimizer_config.amsgrd=true"], "amsgrad"),
        (["optim.override_optimizer_config={params: 1}"], "no such argument"),
        (["optim.override_optimizer_config={lr: 0.5}"], "Use optim.lr=0.5"),
        (["optim.override_optimizer_config={weight_decay: 0}"], "Use optim.weight_decay=0"),
        (["optim.override_optimizer_config={fused: false, foreach: true, maximize: true}"], None),
    ],
)
def test_wrong_names_are_told(words: list[str], hint: str | None) -> None:
    """Unknown library, optimizer or argument: an error with the nearest name that exists."""
    config = load_config(TrainConfig, words).optim
    if hint is None:
        make_optimizer(small_model(), config=config)
        return
    with pytest.raises(UsageError, match=hint):
        make_optimizer(small_model(), config=config)


def test_a_missing_library_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not installed is not unknown."""
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes.optim", None)
    with pytest.raises(MissingExtraError, match=r"verl-sft\[bitsandbytes\]"):
        optimizer_class("AdamW8bit", "bitsandbytes.optim")


def test_loraplus_speeds_up_b_alone() -> None:
    """`optim.loraplus_lr_ratio` multiplies the rate of adapters' B, and of nothing else."""
    net = nn.ModuleDict(
        {"lora_A": nn.Linear(4, 2), "lora_B": nn.Linear(2, 4), "x": nn.Linear(2, 2)}
    )
    made = make_optimizer(net, config=OptimConfig(loraplus_lr_ratio=16.0))
    fast = {id(p) for g in made.param_groups if g["lr_scale"] == 16.0 for p in g["params"]}
    assert fast == {id(p) for p in net["lora_B"].parameters()}
    plain = make_optimizer(net, config=OptimConfig())
    assert {g["lr_scale"] for g in plain.param_groups} == {1.0}


def test_schedules_have_other_names_too() -> None:
    """`constant_with_warmup` and `warmup_stable_decay` are ours under other names."""
    assert OptimConfig(lr_scheduler="constant_with_warmup").lr_scheduler == "constant"
    assert OptimConfig(lr_scheduler="warmup_stable_decay").lr_scheduler == "wsd"
    with pytest.raises(UsageError, match="cosine"):
        OptimConfig(lr_scheduler="cosin")
