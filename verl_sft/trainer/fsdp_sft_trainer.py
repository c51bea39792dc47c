"""`torchrun -m verl_sft.trainer.fsdp_sft_trainer key=value ...`: one rank of a training run."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from verl_sft import safe_io
from verl_sft.config.load import load_config
from verl_sft.config.train import TrainConfig
from verl_sft.distributed.reduce import together
from verl_sft.distributed.setup import World, arrange, setup_world
from verl_sft.errors import OutOfMemoryError, PeerLostError, Preempted
from verl_sft.export.hf import export_hf
from verl_sft.model.build import load_tokenizer, model_path
from verl_sft.processes import die_with_parent
from verl_sft.trainer import checkpoint
from verl_sft.trainer.assemble import assemble
from verl_sft.trainer.best import best_of, stops_early
from verl_sft.trainer.checkpoint import TrainProgress
from verl_sft.trainer.env_eval import make_player
from verl_sft.trainer.failures import as_user_error
from verl_sft.trainer.inputs import (
    check_options,
    fingerprint,
    ignored_options,
    load_inputs,
    provenance,
)
from verl_sft.trainer.resume import find_start
from verl_sft.trainer.sft_trainer import RunPlan, SFTTrainer
from verl_sft.trainer.state import TrainState
from verl_sft.trainer.status import STATUS_ENV, write_status
from verl_sft.trainer.trackers import RunInfo
from verl_sft.trainer.tracking import LOGGERS, Tracker, plot_loss

EXPORT_DIR = "huggingface"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one rank; returns the exit code and leaves `status.json`."""
    words = list(sys.argv[1:] if argv is None else argv)
    is_main = os.environ.get("RANK", "0") == "0"
    owned: list[Path] = []  # the run directory, once this run holds it
    try:
        die_with_parent()
        signal.signal(signal.SIGTERM, _stopped_early)
        config = load_config(TrainConfig, words, say=print if is_main else None)
        with ExitStack() as stack:
            run(config, world=setup_world(config.trainer.device), stack=stack, owned=owned)
        return 0
    except KeyboardInterrupt:
        return _ended(owned, code=130, message="stopped by Ctrl-C", speak=is_main)
    except Exception as error:
        known = as_user_error(error)
        if known is None:
            traceback.print_exc()
            return _ended(owned, code=1, message=f"{type(error).__name__}: {error}", speak=False)
        # A broken connection is told by everyone who sees it, unless the cause is told already.
        alone = isinstance(known, PeerLostError | OutOfMemoryError)
        return _ended(owned, code=known.exit_code, message=str(known), speak=is_main or alone)


def run(config: TrainConfig, *, world: World, stack: ExitStack, owned: list[Path]) -> None:
    """Check, load, train, export; errors that a user can mend are the same on every rank."""
    directory = Path(config.trainer.default_local_dir).expanduser()

    def say(text: str) -> None:
        if world.is_main:
            print(text, flush=True)

    with together(world):
        check_options(config, world_size=world.size)
        model_path(config.model)
        for line in ignored_options(config, on_gpu=world.device.type == "cuda"):
            say(line)
        absent = [str(name) for name in as_list(config.trainer.logger) if name not in LOGGERS]
        if absent:
            say(f"trainer.logger: no {', '.join(absent)} here; there are {', '.join(LOGGERS)}")
        if world.is_main:
            safe_io.make_output_dir(directory)
            stack.enter_context(safe_io.run_lock(directory))
            owned.append(directory)
            checkpoint.clean_leftovers(directory)
            write_status(directory, state="running", code=None)
    world = arrange(
        world,
        sp_size=config.ulysses_sequence_parallel_size,
        fsdp_size=config.engine.fsdp_size,
    )
    with together(world):
        tokenizer = load_tokenizer(config.model)
    inputs = load_inputs(config, tokenizer=tokenizer, directory=directory, world=world, say=say)
    marks = fingerprint(config, inputs=inputs)
    with together(world):
        found = find_start(config, directory=directory, marks=marks, say=say)
    out = directory / EXPORT_DIR
    start = TrainProgress(**found[1]["progress"]) if found else TrainProgress()
    early = stops_early(start, config=config.trainer)
    done = early or start.step >= inputs.plan.total_steps
    if done and (not config.trainer.export or (out / "manifest.json").is_file()):
        say(f"the run is finished ({start.step} steps): nothing to do")
        _done(world, directory, start)
        return
    trainer, loss_model = assemble(
        config, world=world, inputs=inputs, tokenizer=tokenizer, directory=directory, marks=marks
    )
    if found:
        state = TrainState(loss_model, trainer.optimizer)
        trainer.resume(checkpoint.load(found[0], manifest=found[1], state=state, world=world))
        say(f"going on from {found[0].name}")
    facts = partial(provenance, config, files=inputs.train_files)
    trainer.play = make_player(
        config, model=loss_model, tokenizer=tokenizer, provenance=facts, directory=directory,
        world=world, leaving=lambda: trainer.stop_asked, say=say,
    )  # fmt: skip
    if world.is_main:
        safe_io.write_json(directory / "train_config.json", asdict(config))
        trainer.tracker = _open_tracker(config, directory=directory, start=start, plan=inputs.plan)
    trainer.stop_on_signals()
    progress = trainer.fit()
    if stops_early(progress, config=config.trainer):
        say(f"stopped early: {progress.bad_validations} validations without a better one")
    if trainer.tracker:
        trainer.tracker.close()
        note = plot_loss(directory)
        if note:
            say(note)
    if config.trainer.export:
        if config.trainer.export_best:
            _load_best(trainer, directory=directory, world=world, say=say)
        export_hf(
            out, model=loss_model, config=config, tokenizer=tokenizer, provenance=facts(),
            world=world,
        )  # fmt: skip
        say(f"exported to {out}")
    _done(world, directory, progress)


def _open_tracker(
    config: TrainConfig, *, directory: Path, start: TrainProgress, plan: RunPlan
) -> Tracker:
    settings = config.trainer
    return Tracker(
        directory,
        loggers=as_list(settings.logger),
        start_step=start.step,
        total_steps=plan.total_steps,
        log_freq=settings.log_freq,
        info=RunInfo(settings.project_name, settings.experiment_name, directory, asdict(config)),
    )


def _load_best(
    trainer: SFTTrainer, *, directory: Path, world: World, say: Callable[[str], None]
) -> None:
    """Put the weights of the best checkpoint into the model, unless they are there already."""
    with together(world):
        best = best_of(checkpoint.list_checkpoints(directory), manifest=checkpoint.MANIFEST)
        manifest = None if best is None else checkpoint.verify(best)
    if best is None or manifest is None:
        say("trainer.export_best: no checkpoint has a score, the last weights are exported")
        return
    if manifest["progress"]["step"] != trainer.progress.step:
        state = TrainState(trainer.model, trainer.optimizer)
        checkpoint.load(best, manifest=manifest, state=state, world=world)
    say(f"the best model by {trainer.config.trainer.best_metric} is {best.name}")


def as_list(value: Any) -> list[Any]:
    """A value that scripts give as a list or as a single word."""
    return list(value) if isinstance(value, list | tuple) else [value] if value else []


def _stopped_early(number: int, frame: Any) -> None:
    signal.signal(number, signal.SIG_IGN)
    raise Preempted(
        "stopped by a signal before the first step",
        fix="Run the same command again to go on from the last checkpoint, if there is one",
    )


def _done(world: World, directory: Path, progress: TrainProgress) -> None:
    if world.is_main:
        write_status(directory, state="done", code=0, step=progress.step)


def _ended(owned: list[Path], *, code: int, message: str, speak: bool) -> int:
    """Tell and record the end of a run that did not finish."""
    if speak:
        print(f"verl-sft: {message}", file=sys.stderr, flush=True)
    if os.environ.get("RANK", "0") == "0" or code in (1, OutOfMemoryError.exit_code):
        state = "preempted" if code == Preempted.exit_code else "failed"
        write_status(owned[0] if owned else None, state=state, code=code, message=message)
    return code


def leave(code: int) -> None:
    """End the process now: destructors of process groups fail runs that had succeeded.

    A user's error is the same on every rank and is told already; under our own launcher, which
    reads the code from `status.json`, torchrun then has no reason to print a traceback of its own.
    """
    agreed = code not in (1, OutOfMemoryError.exit_code, PeerLostError.exit_code, 130)
    if agreed and os.environ.get(STATUS_ENV):
        code = 0
    if code == 0 and dist.is_initialized() and dist.get_world_size() > 1:
        with contextlib.suppress(RuntimeError):  # a peer that is gone has its own exit code
            dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", module=r"torch\.distributed.*")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft)\..*")
    leave(main())
