"""What a run tells and keeps: metrics, losses in parts, named sets, the best model, games."""

from __future__ import annotations

import json
import math
import sys
import threading
import time
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.train_ranks import ToyStore, run_ranks, toy_config, toy_model, toy_store, weights_of
from verl_sft.config.load import load_config
from verl_sft.config.train import TrainConfig, TrainerConfig
from verl_sft.data.collate import collate
from verl_sft.data.kinds import KINDS, SOURCE, TURN
from verl_sft.data.plan import StepPlan, plan_epoch
from verl_sft.data.sample import make_sample
from verl_sft.distributed.setup import World
from verl_sft.errors import StorageError, UsageError
from verl_sft.safe_io import publish_link
from verl_sft.trainer.best import check_best, check_metric, judged, stops_early
from verl_sft.trainer.breakdown import LossParts
from verl_sft.trainer.checkpoint import TrainProgress, list_checkpoints
from verl_sft.trainer.env_eval import FAILED, run_evaluation
from verl_sft.trainer.flops import ModelFlops, peak_flops
from verl_sft.trainer.meter import Meter, layout
from verl_sft.trainer.trackers import Remote, RunInfo
from verl_sft.trainer.tracking import Tracker, plot_loss, read_metrics, status

CPU = torch.device("cpu")
TOY = Path(__file__).with_name("toy_env.py")
TIMES = ("seconds", "per_second", "rss_gb", "mfu")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_model(tmp_path_factory.mktemp("model"))


def labelled(count: int, *, seed: int = 0) -> ToyStore:
    """Toy samples whose tokens have random kinds, turns and one of two sources."""
    store, rng = toy_store(count, seed=seed), np.random.default_rng(seed)
    store.groups = ("left", "right")
    store.samples = [
        replace(
            s,
            labels=(
                rng.integers(1, len(KINDS), len(s))
                + TURN * rng.integers(0, 4, len(s))
                + SOURCE * (i % 2)
            ).astype(np.int32),
        )
        for i, s in enumerate(store.samples)
    ]
    return store


def rows_of(folder: Path, *, timed: bool = False) -> list[dict[str, Any]]:
    """The metrics of each step, without those that depend on the clock."""
    rows = read_metrics(folder / "metrics.jsonl")
    if timed:
        return rows
    return [{k: v for k, v in r.items() if not any(t in k for t in TIMES)} for r in rows]


def go(model: Path, out: Path, *, size: int = 1, **changes: Any) -> list[dict[str, Any]]:
    """A run over labelled samples; its metrics without times."""
    train, val = changes.pop("train", labelled(10)), changes.pop("val", None)
    hook = changes.pop("hook", None)
    config = toy_config(model, out, **changes)
    reports = run_ranks(config, size=size, train=train, val=val, hook=hook)
    assert [r["code"] for r in reports] == [0] * size, reports
    return rows_of(out)


# Figures of a step.


def test_every_figure_of_a_step_is_there(model: Path, tmp_path: Path) -> None:
    """Verl's names and ours, one object per step, and an MFU as soon as a peak is known."""
    go(model, tmp_path / "run", size=2, val=toy_store(4, seed=9), trainer__peak_flops=1e12)
    rows = rows_of(tmp_path / "run", timed=True)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    for name in (
        "loss", "grad_norm", "lr", "mfu", "mfu_executed", "global_tokens", "learned_tokens",
        "total_tokens", "total_tokens(B)", "tokens_per_second", "step_seconds", "eta_seconds",
        "fill", "idle", "rss_gb",
    ):  # fmt: skip
        assert all(math.isfinite(row[f"train/{name}"]) for row in rows), name
    assert rows[-1]["train/eta_seconds"] == 0
    assert rows[-1]["train/total_tokens"] == sum(r["train/global_tokens"] for r in rows)
    assert "val/loss" in rows[2]
    text = status(rows[2])
    for word in ("loss", "grad", "lr", "tok/s", "mfu", "rss", "learned", "fill", "idle", "eta"):
        assert word in text, word


def test_layout_is_what_the_plan_says() -> None:
    """Fill and idle by hand: two ranks, one of which waits while the other does more."""
    lengths = np.array([8, 4, 4, 2], dtype=np.int64)
    plan = StepPlan(((((0,),), ((1,),)), (((2,),), ((3,),))))
    laid = layout(plan, lengths=lengths)
    assert laid.tokens == 18 and laid.pairs == 64 + 16 + 16 + 4 and laid.micro_batches == 4
    assert laid.idle == pytest.approx(1 - 18 / 24, abs=1e-3)
    (step,) = plan_epoch(
        lengths, seed=0, epoch=0, token_budget=9, train_batch_size=4, dp_size=1
    ).steps
    assert layout(step, lengths=lengths).idle == 0


def test_flops_by_hand() -> None:
    """6 per parameter and token; frozen matrices cost 4, the head only learned rows."""
    full = ModelFlops(body=100, body_trained=100, head=50, head_trained=True, attention=8)
    assert full.six_n(10) == 6 * 150 * 10
    assert full.executed(10, learned=10, pairs=0) == full.six_n(10)
    assert full.executed(10, learned=2, pairs=100) == 6 * 100 * 10 + 6 * 50 * 2 + 6 * 8 * 100
    lora = ModelFlops(body=110, body_trained=10, head=50, head_trained=False, attention=8)
    assert lora.executed(10, learned=2, pairs=0) == (4 * 100 + 6 * 10) * 10 + 4 * 50 * 2
    assert peak_flops(None, device=CPU, dtype="bfloat16") is None
    assert peak_flops(5e11, device=CPU, dtype="float32") == 5e11


def test_rates_are_means_without_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow first step is forgotten; what lies between steps counts for the time that remains."""
    world = World(0, 1, CPU, mesh=None)  # type: ignore[arg-type]
    meter = Meter(world=world, flops=None, peak=None, budget=10)
    plan, lengths = StepPlan(((((0,),),),)), np.array([10], dtype=np.int64)
    now, found = 0.0, {}
    for seconds, between in ((60.0, 0.0), (1.0, 0.0), (3.0, 4.0)):
        now += seconds + between
        monkeypatch.setattr("time.perf_counter", lambda now=now: now)
        found = meter.measure(
            plan, lengths=lengths, tokens=10, learned=5, seconds=seconds, remaining=6
        )
    assert found["train/tokens_per_second"] == 20 / 4
    assert found["train/eta_seconds"] == 6 * (1 + 7) / 2
    assert found["train/fill"] == 1 and "train/mfu" not in found


def test_console_lines_are_thinned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Off a terminal: each step of a short run, every Nth of a long one, validation always."""

    def printed(total: int, freq: int | None, **more: float) -> list[str]:
        folder = tmp_path / f"{total}-{freq}"
        folder.mkdir()
        tracker = Tracker(
            folder, loggers=["console"], start_step=0, total_steps=total, log_freq=freq
        )
        for step in range(1, total + 1):
            extra = more if step == 5 else {}
            tracker.log_step({"step": step, "train/loss": 1.0, **extra})
        tracker.close()
        assert len(read_metrics(folder / "metrics.jsonl")) == total
        return [x for x in capsys.readouterr().out.splitlines() if x.startswith("step ")]

    assert len(printed(20, None)) == 20
    assert len(printed(2000, None)) == 501
    shown = [line.split()[1] for line in printed(20, 8, **{"val/loss": 1.0})]
    assert shown == ["1/20", "5/20", "8/20", "16/20", "20/20"]


def test_what_is_no_number_is_left_out(tmp_path: Path) -> None:
    """The loss of a diverged model leaves a gap in the file, not a line that is no JSON."""
    tracker = Tracker(tmp_path, loggers=[], start_step=0, total_steps=1)
    tracker.log_step({"step": 1, "train/loss": 2.0, "val/loss": math.nan, "env/x": math.inf})
    tracker.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "train/loss": 2.0}]


# The loss in parts.


def test_parts_add_up_to_the_loss(model: Path, tmp_path: Path) -> None:
    """Weighted means over kinds, over turns and over sources are each the whole loss."""
    store = labelled(4)
    (first, *_) = go(model, tmp_path / "run", train=store)
    for prefix, number in (
        ("loss_kind/", lambda labels: labels % TURN),
        ("loss_turn/", lambda labels: labels % SOURCE // TURN),
        ("loss_source/", lambda labels: labels // SOURCE),
    ):
        names = list(KINDS) if prefix == "loss_kind/" else ["0", "1", "2", "3"]
        names = list(store.groups) if prefix == "loss_source/" else names
        labels = np.concatenate([s.labels for s in store.samples if s.labels is not None])
        weights = np.concatenate([s.weights for s in store.samples])
        shares = {
            name: weights[number(labels) == i].sum() / weights.sum() for i, name in enumerate(names)
        }
        total = sum(first[f"train/{prefix}{n}"] * share for n, share in shares.items() if share)
        assert total == pytest.approx(first["train/loss"], abs=1e-6), prefix


def test_parts_do_not_depend_on_ranks(model: Path, tmp_path: Path) -> None:
    """Two ranks, padding or shared prefixes: the same parts; switched off: the same losses."""
    val: dict[str, Any] = {"val": labelled(5, seed=4), "trainer__total_epochs": 1}
    base = go(model, tmp_path / "one", **val)
    assert any(name.startswith("val/loss_kind/") for name in base[2])
    for out, size, changes in (
        ("two", 2, {}),
        ("padded", 1, {"use_remove_padding": False}),
        ("shared", 1, {"data__prefix_sharing": "true"}),
        ("slices", 2, {"ulysses_sequence_parallel_size": 2}),
    ):
        rows = go(model, tmp_path / out, size=size, **val, **changes)
        for one, other in zip(base, rows, strict=True):
            parts = [n for n in one if "loss" in n]
            assert parts == [n for n in other if "loss" in n]
            assert all(abs(one[n] - other[n]) < 1e-4 for n in parts), out
    off = go(model, tmp_path / "off", **val, trainer__loss_breakdown=False)
    assert [r["train/loss"] for r in off] == [r["train/loss"] for r in base]
    assert not any("loss_" in name for row in off for name in row)


def test_parts_of_a_batch_by_hand() -> None:
    """Kinds, turns beyond the cap and a batch without learned tokens."""
    sample = make_sample([1, 2, 3, 4], weights=[0, 1, 0, 2])
    labels = np.array([1, 0, 3 + TURN * 8], dtype=np.int32)
    batch = collate([[replace(sample, labels=labels)]], pad_id=0)
    parts = LossParts(["only"], device=CPU)
    parts.add(batch, torch.tensor([5.0, 2.0]))
    parts.add(collate([], pad_id=0), torch.tensor([7.0]))
    named = parts.named(parts.values(), prefix="train/")
    assert named == {
        "train/loss_kind/thought": 5.0,
        "train/loss_kind/action": 2.0,
        "train/loss_turn/0": 5.0,
        "train/loss_turn/8+": 2.0,
    }


# Validation sets, the best model, early stop.


def test_named_sets(tmp_path: Path) -> None:
    """Sets with names keep their own samples and sources; the whole is all of their rows."""
    from tests.test_load import load, step_rows
    from verl_sft.data.sources import named_sets
    from verl_sft.trainer.validation import join_sets, plan_sets

    assert named_sets("a.parquet") == {"": "a.parquet"}
    assert named_sets({"path": "a.parquet"}) == {"": {"path": "a.parquet"}}
    assert named_sets({"seen": "a", "unseen": ["b"]}) == {"seen": "a", "unseen": ["b"]}
    with pytest.raises(UsageError, match="cannot be called"):
        named_sets({"a/b": "c"})
    (tmp_path / "x").mkdir(), (tmp_path / "y").mkdir()
    one, other = load(tmp_path / "x", step_rows(3)), load(tmp_path / "y", step_rows(2, steps=2))
    joined = join_sets({"seen": one, "unseen": other})
    assert joined is not None and len(joined) == len(one) + len(other) == 5
    assert [s.record_id for s in map(joined.__getitem__, range(5))] == [
        *(s.record_id for s in one), *(s.record_id for s in other)
    ]  # fmt: skip
    plans = plan_sets(joined, shared=None, token_budget=9999, dp_size=2)
    assert {n: p.sample_indices() for n, p in plans.items()} == {
        "seen": [0, 1, 2], "unseen": [3, 4]
    }  # fmt: skip
    assert joined.units().tolist() == [0, 1, 2, 3, 4]
    assert join_sets({"": one}) is one and join_sets({}) is None


def test_named_sets_from_files(model: Path, tmp_path: Path) -> None:
    """`data.val_files={a: ..., b: ...}` tokenises and plans both; an unknown metric is refused."""
    from tests.test_load import step_rows
    from verl_sft.model.build import load_tokenizer
    from verl_sft.records.io import write_parquet
    from verl_sft.trainer.inputs import load_inputs

    for name, episodes in (("train", 4), ("x", 1), ("y", 2)):
        write_parquet(tmp_path / f"{name}.parquet", step_rows(episodes))
    words = [
        f"data.train_files={tmp_path}/train.parquet", "data.multiturn.enable=true",
        f"data.val_files={{a: {tmp_path}/x.parquet, b: [{tmp_path}/y.parquet]}}",
        f"model.partial_pretrain={model}",
        "trainer.save_best=true", "trainer.best_metric=val/b/loss", "data.num_workers=0",
    ]  # fmt: skip
    world = World(0, 1, CPU, mesh=None)  # type: ignore[arg-type]

    def inputs(*more: str) -> Any:
        config = load_config(TrainConfig, [*words, *more])
        tokenizer = load_tokenizer(config.model)
        return load_inputs(
            config, tokenizer=tokenizer, directory=tmp_path, world=world, say=lambda line: None
        )

    found = inputs()
    sizes = {name: len(plan.sample_indices()) for name, plan in found.plan.validation.items()}
    assert sizes == {"a": 1, "b": 2} and len(found.val) == 3
    assert found.val.groups == ("x", "y")
    assert [found.val[i].labels.max() // SOURCE for i in range(3)] == [0, 1, 1]
    with pytest.raises(UsageError, match="val/c/loss"):
        inputs("trainer.best_metric=val/c/loss")


def test_losses_of_named_sets(model: Path, tmp_path: Path) -> None:
    """Each set has its own mean; `val/loss` weighs them by their learned tokens."""
    val = toy_store(6, seed=9)

    def split(trainer: Any) -> None:
        from verl_sft.data.plan import validation_plan
        from verl_sft.trainer.validation import _moved

        parts = {"a": (0, 2), "b": (2, 6)}
        plans = {
            n: _moved(validation_plan(val.lengths[x:y], token_budget=64, dp_size=2), by=x)
            for n, (x, y) in parts.items()
        }
        trainer.plan = replace(trainer.plan, validation=plans)

    whole = go(model, tmp_path / "whole", val=val)
    apart = go(model, tmp_path / "apart", val=val, size=2, hook=split)
    weights = [float(s.weights.sum()) for s in val.samples]
    for one, two in zip(whole, apart, strict=True):
        if "val/loss" not in one:
            continue
        mixed = two["val/a/loss"] * sum(weights[:2]) + two["val/b/loss"] * sum(weights[2:])
        assert two["val/loss"] == pytest.approx(mixed / sum(weights), abs=1e-9)
        assert two["val/loss"] == pytest.approx(one["val/loss"], abs=1e-4)


def test_judging_by_hand() -> None:
    """Better by the least difference resets the count; a step without the metric is no step."""
    config = TrainerConfig(early_stop_patience=2, early_stop_min_delta=0.1)
    progress, seen = TrainProgress(), []
    for loss in (3.0, 2.95, None, 2.5, 2.45, 2.41):
        metrics = {} if loss is None else {"val/loss": loss}
        progress = judged(progress, metrics=metrics, config=config)
        seen.append(
            (progress.score, progress.bad_validations, stops_early(progress, config=config))
        )
    assert seen == [
        (-3.0, 0, False), (-2.95, 1, False), (None, 1, False), (-2.5, 0, False),
        (-2.45, 1, False), (-2.41, 2, True),
    ]  # fmt: skip
    diverged = judged(progress, metrics={"val/loss": math.nan}, config=config)
    assert (diverged.score, diverged.bad_validations, diverged.best_score) == (None, 3, -2.5)
    wins = TrainerConfig(best_metric="env/success_rate")
    assert judged(TrainProgress(), metrics={"env/success_rate": 0.3}, config=wins).score == 0.3


def test_a_metric_that_will_never_be_there() -> None:
    """Early stop without validation rows, an unknown set, games that are never played: refused."""
    stop = TrainerConfig(early_stop_patience=1)
    check_best(stop, val_sets=[""])
    check_best(replace(stop, best_metric="val/a/loss"), val_sets=["a"])
    check_best(TrainerConfig(), val_sets=[])
    for config, sets, word in (
        (stop, [], "early_stop_patience"),
        (TrainerConfig(export_best=True), [], "export_best"),
        (replace(stop, best_metric="val/b/loss"), ["a"], "val/a/loss"),
        (TrainerConfig(best_metric="val/b/loss"), ["a"], "best_metric"),
    ):
        with pytest.raises(UsageError, match=word):
            check_best(config, val_sets=sets)
    check_metric(TrainerConfig(best_metric="env/success_rate/look", env_eval_freq=5))
    for changes, word in (
        ({"best_metric": "env/success_rate"}, "env_eval_freq"),
        ({"best_metric": "env/succes_rate", "env_eval_freq": 5}, "env/success_rate"),
        ({"best_metric": "val/los"}, "val/loss"),
        ({"best_metric": "val/loss_kind/actoin"}, "val/loss_kind/action"),
        ({"best_metric": "val/loss_kind/action", "loss_breakdown": False}, "loss_breakdown"),
    ):
        with pytest.raises(UsageError, match=word):
            check_metric(TrainerConfig(**changes))


def best_run(model: Path, out: Path, **changes: Any) -> list[dict[str, Any]]:
    """A run whose validation loss soon rises: the training data says something else."""
    rows = go(
        model,
        out,
        val=toy_store(4, seed=9),
        optim__lr=3e-2,
        optim__lr_scheduler="constant",
        trainer__test_freq=1,
        trainer__total_epochs=6,
        **changes,
    )
    return rows


def test_early_stop_links_and_export(model: Path, tmp_path: Path) -> None:
    """The run ends behind the patience, keeps its best checkpoint, exports it, and stays ended."""
    given = {"trainer__early_stop_patience": 3, "trainer__max_ckpt_to_keep": 1}
    rows = best_run(model, tmp_path / "run", **given, trainer__export=True,
                    trainer__export_best=True)  # fmt: skip
    losses = [row["val/loss"] for row in rows]
    best = min(range(len(losses)), key=losses.__getitem__) + 1
    assert len(rows) == best + 3 < 18
    folder = tmp_path / "run"
    assert (folder / "best").readlink() == Path(f"global_step_{best}")
    assert (folder / "last").readlink() == Path(f"global_step_{best + 3}")
    assert {step for step, _ in list_checkpoints(folder)} == {best, best + 3}
    from safetensors.torch import load_file

    kept = load_file(next((folder / "best").glob("*.safetensors")))
    exported = load_file(folder / "huggingface" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(exported[name].float(), kept[f"model.causal.{name}"])
    assert best_run(model, folder, **given, trainer__export=True,
                    trainer__export_best=True) == rows  # fmt: skip


def test_patience_survives_a_kill(model: Path, tmp_path: Path) -> None:
    """Stopped after any step and resumed, the run stops early where it would have."""
    given = {"trainer__early_stop_patience": 2, "trainer__save_freq": 1}
    whole = best_run(model, tmp_path / "whole", **given)

    def stop_later(trainer: Any) -> None:
        real = trainer.train_step

        def step(plan: Any) -> Any:
            trainer.stop_asked = trainer.progress.step == len(whole) - 2
            return real(plan)

        trainer.train_step = step

    config = toy_config(
        model, tmp_path / "cut", optim__lr=3e-2, optim__lr_scheduler="constant",
        trainer__test_freq=1, trainer__total_epochs=6, **given,
    )  # fmt: skip
    reports = run_ranks(config, train=labelled(10), val=toy_store(4, seed=9), hook=stop_later)
    assert reports[0]["code"] == 143 or reports[0]["code"] != 0, reports
    assert len(rows_of(tmp_path / "cut")) == len(whole) - 1
    assert best_run(model, tmp_path / "cut", **given) == whole


def test_a_copied_run_with_folders_for_links_is_told_at_once(model: Path, tmp_path: Path) -> None:
    """A copy that followed the links is refused before the first step, with what to remove."""
    (tmp_path / "run" / "last").mkdir(parents=True)
    (report,) = run_ranks(toy_config(model, tmp_path / "run"))
    assert report["code"] == StorageError.exit_code
    assert "last: a folder stands where" in report["error"]
    (tmp_path / "run" / "last").rmdir()
    (report,) = run_ranks(toy_config(model, tmp_path / "run"))
    assert report["code"] == 0, report


def test_links_are_replaced_at_once(tmp_path: Path) -> None:
    """A link moves from one target to the next; what is no link is left alone and told."""
    for target in ("one", "two"):
        publish_link(tmp_path / "best", target)
        assert (tmp_path / "best").readlink() == Path(target)
    assert not list(tmp_path.glob(".tmp-*"))
    (tmp_path / "last").mkdir()
    with pytest.raises(StorageError):
        publish_link(tmp_path / "last", "one")


# Games during training.

PLAY = {
    "trainer__env_eval_freq": "after_each_epoch",
    "trainer__env_eval": f"env.name={TOY}:make_env policy.name={TOY}:make_policy "
    "policy.expert=planner rollout.max_steps=6",
}


@pytest.mark.parametrize("size", [1, 2])
def test_games_change_nothing_but_the_metrics(model: Path, tmp_path: Path, size: int) -> None:
    """Success is measured where asked for, and weights, RNG and losses are those without."""
    plain = go(model, tmp_path / "plain", size=size, trainer__total_epochs=1)
    played = go(model, tmp_path / "played", size=size, trainer__total_epochs=1, **PLAY)
    assert [r.get("env/success_rate") for r in played] == [None, None, 1.0]
    assert played[2]["env/episodes"] == 6
    assert [{k: v for k, v in r.items() if k[:4] != "env/"} for r in played] == plain
    for name, tensor in weights_of(tmp_path / "plain").items():
        assert torch.equal(weights_of(tmp_path / "played")[name], tensor), name
    assert not list((tmp_path / "played").glob(".tmp-*"))


def test_a_failed_evaluation_never_fails_the_run(model: Path, tmp_path: Path) -> None:
    """No games, a command that breaks: counted, told, and training goes on; a wrong key is not."""
    changes = {**PLAY, "trainer__env_eval": "env.name=absent.py:make_env"}
    rows = go(model, tmp_path / "run", trainer__total_epochs=1, **changes)
    assert len(rows) == 3 and rows[2]["env/failed"] == 1.0
    config = toy_config(model, tmp_path / "wrong", **{**PLAY, "trainer__env_eval": "env.nam=x"})
    (report,) = run_ranks(config)
    assert report["code"] == UsageError.exit_code and "env.name" in report["error"]


def test_an_evaluation_that_hangs_is_ended(tmp_path: Path) -> None:
    """Behind the time limit, or when the run is to stop, the games are given up."""
    for seconds, leaving, word in ((0.01, False, "timeout"), (60.0, True, "stop")):
        said: list[str] = []
        found = run_evaluation(
            ["model=absent/./x", "policy.name=absent.py:x"],
            report=tmp_path / "r.json",
            seconds=seconds,
            leaving=lambda leaving=leaving: leaving,
            say=said.append,
        )
        assert found == FAILED and word in said[0]


# Trackers.


def fake(name: str, monkeypatch: pytest.MonkeyPatch, **given: Any) -> list[Any]:
    """A module in place of a tracker's package; returns what it was told."""
    told: list[Any] = []
    module = types.ModuleType(name)
    run = types.SimpleNamespace(
        log=given.get("log", lambda metrics, step: told.append((step, metrics))),
        finish=given.get("finish", lambda: told.append("finished")),
    )

    def init(**options: Any) -> Any:
        told.append(options)
        return given["init"]() if "init" in given else run

    for key, value in {
        "init": init, "log": run.log, "finish": run.finish, "end_run": run.finish,
        "log_metrics": run.log, "start_run": init, "set_experiment": told.append,
        "set_tracking_uri": told.append,
    }.items():  # fmt: skip
        setattr(module, key, value)
    monkeypatch.setitem(sys.modules, name, module)
    return told


def info(tmp_path: Path) -> RunInfo:
    return RunInfo("project", "name", tmp_path, {"a": 1})


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio", "swanlab"])
def test_trackers_get_every_step(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each adapter starts its tracker on this machine, hands over all steps, and finishes it."""
    for variable in ("WANDB_MODE", "SWANLAB_MODE", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(variable, raising=False)
    told = fake(name, monkeypatch)
    tracker = Tracker(tmp_path, loggers=[name], start_step=0, total_steps=3, info=info(tmp_path))
    for step in (1, 2, 3):
        tracker.log_step({"step": step, "train/loss": 1.0 / step})
    tracker.close()
    steps = [item for item in told if isinstance(item, tuple)]
    assert steps == [(n, {"train/loss": 1.0 / n}) for n in (1, 2, 3)] and told[-1] == "finished"
    if name in ("wandb", "swanlab"):
        assert told[0]["mode"] == "offline"
    if name == "mlflow":
        assert told[0].startswith("sqlite:///")


def test_a_tracker_that_raises_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At the start, at a step, even by sys.exit: one line without the key, and the run goes on."""
    monkeypatch.setenv("WANDB_API_KEY", "abc-secret-xyz")

    def broken(*args: Any, **options: Any) -> None:
        raise SystemExit("no access with abc-secret-xyz\nmore")

    for given in ({"init": broken}, {"log": broken}):
        fake("wandb", monkeypatch, **given)
        tracker = Tracker(
            tmp_path, loggers=["wandb"], start_step=0, total_steps=9, info=info(tmp_path)
        )
        for step in range(1, 10):
            tracker.log_step({"step": step, "train/loss": 1.0})
        tracker.close()
        assert len(read_metrics(tmp_path / "metrics.jsonl")) == 9
        out = capsys.readouterr().out
        assert out.count("wandb is switched off") == 1
        assert "secret" not in out and "***" in out


def test_a_tracker_that_hangs_does_not_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps beyond the queue are dropped and told; closing waits only so long."""
    release = threading.Event()
    told = fake("wandb", monkeypatch, log=lambda metrics, step: release.wait(30))
    said: list[str] = []
    remote = Remote("wandb", info=info(tmp_path), say=said.append, size=4)
    started = time.monotonic()
    for step in range(100):
        remote.log({"train/loss": 1.0}, step=step)
    remote.close(seconds=0.2)
    assert time.monotonic() - started < 10 and remote.dropped >= 90
    assert "does not keep up" in said[0] and "left alone" in said[-1] and len(said) == 2
    release.set()
    assert told


def test_an_absent_package_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tracker that is not installed is switched off with a line that says so."""
    monkeypatch.setitem(sys.modules, "trackio", None)
    said: list[str] = []
    Remote("trackio", info=info(tmp_path), say=said.append).close()
    assert len(said) == 1 and said[0].startswith("trackio is switched off")


def test_loss_png_shows_sets_and_success(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Named sets and the success rate are drawn; parts of the loss are not."""
    row = {"step": 1, "train/loss": 2.0, "val/loss": 2.0, "val/seen/loss": 1.5,
           "val/loss_kind/stop": 1.0, "env/success_rate": 0.5}  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    from verl_sft.trainer import tracking

    drawn: list[str] = []
    monkeypatch.setattr(
        tracking, "_draw", lambda axes, rows, name, style, **options: drawn.append(name)
    )
    monkeypatch.setattr("matplotlib.axes.Axes.legend", lambda *a, **k: None)
    assert plot_loss(tmp_path) == ""
    assert drawn == ["train/loss", "val/loss", "val/seen/loss", "env/success_rate"]
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_trackers_that_hang_are_waited_for_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four that never finish cost one waiting time, not four, and each is named."""
    from verl_sft.trainer.trackers import ADAPTERS, Session, close_all

    forever, said = threading.Event(), []
    info = RunInfo("p", "n", tmp_path, {})
    for name in ADAPTERS:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        hang = Session(lambda metrics, step: None, forever.wait)
        monkeypatch.setitem(ADAPTERS, name, lambda module, info, hang=hang: hang)
    remotes = [Remote(name, info=info, say=said.append) for name in ADAPTERS]
    limits = []
    joins = threading.Thread.join
    monkeypatch.setattr(
        threading.Thread,
        "join",
        lambda self, timeout=None: (limits.append(timeout), joins(self, timeout)),
    )
    close_all(remotes, seconds=0.4)
    assert sum(limits) < 0.8 and len(said) == 4
    forever.set()
