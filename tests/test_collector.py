"""The collector: what is acknowledged stays, what is published is complete and reproducible."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_sft.collect.collector import CollectReport, collect, identity_of
from verl_sft.collect.journal import Journal
from verl_sft.collect.rollout import task_notes
from verl_sft.collect.worker import config_from_json
from verl_sft.config.collect import (
    CollectConfig,
    EnvConfig,
    FilterConfig,
    OutputConfig,
    PolicyConfig,
    PromptConfig,
    RolloutConfig,
)
from verl_sft.errors import (
    InputError,
    PartialError,
    Preempted,
    RunBusyError,
    StorageError,
    UsageError,
)
from verl_sft.prompts.alfworld import DEFAULT
from verl_sft.records.build import episode_rows
from verl_sft.records.filters import drop_reason, mask_steps
from verl_sft.records.read import read_records
from verl_sft.safe_io import AppendLog, read_log, run_lock
from verl_sft.types import Episode, StopReason

TOY = Path(__file__).with_name("toy_env.py")
ROOT = TOY.parent.parent
OUTPUTS = {
    *("train.parquet", "val.parquet", "train.csv", "val.csv"),
    *("raw_trajectories.json", "stats.json", "manifest.json"),
}


def _config(tmp_path: Path, name: str | None = "out", **more: Any) -> CollectConfig:
    """A quick collection of the toy environment; `more` are parts of the config, or env_args."""
    parts: dict[str, Any] = {
        "env": EnvConfig(name=f"{TOY}:make_env", step_timeout=5.0),
        "policy": PolicyConfig(name=f"{TOY}:make_policy", expert="planner"),
        "rollout": RolloutConfig(num_workers=1, max_steps=6),
        "output": OutputConfig(dir=str(tmp_path), name=name),
    }
    known = {f.name for f in dataclasses.fields(CollectConfig)}
    parts |= {k: v for k, v in more.items() if k in known}
    env_args = {k: v for k, v in more.items() if k not in known}
    return CollectConfig(**parts, env_args=env_args)


def _files(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in directory.iterdir() if p.name in OUTPUTS}


def _stats(directory: Path) -> Any:
    return json.loads((directory / "stats.json").read_text())


def _raw(directory: Path) -> list[Episode]:
    texts = json.loads((directory / "raw_trajectories.json").read_text())
    return [Episode.from_json(t) for t in texts]


def test_a_collection_is_complete(tmp_path: Path) -> None:
    """All files are there, rows are split by task, progress counts up, the journal is gone."""
    seen: list[tuple[int, int, str]] = []
    report = collect(_config(tmp_path, None), progress=lambda *now: seen.append(now))
    assert report.directory.name.startswith("sft_data_20")
    assert {p.name for p in report.directory.iterdir() if p.name[0] != "."} == OUTPUTS
    assert not (report.directory / ".journal").exists()
    assert seen == [(n, 6, f"{n} won") for n in range(7)]
    assert isinstance(report, CollectReport) and (report.episodes, report.errors) == (6, 0)
    train = list(read_records(report.directory / "train.parquet"))
    val = list(read_records(report.directory / "val.parquet"))
    assert (len(train), len(val)) == (report.rows_train, report.rows_val)
    assert train and val and not {r.group_id for r in train} & {r.group_id for r in val}
    assert {r.task_id for r in (*train, *val)} == {f"train/{n:04d}" for n in range(6)}
    assert _stats(report.directory)["groups"]["overlap"] == 0
    assert [
        dataclasses.replace(r, source="") for r in read_records(report.directory / "val.csv")
    ] == [dataclasses.replace(r, source="") for r in val]


def test_the_number_of_workers_does_not_change_a_byte(tmp_path: Path) -> None:
    """1 and 3 workers, and another directory, publish the same bytes; another seed does not."""
    for name, workers, seed in (("a", 1, 0), ("b", 3, 0), ("c", 1, 1)):
        rollout = RolloutConfig(num_workers=workers, max_steps=6, seed=seed, num_episodes=14)
        collect(_config(tmp_path / name, rollout=rollout, delay=0.001))
    a, b, c = (_files(tmp_path / name / "out") for name in "abc")
    assert a == b and set(a) == OUTPUTS
    assert a["train.parquet"] != c["train.parquet"]


def test_rows_can_be_rebuilt_from_the_raw_file(tmp_path: Path) -> None:
    """Raw episodes, filters and builder give the published rows again."""
    report = collect(_config(tmp_path))
    published = {
        r.record_id: dataclasses.replace(r, source="")
        for side in ("train", "val")
        for r in read_records(report.directory / f"{side}.parquet")
    }
    kept = [e for e in _raw(report.directory) if not drop_reason(e, FilterConfig())]
    rows = [r for e in kept for r in episode_rows(e, DEFAULT, rows="step")]
    assert {r.record_id: r for r in rows} == published
    steps = [s for e in kept for s in e.steps]
    assert any(s.weight == 0 for s in steps), "the noise of the toy expert is missing"
    assert len(rows) == sum(s.weight > 0 for s in steps)


def test_dialogue_history_and_episode_rows(tmp_path: Path) -> None:
    """The other history style and granularity go through the same files."""
    prompt = PromptConfig(template="add_wm2", history="dialogue")
    output = OutputConfig(dir=str(tmp_path), name="out", rows="episode")
    report = collect(_config(tmp_path, prompt=prompt, output=output))
    assert report.rows_train + report.rows_val == report.kept == 6
    answer = str(next(read_records(report.directory / "val.parquet")).messages[-1])
    assert "<observation>" in answer and "<prediction>" in answer


def test_equal_rows_are_kept_once(tmp_path: Path) -> None:
    """Repeated content is dropped and counted; with `filter.dedup=false` it stays."""
    rollout = RolloutConfig(num_workers=1, max_steps=6, num_episodes=60)
    counts = []
    for dedup in (True, False):
        keep = FilterConfig(dedup=dedup)
        config = _config(tmp_path, f"{dedup}", rollout=rollout, filter=keep, tasks=1)
        report = collect(config)
        ids = [r.record_id for r in read_records(report.directory / "train.parquet")]
        counts.append((len(ids), len(set(ids)), _stats(report.directory)["duplicate_rows"]))
    (kept, unique, dropped), (all_rows, same_unique, none) = counts
    assert kept == unique == same_unique < all_rows
    assert dropped == all_rows - kept and none == 0


def test_broken_games_cost_one_episode_each(tmp_path: Path) -> None:
    """An exception, a crash, an exit, a hang and a refusal are named; the others are collected."""
    broken = {"0": "raise", "1": "kill", "2": "exit", "3": "hang", "4": "refuse"}
    config = _config(tmp_path, tasks=12, broken=broken)
    config.env.step_timeout = 1.0
    report = collect(config)
    errors = {e["task_id"]: e["error"] for e in _stats(report.directory)["errors"]}
    assert (report.episodes, report.errors, report.kept) == (12, 5, 7)
    assert errors["train/0000"] == "RuntimeError: the engine broke"
    assert "SIGSEGV" in errors["train/0001"]
    assert "exited with 3" in errors["train/0002"]
    assert "within 1 s" in errors["train/0003"]
    assert "game file is broken" in errors["train/0004"]


def test_too_many_errors_fail_the_run_after_publishing(tmp_path: Path) -> None:
    """Above `rollout.max_errors` the exit code is 4, the rest is on disk, and again so."""
    rollout = RolloutConfig(num_workers=1, max_steps=6, max_errors=0.2)
    config = _config(tmp_path, rollout=rollout, broken={"0": "raise", "1": "raise"})
    for _ in range(2):
        with pytest.raises(PartialError, match="2 of 6 episodes failed"):
            collect(config)
    assert set(_files(tmp_path / "out")) == OUTPUTS


def test_nothing_kept_is_an_error_with_reasons(tmp_path: Path) -> None:
    """No row left: reasons and counts in the error, raw episodes on disk, no data files."""
    policy = PolicyConfig(name=f"{TOY}:make_policy", expert="search")  # the toy's gives up
    with pytest.raises(InputError, match=r"none of 6 .*not_successful 6"):
        collect(_config(tmp_path, policy=policy))
    assert len(_raw(tmp_path / "out")) == 6
    assert set(_files(tmp_path / "out")) == {"raw_trajectories.json", "stats.json"}


def test_worker_that_cannot_start_is_one_error(tmp_path: Path) -> None:
    """An environment that fails to build in the worker fails the run with its own words."""
    rollout = RolloutConfig(num_workers=1)
    config = _config(tmp_path, rollout=rollout)
    config.policy.name = f"{TOY}:no_such_policy"
    with pytest.raises(UsageError, match="no_such_policy"):
        collect(config)


def test_one_task_has_no_validation_rows(tmp_path: Path) -> None:
    """A single task is never split; the note says so and val.parquet is empty but readable."""
    report = collect(_config(tmp_path, tasks=1))
    assert report.rows_val == 0 and any("never split" in n for n in report.notes)
    assert list(read_records(report.directory / "val.parquet")) == []


def test_games_of_an_evaluation_split_are_refused(tmp_path: Path) -> None:
    """A game on both sides is named before any episode is played."""
    with pytest.raises(InputError, match=r"in both train and valid_unseen: 0000"):
        collect(_config(tmp_path, shared=True))
    assert not (tmp_path / "out" / ".journal").exists()


def test_another_config_is_refused_with_the_difference(tmp_path: Path) -> None:
    """A finished and an unfinished directory both refuse other settings, naming the key."""
    collect(_config(tmp_path))
    _unfinished(tmp_path / "half").close()
    for parent in (tmp_path, tmp_path / "half"):
        rollout = RolloutConfig(num_workers=2, max_steps=6, seed=1)
        with pytest.raises(UsageError, match=r"rollout\.seed: 0 -> 1"):
            collect(_config(parent, rollout=rollout))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": PromptConfig(template="add_wm3")}, "Did you mean 'add_wm2'"),
        ({"policy": PolicyConfig(name="exprt")}, "Did you mean 'expert'"),
        ({"policy": PolicyConfig(name="hf")}, "no model is named"),
        ({"policy": PolicyConfig(name="hf", model="./absent")}, "no such folder"),
    ],
)
def test_wrong_names_leave_nothing_behind(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """An unknown prompt, policy or model is refused before a directory is made."""
    with pytest.raises(UsageError, match=message):
        collect(_config(tmp_path, None, **changes))
    assert not list(tmp_path.iterdir())


def test_an_environment_may_say_what_it_leaves_out() -> None:
    """`notes` is optional; where it is there, the data set's notes begin with it."""

    class Speaking:
        def notes(self, split: str) -> list[str]:
            return [f"3 games left out of {split}"]

    speaking: Any = Speaking()
    assert task_notes(speaking, "train") == ["3 games left out of train"]
    silent: Any = object()
    assert task_notes(silent, "train") == []


def test_places_that_cannot_be_used(tmp_path: Path) -> None:
    """A file for a directory, foreign files, and a directory in use: refused at the start."""
    (tmp_path / "file").touch()
    with pytest.raises(StorageError):
        collect(_config(tmp_path / "file"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(UsageError, match="did not make"):
        collect(_config(tmp_path, "mine"))
    (tmp_path / "busy").mkdir()
    with run_lock(tmp_path / "busy"), pytest.raises(RunBusyError, match=str(os.getpid())):
        collect(_config(tmp_path, "busy"))


def test_a_changed_published_file_is_noticed(tmp_path: Path) -> None:
    """Running a finished command again verifies the files instead of playing."""
    report = collect(_config(tmp_path))
    assert collect(_config(tmp_path)) == report
    (tmp_path / "out" / "train.csv").write_text("")
    with pytest.raises(InputError, match=r"train\.csv"):
        collect(_config(tmp_path))


def _steps(**change: Any) -> Any:
    def edit(episode: Episode) -> Episode:
        first = dataclasses.replace(episode.steps[-1], **change)
        return dataclasses.replace(episode, steps=(*episode.steps[:-1], first))

    return edit


@pytest.mark.parametrize(
    ("edit", "config", "reason"),
    [
        (lambda e: e, FilterConfig(), ""),
        (lambda e: dataclasses.replace(e, success=False), FilterConfig(), "not_successful"),
        (
            lambda e: dataclasses.replace(e, success=False),
            FilterConfig(require_success=False),
            "",
        ),
        (
            lambda e: dataclasses.replace(e, stop_reason=StopReason.ENV_ERROR),
            FilterConfig(require_success=False),
            "env_error",
        ),
        (lambda e: e, FilterConfig(min_reward=2.0), "reward_too_low"),
        (lambda e: e, FilterConfig(min_steps=9), "too_few_steps"),
        (lambda e: e, FilterConfig(max_steps=1), "too_many_steps"),
        (lambda e: dataclasses.replace(e, steps=()), FilterConfig(min_steps=0), "too_few_steps"),
        (_steps(action_valid=False), FilterConfig(), ""),
        (_steps(action_valid=False), FilterConfig(valid_actions="all"), "invalid_action"),
    ],
)
def test_filters_name_their_reason(
    finished: Episode, edit: Any, config: FilterConfig, reason: str
) -> None:
    """Each filter drops what it says, and only that."""
    assert drop_reason(edit(finished), config) == reason


def test_context_steps_are_masked(finished: Episode) -> None:
    """Invalid steps become context when asked for; answers cut off at the limit always do."""
    context = FilterConfig(valid_actions="context")
    invalid = _steps(action_valid=False)(finished)
    assert mask_steps(invalid, context).steps[-1].weight == 0
    assert mask_steps(invalid, FilterConfig()).steps[-1].weight == 1
    assert (
        mask_steps(_steps(finish_reason="length")(finished), FilterConfig()).steps[-1].weight == 0
    )
    bad = dataclasses.replace(
        finished, steps=tuple(dataclasses.replace(s, action_valid=False) for s in finished.steps)
    )
    assert drop_reason(bad, context) == "nothing_learned"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Episode:
    """One real episode of the toy environment."""
    report = collect(_config(tmp_path_factory.mktemp("one"), tasks=1))
    return _raw(report.directory)[0]


def test_config_crosses_the_process_border() -> None:
    """The worker's config is equal to the collector's."""
    config = _config(Path("x"), prompt=PromptConfig(template="add_wm1"), tasks=3)
    assert config_from_json(json.loads(json.dumps(dataclasses.asdict(config)))) == config


SCRIPT = """
import sys, json
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_collector import _config
from verl_sft.collect.collector import collect
from verl_sft.config.collect import RolloutConfig
from verl_sft.errors import VerlSftError
config = _config(Path({out!r}), rollout=RolloutConfig(num_workers=2, max_steps=6), {args})
try:
    collect(config, progress=lambda done, total, won: print(done, total, flush=True))
except VerlSftError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""


def _launch(out: Path, args: str) -> subprocess.Popen[str]:
    code = SCRIPT.format(tests=str(TOY.parent), out=str(out), args=args)
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def _acknowledged(directory: Path) -> list[str]:
    log = directory / ".journal" / "episodes.log"
    return [record["episode_id"] for record, _ in read_log(log)] if log.exists() else []


def _unfinished(parent: Path) -> Journal:
    """The journal of a run that was stopped before its first episode."""
    (parent / "out").mkdir(parents=True)
    return Journal(parent / "out", config=identity_of(_config(parent)))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_stops_the_run_and_says_how_to_resume(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    """The exit code is 75 or 130, finished episodes are kept, and no worker outlives the run."""
    process = _launch(tmp_path, "tasks=60, delay=0.05")
    assert process.stdout is not None
    for _ in range(4):
        process.stdout.readline()
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == code, errors
    assert "output.name=out" in errors and len(_acknowledged(tmp_path / "out")) >= 3
    assert children and not any(Path(f"/proc/{pid}").exists() for pid in children)


def test_workers_die_with_a_killed_parent(tmp_path: Path) -> None:
    """SIGKILL of the collector leaves no worker behind, even one that hangs in the environment."""
    process = _launch(tmp_path, "tasks=60, broken={str(n): 'hang' for n in range(60)}")
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    children: list[str] = []
    while len(children) < 2:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    time.sleep(0.5)
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 10
    while alive := [pid for pid in children if _alive(pid)]:
        assert time.monotonic() < deadline, f"workers {alive} outlived the collector"
        time.sleep(0.05)


def _alive(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_policy_with_a_model_stops_between_decisions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In-process play (a model is named) is the same data, and a signal ends it as well."""
    policy = PolicyConfig(name=f"{TOY}:make_policy", expert="planner", model="toy", batch_size=4)
    done = collect(_config(tmp_path, "whole", policy=policy))
    assert done.episodes == 6

    def interrupt(count: int, total: int, note: str) -> None:
        if count == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    policy.batch_size = 1
    with pytest.raises(Preempted, match="after 2 of 6"):
        collect(_config(tmp_path, "half", policy=policy), progress=interrupt)
    assert collect(_config(tmp_path, "half", policy=policy)).episodes == 6


def test_a_full_disk_keeps_what_was_acknowledged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ENOSPC in the middle of a journal line: one error, and the next run goes on from there."""
    real, room = os.write, [40_000]

    def write(descriptor: int, data: Any) -> int:
        if b"episode_id" not in bytes(data[:200]) and room[0] == 40_000:
            return real(descriptor, data)
        if room[0] <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        room[0] -= (count := real(descriptor, data[: room[0]]))
        return count

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write)
        with pytest.raises(StorageError, match="Free space"):
            collect(_config(tmp_path, tasks=12))
    before = _acknowledged(tmp_path / "out")
    assert 0 < len(before) < 12
    assert collect(_config(tmp_path, tasks=12)).episodes == 12
    raw = [e.episode_id for e in _raw(tmp_path / "out")]
    assert set(before) <= set(raw) and len(set(raw)) == 12


def test_a_full_disk_at_publishing_keeps_the_journal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that cannot be published leaves nothing half-written; the next run finishes."""
    real = os.replace

    def replace(source: Any, target: Any) -> None:
        if str(target).endswith("train.csv"):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(StorageError, match=r"train\.csv"):
            collect(_config(tmp_path))
    assert not [p for p in (tmp_path / "out").iterdir() if p.name.startswith(".tmp")]
    assert collect(_config(tmp_path)).episodes == 6
    assert set(_files(tmp_path / "out")) == OUTPUTS


def test_a_torn_tail_is_cut_at_every_byte(tmp_path: Path) -> None:
    """Whatever is left of the last line, the records before it are read and appended to."""
    path = tmp_path / "log"
    log = AppendLog(path)
    for number in range(3):
        log.append({"n": number})
        if number == 1:
            two = path.stat().st_size
    log.close()
    whole = path.read_bytes()
    for end in range(two, len(whole)):
        path.write_bytes(whole[:end])
        log = AppendLog(path)
        log.append({"n": "new"})
        log.close()
        assert [r["n"] for r, _ in read_log(path)] == [0, 1, "new"], end
        for torn in tmp_path.glob("log.torn-*"):
            assert torn.read_bytes() == whole[two:end]
            torn.unlink()


def test_damage_inside_the_journal_is_refused(tmp_path: Path) -> None:
    """A flipped bit before the last line names the byte, and the file is not touched."""
    journal = _unfinished(tmp_path)
    for number in range(3):
        journal.append({"episode_id": str(number)})
    journal.close()
    path = journal.path
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match=rf"episodes\.log:byte {len(data) // 3}"):
        collect(_config(tmp_path))
    assert path.read_bytes() == bytes(data)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(max_size=8), unique=True, min_size=1, max_size=8))
def test_journal_knows_its_ids_when_reopened(
    tmp_path_factory: pytest.TempPathFactory, ids: list[str]
) -> None:
    """Two sittings, one journal: every id in order, and none is taken a second time."""
    folder = tmp_path_factory.mktemp("journal")
    for part in (ids[:4], ids[4:]):
        journal = Journal(folder, config={"a": 1})
        for episode_id in part:
            journal.append({"episode_id": episode_id})
        with pytest.raises(AssertionError, match="played twice"):
            journal.append({"episode_id": ids[0]})
        journal.close()
    assert list(journal) == ids


SHELL = ROOT / "examples" / "ppo_trainer" / "run_alfworld_sft_collection.sh"


def _script(*words: str, cwd: Path, **variables: str) -> str:
    done = subprocess.run(
        ["bash", str(SHELL), *words],
        cwd=cwd,
        env={**os.environ, "PYTHON": sys.executable, **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout + done.stderr


def test_the_collection_script_lets_the_caller_win(tmp_path: Path) -> None:
    """Defaults, then the caller's environment, then key=value words; from any directory."""
    plain = _script("--dry-run", cwd=tmp_path)
    assert "seed: 0" in plain and "template: default" in plain and "name: expert" in plain
    own = _script(
        "scripted", "prompt.template=add_wm2", "--dry-run", cwd=tmp_path,
        SFT_SEED="7", PROMPT_TEMPLATE="add_wm1", SFT_REQUIRE_SUCCESS="false", NUM_EPISODES="3",
    )  # fmt: skip
    for line in ("seed: 7", "template: add_wm2", "name: scripted", "require_success: false"):
        assert line in own
    assert "num_episodes: 3" in own
    assert "nothing to do" in _script(cwd=tmp_path, COLLECT_SFT="0")
    assert list(tmp_path.iterdir()) == []


def test_real_games_give_the_same_bytes_for_any_number_of_workers(
    tmp_path: Path, real_games: Path
) -> None:
    """The real engine in two processes or in one: equal files, every episode won by the planner."""
    for workers in (1, 2):
        config = CollectConfig(
            env=EnvConfig(data_dir=str(real_games), task_types=["look_at_obj_in_light"]),
            policy=PolicyConfig(expert="planner"),
            rollout=RolloutConfig(num_workers=workers, num_episodes=4),
            output=OutputConfig(dir=str(tmp_path), name=str(workers)),
        )
        assert collect(config).kept == 4
    assert _files(tmp_path / "1") == _files(tmp_path / "2")
