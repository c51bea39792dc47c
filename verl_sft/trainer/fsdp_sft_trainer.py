"""`torchrun -m verl_sft.trainer.fsdp_sft_trainer key=value ...`: one rank of a training run."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from verl_sft import safe_io
from verl_sft.config.checks import naming
from verl_sft.config.load import load_config
from verl_sft.config.train import TrainConfig
from verl_sft.distributed.reduce import together
from verl_sft.distributed.setup import World, arrange, setup_world
from verl_sft.export.hf import export_hf
from verl_sft.model.build import load_tokenizer, model_path
from verl_sft.processes import die_with_parent
from verl_sft.trainer import checkpoint
from verl_sft.trainer.assemble import assemble
from verl_sft.trainer.best import best_of, check_links, stops_early
from verl_sft.trainer.checkpoint import TrainProgress
from verl_sft.trainer.ending import End, failed, leave, lost_peer
from verl_sft.trainer.env_eval import make_player
from verl_sft.trainer.exporting import PROVENANCE, upload_export
from verl_sft.trainer.idle_options import idle_options
from verl_sft.trainer.inputs import fingerprint, load_inputs, provenance
from verl_sft.trainer.option_checks import check_options
from verl_sft.trainer.rank import LAUNCHER_ENV, ignore_warnings
from verl_sft.trainer.resume import find_start, remember_data
from verl_sft.trainer.state import TrainState
from verl_sft.trainer.status import write_status
from verl_sft.trainer.stopping import stop_at_signals, stopped_outside
from verl_sft.trainer.trackers import RunInfo
from verl_sft.trainer.tracking import LOGGERS, Tracker, plot_loss
from verl_sft.trainer.train_loop import RunPlan, TrainLoop
from verl_sft.trainer.watchdog import Watchdog

EXPORT_DIR = "huggingface"


def main(argv: Sequence[str] | None = None) -> End:
    """Run one rank; leaves `status.json`."""
    words = list(sys.argv[1:] if argv is None else argv)
    owned: list[Path] = []  # the run directory, once this run holds it
    try:
        if LAUNCHER_ENV not in os.environ:
            die_with_parent()
        stop_at_signals(interrupts=True)
        say = print if os.environ.get("RANK", "0") == "0" else None
        config = load_config(TrainConfig, words, say=say)
        with ExitStack() as stack:
            run(config, world=setup_world(config.trainer.device), stack=stack, owned=owned)
        return End(0, agreed=True)
    except (Exception, KeyboardInterrupt) as error:
        return failed(error, directory=owned[0] if owned else None)


def run(config: TrainConfig, *, world: World, stack: ExitStack, owned: list[Path]) -> None:
    """Check, load, train, export; errors that a user can mend are the same on every rank."""
    directory = Path(config.trainer.default_local_dir).expanduser()

    def say(text: str) -> None:
        if world.is_main and text:
            print(text, flush=True)

    with together(world):
        check_options(config, world_size=world.size)
        model_path(config.model)
        on_gpu = world.device.type == "cuda"
        for line in idle_options(config, on_gpu=on_gpu, world_size=world.size):
            say(line)
        absent = [str(name) for name in as_list(config.trainer.logger) if name not in LOGGERS]
        if absent:
            say(f"trainer.logger: no {', '.join(absent)} here; there are {', '.join(LOGGERS)}")
        if world.is_main:
            with naming("trainer.default_local_dir"):
                safe_io.make_output_dir(directory)
            stack.enter_context(safe_io.run_lock(directory))
            checkpoint.clean_leftovers(directory)
            check_links(directory)
            write_status(directory, state="running", code=None)
    owned.append(directory)
    sp_size = config.ulysses_sequence_parallel_size
    world = arrange(world, sp_size=sp_size, fsdp_size=config.engine.fsdp_size)
    with together(world):
        tokenizer = load_tokenizer(config.model)
    inputs = load_inputs(config, tokenizer=tokenizer, directory=directory, world=world, say=say)
    marks = fingerprint(config, inputs=inputs)
    with together(world):
        found = find_start(config, directory=directory, marks=marks, store=inputs.train, say=say)
    out = directory / EXPORT_DIR
    start = TrainProgress(**found[1]["progress"]) if found else TrainProgress()
    early = stops_early(start, config=config.trainer)
    done = early or start.step >= inputs.plan.total_steps
    if done and (not config.trainer.export or (out / "manifest.json").is_file()):
        say(f"the run is finished ({start.step} steps): nothing to do")
        _done(config, world=world, directory=directory, progress=start, say=say)
        return
    trainer, loss_model = assemble(
        config, world=world, inputs=inputs, tokenizer=tokenizer, directory=directory, marks=marks
    )
    if found:
        state = TrainState(loss_model, trainer.optimizer)
        at = checkpoint.load(found[0], manifest=found[1], state=state, world=world)
        trainer.resume(at, path=found[0])
        say(f"going on from {found[0].name}")
    facts = partial(provenance, config, files=inputs.train_files)
    trainer.play = make_player(
        config, model=loss_model, tokenizer=tokenizer, provenance=facts, directory=directory,
        world=world, leaving=lambda: trainer.stop_asked > 0, say=say,
    )  # fmt: skip
    if world.is_main:
        safe_io.write_json(directory / "train_config.json", asdict(config))
        safe_io.write_json(directory / PROVENANCE, facts())
        remember_data(directory, store=inputs.train)
        trainer.tracker = _open_tracker(config, directory=directory, start=start, plan=inputs.plan)
    trainer.watchdog = _watchdog(config, world=world, directory=directory)
    trainer.stop_on_signals()
    progress = trainer.fit()
    stop_at_signals()  # what is left can be done again
    if trainer.stop_asked:
        raise stopped_outside(trainer.stop_asked)
    if stops_early(progress, config=config.trainer):
        say(f"stopped early: {progress.bad_validations} validations without a better one")
    if trainer.tracker:
        trainer.tracker.close()
        say(plot_loss(directory))
    if config.trainer.export:
        if config.trainer.export_best:
            _load_best(trainer, directory=directory, world=world, say=say)
        export_hf(
            out, model=loss_model, config=config, tokenizer=tokenizer, provenance=facts(),
            world=world,
        )  # fmt: skip
        say(f"exported to {out}")
    _done(config, world=world, directory=directory, progress=progress, say=say)


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
    trainer: TrainLoop, *, directory: Path, world: World, say: Callable[[str], None]
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


def _done(
    config: TrainConfig,
    *,
    world: World,
    directory: Path,
    progress: TrainProgress,
    say: Callable[[str], None],
) -> None:
    if world.is_main:
        write_status(directory, state="done", code=0, step=progress.step)
        out, settings = directory / EXPORT_DIR, config.trainer
        upload_export(out, directory=directory, config=settings, step=progress.step, say=say)


def _watchdog(config: TrainConfig, *, world: World, directory: Path) -> Watchdog:
    return Watchdog(
        config.trainer.step_timeout_s,
        world=world,
        board=dist.distributed_c10d._get_default_store() if world.size > 1 else None,
        directory=directory,
        on_lost=partial(lost_peer, directory=directory),
    )


if __name__ == "__main__":
    ignore_warnings()
    leave(main())
