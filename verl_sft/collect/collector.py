"""`collect`: play episodes, keep each one the moment it ends, publish them as one data set.

Whatever stops a run, finished episodes stay in the journal of its directory, and the same command
goes on from there. The same seed gives the same files, byte for byte, whatever the number of
workers: publishing follows the plan, not the clock.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from verl_sft.collect.journal import FOLDER, Journal, check_same_config
from verl_sft.collect.publish import FILES, publish
from verl_sft.collect.rollout import (
    EpisodeSpec,
    RolloutSettings,
    plan_episodes,
    play,
    task_notes,
)
from verl_sft.collect.worker import make_environment, make_policy
from verl_sft.collect.workers import play_in_workers
from verl_sft.config.collect import CollectConfig
from verl_sft.envs.base import Environment
from verl_sft.errors import InputError, PartialError, Preempted, UsageError
from verl_sft.policies.base import Policy, PolicyRequest
from verl_sft.registry import POLICIES, PROMPTS, resolve
from verl_sft.safe_io import file_sha256, make_output_dir, run_lock
from verl_sft.types import JSON, Completion

Progress = Callable[[int, int, str], None]
EVALUATION_SPLITS = ("valid_seen", "valid_unseen")
# Settings that do not change what is collected; a resumed run may change them.
_FREE = {"rollout": ("num_workers", "max_errors"), "output": ("dir", "name"), "env": ("data_dir",)}


@dataclass(frozen=True, slots=True)
class CollectReport:
    """What a finished run leaves behind; `notes` are sentences for the user."""

    directory: Path
    episodes: int
    successes: int
    kept: int
    errors: int
    rows_train: int
    rows_val: int
    notes: tuple[str, ...] = ()


def collect(config: CollectConfig, *, progress: Progress | None = None) -> CollectReport:
    """Collect a data set into `sft_data_<date>_<time>/`, or resume the directory `output.name`.

    Args:
        config: what to play, whom, how often, and what to keep.
        progress: called with (episodes done, episodes planned, "n won") after each episode that is
            safely on disk.

    Raises:
        UsageError: a name is unknown, or the directory belongs to another configuration.
        InputError: there are no tasks, or no episode passed the filters.
        StorageError: the directory cannot be written.
        RunBusyError: another run works in it.
        PartialError: more than `rollout.max_errors` of the episodes failed; the rest is published.
        Preempted: a signal came; finished episodes are kept (exit code 75, or 130 for Ctrl-C).
    """
    directory = _output_dir(config)
    identity = identity_of(config)
    with contextlib.ExitStack() as held:
        # What can be wrong with the names and the games is found out before a directory is made.
        resolve("prompt template", config.prompt.template, PROMPTS)
        resolve("policy", config.policy.name, POLICIES)
        env = held.enter_context(contextlib.closing(make_environment(config)))
        specs = plan_episodes(env, config)
        notes = [*task_notes(env, config.env.split), *_guard(env, specs, config)]
        policy = make_policy(config) if _plays_here(config) else None
        held.enter_context(run_lock(make_output_dir(directory)))
        for left in directory.glob(".tmp-*"):  # of a publication that was killed
            left.unlink(missing_ok=True)
        if (directory / "manifest.json").exists():
            stats = _published(directory, identity)
            shutil.rmtree(directory / FOLDER, ignore_errors=True)
            return _conclude(_report(directory, stats), config)
        with contextlib.closing(Journal(directory, config=identity)) as journal:
            _play_all(
                specs,
                journal=journal,
                config=config,
                policy=policy,
                directory=directory,
                progress=progress,
            )
            stats = publish(
                directory,
                episodes=lambda: (journal.read(s.episode_id) for s in specs),
                config=config,
                identity=identity,
                notes=notes,
            )
        journal.remove()
    return _conclude(_report(directory, stats), config)


def identity_of(config: CollectConfig) -> JSON:
    """The part of the config that decides the data, as JSON: it travels with every file."""
    tree = asdict(config)
    for part, names in _FREE.items():
        for name in names:
            del tree[part][name]
    return tree


def _output_dir(config: CollectConfig) -> Path:
    parent = Path(config.output.dir).expanduser()
    if config.output.name is None:
        stem = f"sft_data_{time.strftime('%Y%m%d_%H%M%S')}"
        names = (stem, *(f"{stem}_{n}" for n in range(1, 1000)))
        return next(parent / name for name in names if not (parent / name).exists())
    directory = parent / config.output.name
    ours = any((directory / name).exists() for name in (FOLDER, "manifest.json"))
    if directory.is_dir() and not ours and any(n[0] != "." for n in os.listdir(directory)):
        raise UsageError(
            "the directory holds files that this command did not make",
            where=str(directory),
            fix="Choose another output.name",
        )
    return directory


def _guard(env: Environment, specs: Sequence[EpisodeSpec], config: CollectConfig) -> list[str]:
    """Refuse to train on games of an evaluation split; note what the user should know."""
    if not specs:
        raise InputError("there is no task to play", where=f"env.split={config.env.split}")
    if config.env.split in EVALUATION_SPLITS:
        return [f"Collected from {config.env.split}: success rates on it mean nothing any more."]
    notes = []
    mine = {_bare(s.task_id, config.env.split) for s in specs}
    for split in EVALUATION_SPLITS:
        try:
            shared = sorted(mine & {_bare(t, split) for t in env.task_ids(split)})
        except InputError:
            continue  # this installation has no such split
        if shared:
            names = ", ".join(shared[:5]) + (", ..." if len(shared) > 5 else "")
            raise InputError(
                f"{len(shared)} games are in both {config.env.split} and {split}: {names}",
                why="Evaluation on games that were trained on measures nothing",
                fix="Remove them from one of the two, or make games with another seed",
            )
    if len(mine) == 1 and config.output.val_fraction > 0:
        notes.append("Only one task: a task is never split, so there will be no validation rows.")
    return notes


def _bare(task_id: str, split: str) -> str:
    return task_id.removeprefix(f"{split}/")


def _play_all(
    specs: Sequence[EpisodeSpec],
    *,
    journal: Journal,
    config: CollectConfig,
    policy: Policy | None,
    directory: Path,
    progress: Progress | None,
) -> None:
    """Play what the journal lacks; raise `Preempted` when a signal says stop."""
    successes = sum(journal.read(s.episode_id).success for s in specs if s.episode_id in journal)
    missing = [s for s in specs if s.episode_id not in journal]
    if progress is not None:
        progress(len(journal), len(specs), f"{successes} won")
    with (
        _stop_requests() as stop,
        contextlib.closing(_source(missing, config, policy, stop)) as source,
    ):
        for episode in source if missing else ():
            journal.append(episode)
            successes += bool(episode["success"])
            if progress is not None:
                progress(len(journal), len(specs), f"{successes} won")
        if stop.signal is not None and len(journal) < len(specs):
            raise _preempted(stop.signal, directory, len(journal), len(specs))


def _plays_here(config: CollectConfig) -> bool:
    """Whether the policy has a model, which is loaded once, not in every worker."""
    return config.policy.name == "hf" or config.policy.model is not None


def _source(
    specs: Sequence[EpisodeSpec], config: CollectConfig, policy: Policy | None, stop: _Stop
) -> Generator[JSON]:
    """Episodes as JSON: from worker processes, or, given a policy with a model, from here."""
    if policy is None:
        yield from play_in_workers(
            specs,
            config=config,
            num_workers=config.rollout.num_workers or len(os.sched_getaffinity(0)),
            stopping=lambda: stop.signal is not None,
        )
        return
    with contextlib.suppress(_StopRequestError):
        for episode in play(
            specs,
            make_env=lambda: make_environment(config),
            policy=_Stoppable(policy, stop, policy.name),
            settings=RolloutSettings.from_config(config),
        ):
            yield episode.to_json()


class _StopRequestError(BaseException):
    """Leaves the rollout, which takes every `Exception` of a policy for that episode's failure."""


@dataclass(slots=True)
class _Stop:
    """Which signal asked us to stop, if one did."""

    signal: int | None = None


@dataclass(slots=True)
class _Stoppable:
    """A policy that takes no further decision once a signal has come."""

    policy: Policy
    stop: _Stop
    name: str

    def complete(self, requests: Sequence[PolicyRequest]) -> list[Completion]:
        if self.stop.signal is not None:
            raise _StopRequestError
        return self.policy.complete(requests)


@contextlib.contextmanager
def _stop_requests() -> Iterator[_Stop]:
    """Turn the first SIGTERM or SIGINT into a request; a second one ends the process at once."""
    stop = _Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, _frame: Any) -> None:
        if stop.signal is not None:
            os._exit(128 + number)
        stop.signal = number

    before = {n: signal.signal(n, handle) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _preempted(number: int, directory: Path, done: int, total: int) -> Preempted:
    error = Preempted(
        f"stopped by {signal.Signals(number).name} after {done} of {total} episodes",
        where=str(directory),
        why="Finished episodes are kept",
        fix="Resume with the same command and "
        f"output.dir={directory.parent} output.name={directory.name}",
    )
    if number == signal.SIGINT:
        error.exit_code = 130
    return error


def _published(directory: Path, identity: JSON) -> JSON:
    """The statistics of a directory that is complete, after a look at every file.

    Raises:
        UsageError: it was made with another configuration.
        InputError: a file is missing or was changed.
    """
    check_same_config(directory / "manifest.json", identity, inside="config")
    files = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))["files"]
    for name in FILES:
        path = directory / name
        if not path.exists() or file_sha256(path) != files[name]["sha256"]:
            raise InputError(
                "the file is missing or not the one that was published",
                where=str(path),
                fix="Restore it, or collect again into another output.name",
            )
    stats: JSON = json.loads((directory / "stats.json").read_text(encoding="utf-8"))
    return stats


def _report(directory: Path, stats: JSON) -> CollectReport:
    return CollectReport(
        directory=directory,
        episodes=stats["episodes"],
        successes=stats["successes"],
        kept=stats["kept_episodes"],
        errors=len(stats["errors"]),
        rows_train=stats["rows"]["train"]["rows"],
        rows_val=stats["rows"]["val"]["rows"],
        notes=tuple(stats["notes"]),
    )


def _conclude(report: CollectReport, config: CollectConfig) -> CollectReport:
    """The report, unless too much failed."""
    if report.errors <= config.rollout.max_errors * report.episodes:
        return report
    raise PartialError(
        f"{report.errors} of {report.episodes} episodes failed",
        where=str(report.directory),
        why=f"That is more than rollout.max_errors={config.rollout.max_errors:g}; "
        f"{report.rows_train} train rows of the others are published",
        fix="`errors` in stats.json names each game and its cause",
    )
