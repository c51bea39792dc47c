"""`make-games`: procedural ALFWorld games, each played to the win before it is written.

A problem whose goal is out of reach (no tool, no place that holds the object) makes the translator
write a stand-in task with the atoms `dummy(val1)`, and TextWorld fails on it with KeyError: 'val1'.
The draw avoids such problems, and the engine's check catches any that is left: it is drawn anew.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from verl_sft.config.collect import MakeGamesConfig
from verl_sft.envs.alfworld_data import (
    GAME_FILE,
    RELEASE,
    TRAJ_FILE,
    check_task_types,
    task_type_of,
)
from verl_sft.envs.alfworld_draw import draw_task, goals_in, scenes_for
from verl_sft.envs.alfworld_engine import Engine
from verl_sft.envs.alfworld_problem import game_text, traj_text
from verl_sft.envs.alfworld_rooms import load_room, tables
from verl_sft.errors import InputError, UsageError
from verl_sft.processes import die_with_parent
from verl_sft.safe_io import (
    AppendLog,
    dump_json,
    fsync_path,
    make_output_dir,
    read_log,
    run_lock,
    storage_error,
    write_json,
)

MANIFEST = "games.json"
_JOURNAL = ".games.log"
_STAGING = ".tmp-"
_MAX_ATTEMPTS = 20
_MAX_PLAN = 40  # commands; a longer plan leaves too little of the usual 50 steps for looking around
_FORMAT = 1  # raise when the same config would give other games
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class GamesReport:
    """What `make_games` did; `skipped` names every drawn game that was thrown away, and why."""

    out: Path
    games: tuple[str, ...]  # task ids, under `out`/json_2.1.1
    made: int  # games written by this call; the others were there
    skipped: tuple[str, ...]

    @property
    def by_task_type(self) -> dict[str, int]:
        """Number of games of each task type."""
        return dict(sorted(Counter(map(task_type_of, self.games)).items()))


@dataclass(frozen=True, slots=True)
class _Order:
    """One game to make; with the config's seed it decides every byte of it."""

    split: str
    index: int
    task_type: str
    scenes: tuple[int, ...]
    seed: int
    size: str
    wording: str
    root: str

    def rng(self, purpose: str) -> random.Random:
        return random.Random(f"{self.seed}/{self.split}/{self.index}/{purpose}")

    @property
    def scene(self) -> int:
        return self.rng("scene").choice(self.scenes)


def make_games(config: MakeGamesConfig, *, progress: Progress | None = None) -> GamesReport:
    """Make `num` train games and `num_valid` of each validation split under `config.out`.

    The same config gives the same bytes, whatever the number of workers. A run that was cut short
    goes on where it stopped; one that is complete is left as it is. `valid_seen` plays in rooms of
    the train games (where one suits the task), `valid_unseen` in rooms that no train game has.

    Args:
        config: see `MakeGamesConfig`.
        progress: called with (games done, games in all).

    Raises:
        UsageError: no `out`, or it holds something else.
        MissingExtraError: `alfworld` is not installed.
        InputError: a game failed its check in every attempt.
        RunBusyError, StorageError: the folder is in use, or cannot be written.
    """
    if not config.out:
        raise UsageError("make-games needs a folder to write to", fix="Give out=DIR")
    check_task_types(config.task_types)
    out = Path(config.out).expanduser()
    identity = _identity(config)
    _refuse_other(out, identity)
    orders = _orders(config, out / RELEASE)  # fails without `alfworld`, before a folder is made
    make_output_dir(out)
    with run_lock(out):
        done = _done_before(out)
        missing = [o for o in orders if (o.split, o.index) not in done]
        if progress:
            progress(len(done), len(orders))
        if missing:
            _make_missing(config, out, missing, done, progress=progress, total=len(orders))
        rows = [done[o.split, o.index] for o in orders]
        skipped = [reason for row in rows for reason in row["skipped"]]
        games = sorted(row["game"] for row in rows)
        if missing:
            manifest = {"config": identity, "games": games, "rows": rows, "complete": True}
            write_json(out / MANIFEST, manifest)
            (out / _JOURNAL).unlink(missing_ok=True)
    return GamesReport(out, tuple(games), len(missing), tuple(skipped))


def _identity(config: MakeGamesConfig) -> dict[str, Any]:
    """Everything that decides the bytes of the games."""
    return {
        "format": _FORMAT,
        "num": config.num,
        "num_valid": _num_valid(config),
        "seed": config.seed,
        "size": config.size,
        "task_types": list(check_task_types(config.task_types)),
        "wording": config.wording,
    }


def _num_valid(config: MakeGamesConfig) -> int:
    return max(6, config.num // 10) if config.num_valid is None else config.num_valid


def _refuse_other(out: Path, identity: Mapping[str, Any]) -> None:
    """Raise unless `out` is new, empty, or the place of these very games."""
    names = {p.name for p in out.iterdir()} if out.is_dir() else set()
    if not names - {".run.lock"}:
        return
    fix = "Choose another folder, or remove this one"
    if not names & {MANIFEST, _JOURNAL}:
        raise UsageError("the folder is not empty", where=str(out), fix=fix)
    before = _read_identity(out)
    if before != identity:
        changed = [k for k in identity if before.get(k) != identity[k]]
        what = "the folder holds games made with another config"
        raise UsageError(what, where=str(out), why=f"Changed: {', '.join(changed)}", fix=fix)


def _read_identity(out: Path) -> Mapping[str, Any]:
    if (out / MANIFEST).exists():
        return dict(_read_manifest(out)["config"])
    first = next(iter(read_log(out / _JOURNAL)), None)
    return dict(first[0]["config"]) if first else {}


def _read_manifest(out: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((out / MANIFEST).read_text(encoding="utf-8")))
    except (ValueError, OSError) as error:
        where = str(out / MANIFEST)
        raise InputError("the list of games cannot be read", where=where, why=str(error)) from error


def _done_before(out: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """The games that an earlier run made and that are still there."""
    rows: list[dict[str, Any]] = []
    if (out / MANIFEST).exists():
        rows += _read_manifest(out)["rows"]
    if (out / _JOURNAL).exists():
        rows += [record for record, _ in read_log(out / _JOURNAL) if "game" in record]
    there = [row for row in rows if (out / RELEASE / row["game"]).is_file()]
    return {(row["split"], row["index"]): row for row in there}


def _orders(config: MakeGamesConfig, root: Path) -> list[_Order]:
    """Every game to make; task types take turns, so that each split is balanced."""
    types = check_task_types(config.task_types)
    common: dict[str, Any] = {
        "seed": config.seed,
        "size": config.size,
        "wording": config.wording,
        "root": str(root),
    }

    def orders(split: str, count: int, scenes: Sequence[int]) -> list[_Order]:
        made = []
        for index in range(count):
            task_type = types[index % len(types)]
            usable = _usable_scenes(task_type, tuple(scenes)) or _usable_scenes(
                task_type, tables().train_scenes
            )
            made.append(_Order(split, index, task_type, usable, **common))
        return made

    train = orders("train", config.num, tables().train_scenes)
    played = sorted({order.scene for order in train})
    count = _num_valid(config)
    seen = orders("valid_seen", count, played)
    return [*train, *seen, *orders("valid_unseen", count, tables().unseen_scenes)]


@functools.cache
def _usable_scenes(task_type: str, scenes: tuple[int, ...]) -> tuple[int, ...]:
    rooms = [load_room(scene) for scene in scenes_for(task_type, scenes=scenes)]
    return tuple(room.scene for room in rooms if goals_in(room, task_type=task_type))


def _make_missing(
    config: MakeGamesConfig,
    out: Path,
    missing: Sequence[_Order],
    done: dict[tuple[str, int], dict[str, Any]],
    *,
    progress: Progress | None,
    total: int,
) -> None:
    """Make the games that are missing and add their rows to `done`, each journalled."""
    for stale in out.glob(f"{_STAGING}*"):
        shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
    fresh = not (out / _JOURNAL).exists()
    journal = AppendLog(out / _JOURNAL)
    try:
        if fresh:
            journal.append({"config": _identity(config)})
        workers = min(config.num_workers or os.cpu_count() or 1, len(missing))
        with _mapper(workers) as mapped:
            for row in mapped(_make_one, missing):
                journal.append(row)
                done[row["split"], row["index"]] = row
                if progress:
                    progress(len(done), total)
    finally:
        journal.close()


@contextlib.contextmanager
def _mapper(workers: int) -> Iterator[Callable[..., Iterator[dict[str, Any]]]]:
    """An ordered `map`, in this process or in `workers` fresh ones."""
    if workers <= 1:
        yield map
        return
    # Not fork: the planner's library and the caller's threads do not survive it.
    pool = ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=die_with_parent
    )
    try:
        yield pool.map
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _make_one(order: _Order) -> dict[str, Any]:
    """Draw, write, play and publish one game; the row says where it lies."""
    room = load_room(order.scene)
    skipped: list[str] = []
    for attempt in range(_MAX_ATTEMPTS):
        rng = order.rng(f"attempt {attempt}")
        task = draw_task(room, task_type=order.task_type, size=order.size, rng=rng)
        key = dump_json([order.seed, order.split, order.index, attempt, order.size])
        trial = f"trial_{order.index:06d}_{hashlib.sha256(key.encode()).hexdigest()[:12]}"
        game = game_text(task, trial=trial, wording=order.wording)
        relative = f"{order.split}/{task.name}/{trial}"
        problem = play_to_win(game, folder=Path(order.root).parent)
        if not problem:
            traj = traj_text(task, trial=trial)
            _publish(Path(order.root), relative, {GAME_FILE: game, TRAJ_FILE: traj})
            return {
                "split": order.split,
                "index": order.index,
                "game": f"{relative}/{GAME_FILE}",
                "skipped": skipped,
            }
        skipped.append(f"{relative}: {problem}")
    raise InputError(
        f"no playable game in {_MAX_ATTEMPTS} attempts",
        where=f"{order.split} {order.index}, {order.task_type}, FloorPlan{order.scene}",
        why=skipped[-1],
        fix="Choose another seed",
    )


def play_to_win(game: str, *, folder: Path | None = None) -> str:
    """Play a game's own plan in the engine: "" if it wins, else what went wrong.

    The engine reads files: a temporary one lies in `folder`, where the next run finds it if this
    one is killed.
    """
    descriptor, name = tempfile.mkstemp(prefix=_STAGING, suffix=f"-{GAME_FILE}", dir=folder)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(game)
        engine = _engine()
        state = engine.reset(Path(name))
        if state["won"]:
            return "won before the first step"
        for _ in range(_MAX_PLAN):
            if not engine.plan():
                return "the planner finds no way to the goal"
            state = engine.step(engine.plan()[0])
            if state["won"]:
                return ""
        return f"no win within {_MAX_PLAN} steps of the plan"
    except InputError as error:
        return f"{error.what} ({error.why})"
    finally:
        os.unlink(name)


@functools.cache
def _engine() -> Engine:
    return Engine()


def _publish(root: Path, relative: str, files: Mapping[str, str]) -> None:
    """Write a game's folder so that it is there complete or not at all."""
    folder = root / relative
    # Beside the games, not among them: loaders walk the whole tree below `root`.
    staging = root.parent / f"{_STAGING}{folder.name}"
    try:
        staging.mkdir(parents=True)
        for name, text in files.items():
            (staging / name).write_text(text, encoding="utf-8")
            fsync_path(staging / name)
        folder.parent.mkdir(parents=True, exist_ok=True)
        if folder.exists():
            shutil.rmtree(folder)  # published by a run that was cut short before it said so
        os.replace(staging, folder)
        fsync_path(folder.parent)
    except OSError as error:
        raise storage_error(error, folder) from error
