"""Rows from raw episodes: the published ones again, other granularities, windows, templates."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from tests.test_collector import _config
from verl_sft.collect.collector import collect
from verl_sft.config.collect import PromptConfig
from verl_sft.errors import UsageError
from verl_sft.records.parse import ReadOptions, Reject
from verl_sft.records.read import read_records
from verl_sft.records.schema import SFTRecord
from verl_sft.types import JSON


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small collection whose prompts ask for all tags."""
    prompt = PromptConfig(template="add_wm2")
    return collect(_config(tmp_path_factory.mktemp("raw"), prompt=prompt)).directory


def rebuilt(path: Path, **options: Any) -> list[SFTRecord]:
    bad: list[Reject] = []
    found = list(
        read_records(path, options=ReadOptions(multiturn=True, **options), reject=bad.append)
    )
    assert {b.code for b in bad} <= {"NOT_SUCCESSFUL"}
    return [dataclasses.replace(r, source="") for r in found]


def test_the_published_rows_again(collected: Path) -> None:
    """The format is recognised, and its rows are those of the collection, in any order."""
    published = {
        r.record_id: dataclasses.replace(r, source="")
        for side in ("train", "val")
        for r in read_records(collected / f"{side}.parquet")
    }
    rows = rebuilt(collected / "raw_trajectories.json")
    assert rows and {r.record_id: r for r in rows} == published


def test_other_granularity_and_window(collected: Path) -> None:
    """One row per episode learns what all its step rows learn; the window changes prompts alone."""
    path = collected / "raw_trajectories.json"
    steps, episodes = rebuilt(path), rebuilt(path, rows="episode")
    assert len(episodes) == len({r.episode_id for r in steps})
    assert sum(len(r.supervise or ()) for r in episodes) == len(steps)
    bare = rebuilt(path, history_length=0)
    assert [r.messages for r in bare] == [r.messages for r in steps]
    assert any("Observation 1" in str(r.prompt) for r in steps)
    assert not any("Observation 1" in str(r.prompt) for r in bare)


def test_another_template(collected: Path) -> None:
    """Answers keep the parts that the other template asks for; its own label is in the rows."""
    path = collected / "raw_trajectories.json"
    for record in rebuilt(path, prompt="default"):
        assert record.prompt_template.startswith("default@")
        assert "<prediction>" not in str(record.messages) + str(record.prompt)
        assert "<think>" in str(record.response) and "<action>" in str(record.response)
    with pytest.raises(UsageError, match="unknown prompt template"):
        rebuilt(path, prompt="defualt")


def first_episode(collected: Path) -> JSON:
    episodes = json.loads((collected / "raw_trajectories.json").read_text())
    found: JSON = next(e for e in episodes if e["success"])
    return found


def test_no_part_of_an_answer_is_made_up(collected: Path, tmp_path: Path) -> None:
    """A template that asks for more than an answer says is refused."""
    episode = first_episode(collected)
    for step in episode["steps"]:
        step["response"]["content"] = "<think>t</think>\n<action>look</action>"
    (bad,) = refused(tmp_path, episode, prompt="add_wm1")
    first = next(n for n, step in enumerate(episode["steps"]) if step["weight"] > 0)
    assert (bad.field, bad.code) == (f"steps[{first}].response", "MISSING_TAG")


def refused(tmp_path: Path, episode: JSON, **options: Any) -> list[Reject]:
    path = tmp_path / "raw.json"
    path.write_text(json.dumps([episode]))
    bad: list[Reject] = []
    asked = ReadOptions(multiturn=True, format="raw", **options)
    assert list(read_records(path, options=asked, reject=bad.append)) == []
    return bad


@pytest.mark.parametrize(
    ("change", "field", "code"),
    [
        ({"prompt_template": "mine@7"}, "prompt_template", "UNKNOWN_TEMPLATE"),
        ({"prompt_template": 5}, "prompt_template", "BAD_VALUE"),
        ({"success": "yes"}, "success", "BAD_VALUE"),
        ({"success": False}, "steps", "NOT_SUCCESSFUL"),
        ({"steps": []}, "steps", "TOO_FEW_STEPS"),
        ({"steps": [{}]}, "", "BAD_EPISODE"),
        ({"steps": 5}, "", "BAD_EPISODE"),
        ({"meta": [[None, 1]]}, "meta", "BAD_VALUE"),
        ({"history_style": "odd"}, "", "BAD_EPISODE"),
        ({"stop_reason": "env_error"}, "steps", "ENV_ERROR"),
        ({"history_length": "two"}, "steps", "BAD_EPISODE"),
    ],
)
def test_damage_is_named(
    collected: Path, tmp_path: Path, change: JSON, field: str, code: str
) -> None:
    """Each kind of damage has its field and code."""
    (bad,) = refused(tmp_path, first_episode(collected) | change)
    assert (bad.field, bad.code) == (field, code)


def test_failed_episodes_when_asked(collected: Path, tmp_path: Path) -> None:
    """They are left out and counted, unless asked for."""
    episode = first_episode(collected) | {"success": False}
    path = tmp_path / "raw.json"
    path.write_text(json.dumps([episode]))
    assert all(r.success is False for r in rebuilt(path, require_success=False))
    assert rebuilt(path, require_success=False) and not rebuilt(path)
