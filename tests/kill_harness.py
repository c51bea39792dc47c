"""Kills training runs at random moments and says what was left.

The test process forks a launcher, and the launcher forks the ranks, all from an interpreter that
has imported torch: a start takes a second. Ranks write a byte to a pipe when a save begins and when
it is about to be published, so that kills can be aimed at saves.
"""

from __future__ import annotations

import json
import os
import random
import select
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests import train_ranks
from verl_sft.processes import die_with_parent
from verl_sft.trainer import fsdp_sft_trainer, saving

VICTIMS = ("one rank", "all ranks", "launcher")
GONE_S = 20.0  # in which survivors must end by themselves; a machine full of others is slow


@dataclass
class Tally:
    """What the kills of a job met."""

    kills: int = 0
    inside_a_save: int = 0
    by_victim: dict[str, int] = field(default_factory=lambda: dict.fromkeys(VICTIMS, 0))
    starts: int = 0

    def __str__(self) -> str:
        return f"{self.kills} kills in {self.starts} starts ({self.by_victim}), " + (
            f"{self.inside_a_save} inside a save"
        )


@dataclass
class _Start:
    launcher: int
    ranks: list[int]
    marks: int  # pipe
    folder: Path
    statuses: Path


def run_with_kills(
    config: Any,
    *,
    rng: random.Random,
    tally: Tally,
    most: int,
    size: int = 2,
    before: Callable[[], None] | None = None,
) -> None:
    """Start, kill and start again until the run is done or `most` kills were made, then let it end.

    Args:
        config: of the run.
        rng: decides when and whom to kill.
        tally: counts; `most` is the number of kills that it may hold in the end.
        most: kills.
        size: ranks.
        before: called in each rank before it starts.
    """
    while True:
        start = _start(config, size=size, before=before)
        tally.starts += 1
        kill = tally.kills < most
        victim = rng.choice(VICTIMS)
        killed = _kill(start, rng=rng, victim=victim) if kill else []
        statuses = _end(start, victim=victim if killed else "")
        if killed:
            hit = [statuses[pid] for pid in killed if pid in statuses]
            if victim == "launcher" or -signal.SIGKILL in hit:
                tally.kills += 1
                tally.by_victim[victim] += 1
                left = Path(config.trainer.default_local_dir).glob(".tmp-global_step_*")
                tally.inside_a_save += any(left)
        if not killed or (statuses and not any(statuses.values())):
            codes = [json.loads(p.read_text())["code"] for p in _reports(start, size)]
            assert codes == [0] * size, [p.read_text() for p in _reports(start, size)]
            return


def _start(config: Any, *, size: int, before: Callable[[], None] | None) -> _Start:
    folder = Path(config.trainer.default_local_dir)
    folder.mkdir(parents=True, exist_ok=True)
    work = folder.parent / f".start-{time.monotonic_ns()}"
    work.mkdir()
    told, tell = os.pipe()
    marks, mark = os.pipe()
    launcher = os.fork()
    if launcher == 0:
        os.close(told)
        os.close(marks)
        _launch(config, size=size, work=work, tell=tell, mark=mark, before=before)
    os.close(tell)
    os.close(mark)
    line = b""
    while not line.endswith(b"\n"):
        line += os.read(told, 4096)
    os.close(told)
    return _Start(launcher, json.loads(line), marks, work, work / "statuses")


def _launch(
    config: Any, *, size: int, work: Path, tell: int, mark: int, before: Callable[[], None] | None
) -> None:
    """The launcher: fork the ranks, tell their ids, and record how each of them ended."""
    die_with_parent()
    mine, ranks = os.getpid(), []
    for rank in range(size):
        child = os.fork()
        if child == 0:
            die_with_parent(mine)
            _mark_saves(mark)
            fsdp_sft_trainer.plot_loss = lambda directory: ""  # its import takes seconds
            if before is not None:
                before()
            report = work / f"report.{rank}"
            store = train_ranks.toy_store(10)
            train_ranks._child(config, rank, size, work / "store", report, store, None, None)
        ranks.append(child)
    os.write(tell, json.dumps(ranks).encode() + b"\n")
    os.close(mark)
    found = _wait_for(ranks)
    (work / "statuses").write_text(json.dumps(found))
    os._exit(0)


def _wait_for(ranks: list[int]) -> dict[int, int]:
    """Exit codes; as torchrun does, end those that still wait for a lost one to start with them."""
    found: dict[int, int] = {}
    end = float("inf")
    while len(found) < len(ranks):
        for rank in set(ranks) - set(found):
            pid, status = os.waitpid(rank, os.WNOHANG)
            if pid:
                found[rank] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > end:
                os.kill(rank, signal.SIGKILL)
        if any(found.values()):
            end = min(end, time.monotonic() + GONE_S / 2)
        time.sleep(0.005)
    return found


def _mark_saves(mark: int) -> None:
    def marked(name: str) -> None:
        original = getattr(saving, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            os.write(mark, b".")
            return original(*args, **kwargs)

        setattr(saving, name, wrapped)

    for name in ("write_shard", "replace", "publish_links"):
        marked(name)


def _kill(start: _Start, *, rng: random.Random, victim: str) -> list[int]:
    """Kill at a random moment, a third of them within 5 ms of a save; empty if it was over."""
    deadline = time.monotonic() + 60
    aimed, wanted = rng.random() < 1 / 3, rng.randrange(1, 16)
    pause = rng.uniform(0, 0.005) if aimed else rng.uniform(0, 0.15)
    if not aimed and rng.random() < 0.2:  # also while it starts
        wanted, pause = 0, rng.uniform(0, 1)
    while wanted > 0 and time.monotonic() < deadline:
        ready, _, _ = select.select([start.marks], [], [], 1.0)
        if ready:
            got = os.read(start.marks, 1)
            if not got:  # every rank has ended
                return []
            wanted -= 1
        if not aimed and rng.random() < 0.1:
            break
    time.sleep(pause)
    if victim == "launcher":
        targets = [start.launcher]
    elif victim == "all ranks":
        targets = list(start.ranks)
    else:
        targets = [rng.choice(start.ranks)]
    for pid in targets:
        if _alive(pid):
            os.kill(pid, signal.SIGKILL)
    return targets


def _end(start: _Start, *, victim: str) -> dict[int, int]:
    """Wait until every process is gone; exit codes of the ranks where a launcher was left."""
    deadline = time.monotonic() + (GONE_S if victim else 120)
    everyone = [start.launcher, *start.ranks]
    code = None
    while any(_alive(pid) for pid in everyone):
        if code is None and os.waitpid(start.launcher, os.WNOHANG)[0]:
            code = 0
        if time.monotonic() > deadline:
            for pid in everyone:
                if _alive(pid):
                    os.kill(pid, signal.SIGKILL)
            raise AssertionError(f"processes are left after the kill of {victim or 'nobody'}")
        time.sleep(0.002)
    os.close(start.marks)
    if victim == "launcher":
        return {}
    return {int(pid): code for pid, code in json.loads(start.statuses.read_text()).items()}


def _alive(pid: int) -> bool:
    """Whether any thread is left; a zombie's other threads may still hold its files and locks."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return state not in "ZX" or len(os.listdir(f"/proc/{pid}/task")) > 1
    except OSError:
        return False


def _reports(start: _Start, size: int) -> list[Path]:
    return [start.folder / f"report.{rank}" for rank in range(size)]
