"""Games with the current weights, during training: `verl-sft evaluate` in a process of its own.

All ranks export the weights to a folder that goes away again; rank 0 plays on them while the others
look for its word in the store, outside of any collective that could time out. Whatever goes wrong
is told and counted, and the run goes on.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from verl_sft.config.collect import EvaluateConfig
from verl_sft.config.load import load_config
from verl_sft.config.train import TrainConfig, TrainerConfig
from verl_sft.distributed.reduce import from_main
from verl_sft.distributed.setup import World
from verl_sft.errors import PeerLostError, StorageError, UsageError
from verl_sft.export.hf import export_hf
from verl_sft.safe_io import make_output_dir
from verl_sft.trainer.best import ENV_METRICS
from verl_sft.trainer.status import STATUS_ENV

FOLDER = "env_eval"  # of the run directory: a report and a log for each evaluation
FAILED: Mapping[str, float] = {"env/failed": 1.0}
_START = (
    "import sys\n"
    "from verl_sft.processes import die_with_parent\n"
    "die_with_parent(int(sys.argv.pop(1)))\n"
    "from verl_sft.cli import main\n"
    "sys.exit(main())\n"
)
_POLL_SECONDS = 0.1
_SLACK_SECONDS = 120.0  # beyond the time limit, for the others
# A child that saw these would take itself for a rank.
_OF_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_")


def check_env_eval(config: TrainerConfig) -> None:
    """Raise before the run for words that `verl-sft evaluate` will not take.

    Raises:
        UsageError: naming the key.
    """
    if plays(config):
        folder = config.env_eval_data_dir
        if folder is not None and not Path(folder).expanduser().is_dir():
            raise UsageError(
                "no such folder",
                where=f"trainer.env_eval_data_dir={folder}",
                fix="Make games with: verl-sft make-games out=DIR",
            )
        words = _words(config, model=Path("model"), report=Path("report.json"))
        env = load_config(EvaluateConfig, words).env
        if env.name == "alfworld" and not (env.data_dir or os.environ.get("ALFWORLD_DATA")):
            raise UsageError(
                "trainer.env_eval_freq is set, and there are no games",
                where="trainer.env_eval_data_dir",
                fix="Set it, or ALFWORLD_DATA; make games with: verl-sft make-games out=DIR",
            )


def plays(config: TrainerConfig) -> bool:
    """Whether games are played during the run."""
    return config.env_eval_freq not in (None, -1, 0)


def make_player(
    config: TrainConfig,
    *,
    model: Any,
    tokenizer: Any,
    provenance: Callable[[], Mapping[str, Any]],
    directory: Path,
    world: World,
    leaving: Callable[[], bool],
    say: Callable[[str], None],
) -> Callable[[int], Mapping[str, float]] | None:
    """What measures the weights behind a step; None where `trainer.env_eval_freq` asks for nothing.

    Args:
        config: of the run.
        model: the live, sharded `LossModel`.
        tokenizer: exported with it.
        provenance: as for the export at the end.
        directory: of the run.
        world: the ranks; all of them must call the result.
        leaving: whether a signal asks to stop; games are then given up.
        say: tells the user.
    """
    if not plays(config.trainer):
        return None

    def play(step: int) -> Mapping[str, float]:
        place = directory / f".tmp-{FOLDER}_{step}"
        report = directory / FOLDER / f"step_{step}.json"
        found: Mapping[str, float] = FAILED
        try:
            # Building a model draws random numbers, which are none of the run's.
            with torch.random.fork_rng(devices=[]):
                export_hf(
                    place / "model",
                    model=model,
                    config=config,
                    tokenizer=tokenizer,
                    provenance=provenance(),
                    world=world,
                )
            if world.is_main:
                words = _words(config.trainer, model=place / "model", report=report)
                found = run_evaluation(
                    words,
                    report=report,
                    seconds=config.trainer.env_eval_timeout,
                    leaving=leaving,
                    say=say,
                )
        except StorageError as error:  # the same on every rank, or rank 0's own
            say(f"the evaluation behind step {step} failed: {error}")
        finally:
            if world.is_main:
                shutil.rmtree(place, ignore_errors=True)
        _meet(f"{FOLDER}/{step}", seconds=config.trainer.env_eval_timeout, world=world)
        result: dict[str, float] = from_main(dict(found), world=world)
        return result

    return play


def run_evaluation(
    words: Sequence[str],
    *,
    report: Path,
    seconds: float,
    leaving: Callable[[], bool],
    say: Callable[[str], None],
) -> Mapping[str, float]:
    """Run `verl-sft evaluate` and read its report; `FAILED` and a line where there is none.

    Args:
        words: of the command.
        report: that it writes; its output goes to a `.log` beside it.
        seconds: after which it is ended.
        leaving: ends it when true.
        say: tells the user.
    """
    make_output_dir(report.parent)
    report.unlink(missing_ok=True)
    log, started = report.with_suffix(".log"), time.monotonic()
    env = {k: v for k, v in os.environ.items() if not k.startswith(_OF_RANKS) and k != STATUS_ENV}
    command = [sys.executable, "-c", _START, str(os.getpid()), "evaluate", *words]
    with log.open("wb") as stream:
        child = subprocess.Popen(
            command, env=env, stdout=stream, stderr=stream, start_new_session=True
        )
        why = ""
        while child.poll() is None and not why:
            if leaving():
                why = "the run is to stop"
            elif time.monotonic() - started > seconds:
                why = f"it took more than trainer.env_eval_timeout={seconds:g} seconds"
            else:
                time.sleep(_POLL_SECONDS)
        if why:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    try:
        found = metrics_of(json.loads(report.read_text("utf-8")))
    except (OSError, ValueError, KeyError):
        last = (log.read_text("utf-8", "replace").strip().splitlines() or [""])[-1]
        why = why or f"exit code {child.returncode}: {last}"
        say(f"the evaluation gave no report: {why} ({log})")
        return FAILED
    return {**found, "env/seconds": time.monotonic() - started}


def metrics_of(report: Mapping[str, Any]) -> dict[str, float]:
    """`env/success_rate` and its like out of a report, and the rate of each task type."""
    overall = report["overall"]
    found = {f"env/{name}": float(overall[name]) for name in ENV_METRICS}
    for name, figures in report["by_task_type"].items():
        found[f"env/success_rate/{name}"] = float(figures["success_rate"])
    return found


def _words(config: TrainerConfig, *, model: Path, report: Path) -> list[str]:
    data = [f"env.data_dir={config.env_eval_data_dir}"] if config.env_eval_data_dir else []
    words = [word for text in config.env_eval for word in shlex.split(text)]
    return [f"model={model}", f"output={report}", *data, *words]


def _meet(key: str, *, seconds: float, world: World) -> None:
    """Let all ranks wait for rank 0, however long it plays.

    Raises:
        PeerLostError: rank 0 did not come back.
    """
    if world.size == 1:
        return
    store = dist.distributed_c10d._get_default_store()
    if world.is_main:
        store.set(key, "done")
        return
    deadline = time.monotonic() + seconds + _SLACK_SECONDS
    while not store.check([key]):
        if time.monotonic() > deadline:
            raise PeerLostError("rank 0 did not come back from the evaluation")
        time.sleep(_POLL_SECONDS)
