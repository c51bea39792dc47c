"""SIGKILL of the collector at any moment: no acknowledged episode lost, doubled or altered."""

from __future__ import annotations

import os
import random
import select
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.test_collector import OUTPUTS, _config
from verl_sft.collect import collector
from verl_sft.config.collect import CollectConfig, PolicyConfig, RolloutConfig
from verl_sft.processes import die_with_parent
from verl_sft.safe_io import AppendLog, read_log

TASKS = 40
TOY = Path(__file__).with_name("toy_env.py")
Wreck = Callable[[], None]


@dataclass
class Tally:
    """What the kills of a job met."""

    kills: int = 0
    acknowledged: int = 0
    while_publishing: int = 0
    torn: int = 0
    runs: dict[str, int] = field(default_factory=lambda: {"here": 0, "in workers": 0})

    def __str__(self) -> str:
        return (
            f"{self.kills} kills in runs {self.runs}, {self.while_publishing} of them in a "
            f"publication, {self.acknowledged} episodes acknowledged, {self.torn} torn lines"
        )


def settings(folder: Path, *, workers: bool) -> CollectConfig:
    """Episodes played in the collector itself, or in two worker processes."""
    policy = PolicyConfig(name=f"{TOY}:make_policy", expert="planner")
    if not workers:
        policy.model = "none"  # a policy with a model is played in the collector
    rollout = RolloutConfig(num_workers=2, max_steps=6)
    return _config(folder, policy=policy, rollout=rollout, tasks=TASKS)


def start(config: CollectConfig, *, wreck: Wreck | None = None) -> tuple[int, int]:
    """Fork a collector; gives its process id and a pipe with a byte for each acknowledgement."""
    told, tell = os.pipe()
    child = os.fork()
    if child:
        os.close(tell)
        return child, told
    code = 1
    try:
        die_with_parent()
        if wreck is not None:
            wreck()
        original = collector.publish

        def publish(*args: Any, **kwargs: Any) -> Any:
            os.write(tell, b"p")
            return original(*args, **kwargs)

        collector.publish = publish
        collector.collect(config, progress=lambda done, *_: os.write(tell, b"." * (done > 0)))
        code = 0
    finally:
        os._exit(code)


def kill(child: int, told: int, *, rng: random.Random) -> tuple[int, bool, int]:
    """Kill at a random moment, a third of them within 2 ms of an acknowledgement or publication.

    Returns:
        Acknowledgements, whether a publication had begun, and how the process ended.
    """
    aimed, seen, publishing = rng.random() < 1 / 3, 0, False
    wanted = rng.choice(["p", "p", *range(1, 8)]) if aimed else 0
    end = time.monotonic() + (60 if aimed else rng.uniform(0, rng.choice([0.08, 0.4])))
    while time.monotonic() < end:
        if not select.select([told], [], [], max(0.0, end - time.monotonic()))[0]:
            break
        got = os.read(told, 1)
        if not got:
            break
        seen, publishing = seen + (got == b"."), publishing or got == b"p"
        if aimed and (publishing if wanted == "p" else seen >= int(wanted)):
            time.sleep(rng.uniform(0, 0.05 if publishing else 0.002))
            break
    os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    while rest := os.read(told, 4096):  # told before it died
        seen, publishing = seen + rest.count(b"."), publishing or b"p" in rest
    os.close(told)
    return seen, publishing, code


def journal(directory: Path) -> Iterator[tuple[str, bytes]]:
    """Id and exact bytes of every whole line."""
    log, begin = directory / ".journal" / "episodes.log", 0
    if log.exists():
        content = log.read_bytes()
        for record, end in read_log(log):
            yield record["episode_id"], content[begin:end]
            begin = end


def published(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in directory.iterdir() if p.name in OUTPUTS}


def check_one_run(config: CollectConfig, *, rng: random.Random, tally: Tally, most: int) -> None:
    """Kill and start again until the run is done, or so many kills were made, then let it end."""
    directory = Path(config.output.dir) / "out"
    known: list[tuple[str, bytes]] = []
    while tally.kills < most:
        child, told = start(config)
        seen, publishing, code = kill(child, told, rng=rng)
        if code == 0:
            break
        assert code == -signal.SIGKILL, code
        tally.kills += 1
        tally.while_publishing += publishing
        log = directory / ".journal" / "episodes.log"
        tally.torn += log.exists() and log.read_bytes()[-1:] not in (b"", b"\n")
        if (directory / "manifest.json").exists():
            assert set(published(directory)) == OUTPUTS
            continue
        now = list(journal(directory))
        assert now[: len(known)] == known, "an acknowledged episode is gone or altered"
        ids = [name for name, _ in now]
        assert len(set(ids)) == len(ids), "an episode was played twice"
        assert seen <= len(now), "progress ran ahead of the disk"
        known = now
    child, told = start(config)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    os.close(told)
    tally.acknowledged += TASKS
    assert {p.name for p in directory.iterdir()} - OUTPUTS == {".run.lock"}


def kill_many(folder: Path, *, kills: int, seed: int) -> Tally:
    """Runs until so many kills were made; each publishes the bytes of one that was not killed."""
    rng, tally = random.Random(seed), Tally()
    wanted = {}
    for workers in (False, True):
        config = settings(folder / f"whole-{workers}", workers=workers)
        collector.collect(config)
        wanted[workers] = published(folder / f"whole-{workers}" / "out")
    while tally.kills < kills:
        workers = sum(tally.runs.values()) % 4 == 1  # they are slow to start
        tally.runs["in workers" if workers else "here"] += 1
        place = folder / f"run-{sum(tally.runs.values())}"
        check_one_run(settings(place, workers=workers), rng=rng, tally=tally, most=kills)
        assert published(place / "out") == wanted[workers], f"{place.name} differs, seed {seed}"
    return tally


def test_kills_lose_and_repeat_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Forty kills: journals only grow, and the published bytes are those without kills."""
    seed = random.randrange(1 << 30)
    tally = kill_many(tmp_path, kills=40, seed=seed)
    with capsys.disabled():
        print(f"\nseed {seed}: {tally}")
    assert tally.while_publishing >= 2 and all(tally.runs.values())


@pytest.mark.release
def test_five_thousand_kills_lose_and_repeat_nothing(tmp_path: Path) -> None:
    """The same with five thousand kills."""
    tally = kill_many(tmp_path, kills=5000, seed=random.randrange(1 << 30))
    print(tally)
    assert tally.while_publishing >= 250


def test_the_harness_sees_an_early_acknowledgement(tmp_path: Path) -> None:
    """Negative control: a journal that tells before it writes loses what it told."""

    def tell_first() -> None:
        held, write = [], AppendLog.append

        def append(log: AppendLog, record: Any) -> None:
            held.append(record)
            if len(held) == 4:
                for one in held:
                    write(log, one)
                held.clear()

        AppendLog.append = append

    rng, ahead = random.Random(3), 0
    for number in range(8):
        config = settings(tmp_path / str(number), workers=False)
        seen, publishing, _ = kill(*start(config, wreck=tell_first), rng=rng)
        ahead += not publishing and seen > len(list(journal(tmp_path / str(number) / "out")))
    assert ahead
