"""Evaluation: a report that is true, or an error that says why there is none."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from verl_sft.config.collect import (
    EnvConfig,
    EvaluateConfig,
    EvaluatePromptConfig,
    PolicyConfig,
    RolloutConfig,
)
from verl_sft.errors import PartialError, UsageError
from verl_sft.evaluate.evaluator import evaluate

TOY = Path(__file__).with_name("toy_env.py")


def _config(output: Path | None, **env_args: Any) -> EvaluateConfig:
    return EvaluateConfig(
        env=EnvConfig(name=f"{TOY}:make_env", split="valid_unseen"),
        policy=PolicyConfig(name=f"{TOY}:make_policy", expert="planner"),
        rollout=RolloutConfig(max_steps=6),
        output=None if output is None else str(output),
        env_args=env_args,
    )


def test_report_is_written(tmp_path: Path) -> None:
    """What is returned is what lies on disk: every task once, by type, with the settings."""
    report = evaluate(_config(tmp_path / "new folder" / "report.json"))
    assert report == json.loads((tmp_path / "new folder" / "report.json").read_text())
    assert report["overall"]["episodes"] == 6 and report["overall"]["success_rate"] == 1.0
    assert len(report["by_task_type"]) == 3 and report["notes"] == []


def test_another_prompt_than_trained_is_noted(tmp_path: Path) -> None:
    """The report says so where the user overrides the prompt that the export names, else not."""
    trained = {"prompt_template": "default@1", "history_style": "windowed"}
    (tmp_path / "verl_sft.json").write_text(json.dumps(trained))
    config = dataclasses.replace(_config(tmp_path / "report.json"), model=str(tmp_path))
    assert evaluate(config)["notes"] == []
    other = EvaluatePromptConfig(template="add_wm1", history="dialogue")
    template, history = evaluate(dataclasses.replace(config, prompt=other))["notes"]
    assert "default@1" in template and "add_wm1" in template
    assert "windowed" in history and "dialogue" in history


def test_a_key_without_effect_is_noted(tmp_path: Path) -> None:
    """Evaluation plays in one process: a number of workers is not taken in silence."""
    config = _config(tmp_path / "report.json")
    config.rollout.num_workers = 2
    (note,) = evaluate(config)["notes"]
    assert "rollout.num_workers" in note


def test_broken_games_are_counted_apart(tmp_path: Path) -> None:
    """A failed environment says nothing about the policy; too many of them fail the command."""
    broken = {str(n): "raise" for n in range(1000, 1002)}
    report = evaluate(_config(tmp_path / "few.json", broken=broken))
    assert report["overall"]["environment_errors"] == 2 == len(report["errors"])
    assert report["overall"]["success_rate"] == 1.0
    broken = {str(n): "raise" for n in range(1000, 1006)}
    with pytest.raises(PartialError, match=r"6 of 6 episodes failed.*the engine broke"):
        evaluate(_config(tmp_path / "all.json", broken=broken))
    assert json.loads((tmp_path / "all.json").read_text())["overall"]["episodes"] == 0


def test_wrong_names_leave_nothing_behind(tmp_path: Path) -> None:
    """A model that is not there, a prompt that is unknown, a folder as report: refused, no file."""
    absent = str(tmp_path / "absent" / "." / "model")
    plain = _config(None)
    for config, message in (
        (
            dataclasses.replace(plain, model=absent, policy=PolicyConfig(name="hf")),
            "no such folder",
        ),
        (dataclasses.replace(plain, policy=PolicyConfig(name="hf")), "no model"),
        (dataclasses.replace(plain, output=str(tmp_path)), "this is a folder"),
        (
            dataclasses.replace(plain, prompt=EvaluatePromptConfig(template="add_wm3")),
            "add_wm2",
        ),
    ):
        with pytest.raises(UsageError, match=message):
            evaluate(config)
    assert not list(tmp_path.iterdir())
